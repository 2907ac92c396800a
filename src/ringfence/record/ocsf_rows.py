"""How each kind of record is told in OCSF: the table that `ringfence.record.ocsf` goes by. PURE."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ringfence.record.ocsf_fit import METHODS

PRODUCT = "ringfence"
_INFORMATIONAL, _LOW, _MEDIUM, _HIGH = 1, 2, 3, 4
_ALLOWED, _DENIED, _OBSERVED, _DELAYED = (1, 1), (2, 2), (3, 17), (99, 14)
"""`action_id` and `disposition_id` of the profile security_control."""

Record = Mapping[str, Any]
Activity = tuple[int, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """How one kind is told.

    Attributes:
        uid: the class. activity: its id and name, or what gives them.
        places: field to a path in the event; the first part of a path `x[]` is a list of one.
        fixed: path to what always stands there, unless a field came to stand there.
        severity, status, control: ids, or what gives them; status and control may be None.
    """

    uid: int
    activity: Activity | Callable[[Record], Activity]
    places: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    severity: int | Callable[[Record], int] = _INFORMATIONAL
    status: int | Callable[[Record], int] | None = None
    control: tuple[int, int] | Callable[[Record], tuple[int, int]] | None = None


def _good(*words: str) -> Callable[[Record], int]:
    """Success for these words of `status` or `outcome`; unknown where it says so itself."""

    def judge(record: Record) -> int:
        word = record.get("status", record.get("outcome"))
        return 1 if word in words else 0 if word == "unknown" else 2

    return judge


def _answered(record: Record) -> int:
    status = record.get("status")
    return 1 if isinstance(status, int) and 200 <= status < 300 and not record.get("reason") else 2


def _unless_reason(record: Record) -> int:
    return 2 if record.get("reason") else 1


def _decision(record: Record) -> tuple[int, int]:
    return {"allow": _ALLOWED, "deny": _DENIED}.get(str(record.get("outcome")), _DELAYED)


def _method(record: Record) -> Activity:
    method = str(record.get("method"))
    return METHODS.get(method, (99, method or "Other"))


def _change(record: Record) -> Activity:
    made = {"created": (1, "Create"), "forked": (1, "Create"), "deleted": (4, "Delete")}
    return made.get(str(record.get("action")), (3, "Update"))


_RUN = {"app.name": "ringfence run", "app.vendor_name": PRODUCT}
_TOOL = {"name": "api.operation", "tool_use_id": "api.request.uid"}
_TOOLS = {"api.service.name": "tools of the agent", "api.operation": "unknown"}
_MODEL = {"model": "ai_model.name", "request_id": "api.request.uid"}
_MODELS = {
    "api.service.name": "model",
    "api.operation": "messages",
    "ai_model.ai_provider": "unknown",
    "ai_model.name": "unknown",
}
_HOST = {"host": "dst_endpoint.hostname", "port": "dst_endpoint.port"}
_RULE = {"rule": "policy.name", "credential": "actor.session.credential_uid"}
_SECRET = {"name": "resources[].name", "scheme": "resources[].type"}
_SECRETS = {
    "api.service.name": "secrets",
    "api.operation": "resolve",
    "resources[].type": "credential",
    "resources[].name": "unknown",
}
_LOG = {"log_name": "ringfence audit", "log_type": "Application", "log_type_id": 2}
_SAID = {"recorder": "log_provider", "reason": "status_detail", "count": "count"}

TABLE: Mapping[str, Row] = {
    "run.started": Row(
        uid=6002, activity=(3, "Start"), places={"kind": "app.feature.name"}, fixed=_RUN
    ),
    "run.ended": Row(
        uid=6002,
        activity=(4, "Stop"),
        places={"status": "status_code", "reason": "status_detail", "duration_ms": "duration"},
        fixed=_RUN,
        status=_good("succeeded"),
        severity=lambda record: _LOW if _good("succeeded")(record) == 2 else _INFORMATIONAL,
    ),
    "run.lost": Row(
        uid=6002,
        activity=(4, "Stop"),
        places={"reason": "status_detail"},
        fixed=_RUN,
        status=2,
        severity=_MEDIUM,
    ),
    "sandbox.started": Row(
        uid=1007,
        activity=(1, "Launch"),
        places={
            "isolation": "process.sandbox",
            "image": "device.image.uid",
            "reason": "status_detail",
        },
        fixed={"process.name": "sandbox"},
        status=1,
    ),
    "sandbox.stopped": Row(
        uid=1007,
        activity=(2, "Terminate"),
        places={"reason": "status_detail"},
        fixed={"process.name": "sandbox"},
    ),
    "tool.requested": Row(
        uid=6003, activity=(99, "Request"), places=_TOOL, fixed=_TOOLS, control=_OBSERVED
    ),
    "tool.decided": Row(
        uid=6003,
        activity=(99, "Decide"),
        places={**_TOOL, "rule": "policy.name", "outcome": "status_code"},
        fixed=_TOOLS,
        control=_decision,
    ),
    "tool.finished": Row(
        uid=6003,
        activity=(99, "Finish"),
        places={**_TOOL, "outcome": "status_code", "duration_ms": "duration"},
        fixed=_TOOLS,
        status=_good("success"),
    ),
    "witness.disagreed": Row(
        uid=2004,
        activity=(1, "Create"),
        places={"tool_use_id": "resources[].uid", "reason": "finding_info.types[]"},
        fixed={
            "resources[].type": "tool_use",
            "resources[].uid": "unknown",
            "finding_info.title": "a tool call or result that the two witnesses tell differently",
            "is_alert": True,
        },
        severity=_HIGH,
        control=_DENIED,
    ),
    "model.requested": Row(
        uid=6003,
        activity=(1, "Create"),
        places={
            **_MODEL,
            **_RULE,
            "provider": "ai_model.ai_provider",
            "path": "api.operation",
            "body_bytes": "http_request.body_length",
        },
        fixed={**_MODELS, "http_request.http_method": "POST"},
        control=_ALLOWED,
    ),
    "model.answered": Row(
        uid=6003,
        activity=(2, "Read"),
        places={
            **_MODEL,
            "status": "http_response.code",
            "duration_ms": "duration",
            "reason": "status_detail",
            "input_tokens": "message_context.prompt_tokens",
            "output_tokens": "message_context.completion_tokens",
        },
        fixed={
            **_MODELS,
            "message_context.ai_role": "Assistant",
            "message_context.ai_role_id": 2,
            "message_context.service.name": "model",
        },
        status=_answered,
    ),
    "usage.differed": Row(
        uid=2004,
        activity=(1, "Create"),
        fixed={"finding_info.title": "an agent reports other tokens than the wire had"},
        severity=_LOW,
        control=_OBSERVED,
    ),
    "budget.alerted": Row(
        uid=2004,
        activity=(1, "Create"),
        places={"budget": "resources[].uid"},
        fixed={
            "resources[].type": "budget",
            "resources[].uid": "unknown",
            "finding_info.title": "a budget that runs share is almost spent",
            "is_alert": True,
        },
        severity=_LOW,
        control=_OBSERVED,
    ),
    "model.retried": Row(
        uid=6003,
        activity=(99, "Retry"),
        places={"request_id": "api.request.uid", "reason": "status_detail"},
        fixed={**_MODELS, "http_request.http_method": "POST"},
        status=2,
    ),
    "model.moved": Row(
        uid=6003,
        activity=(99, "Failover"),
        places={
            "to_model": "ai_model.name",
            "to_provider": "ai_model.ai_provider",
            "reason": "status_detail",
        },
        fixed={**_MODELS, "http_request.http_method": "POST"},
        severity=_LOW,
    ),
    "breaker.changed": Row(
        uid=2004,
        activity=lambda record: (1, "Create") if record.get("state") == "open" else (2, "Update"),
        places={"breaker": "resources[].uid"},
        fixed={
            "resources[].type": "service",
            "resources[].uid": "unknown",
            "finding_info.title": "what many depend on fails, or is well again",
            "is_alert": True,
        },
        severity=_MEDIUM,
        control=_OBSERVED,
    ),
    "egress.allowed": Row(
        uid=4002,
        activity=_method,
        places={
            **_HOST,
            **_RULE,
            "method": "http_request.http_method",
            "path": "http_request.url.path",
            "address": "dst_endpoint.ip",
        },
        fixed={"http_request.url.scheme": "https", "http_request.url.path": "/"},
        control=_ALLOWED,
    ),
    "egress.allowed, opaque": Row(
        uid=4001,
        activity=(1, "Open"),
        places={**_HOST, **_RULE, "address": "dst_endpoint.ip"},
        control=_ALLOWED,
    ),
    "egress.refused": Row(
        uid=4001,
        activity=(5, "Refuse"),
        places={
            "target": "dst_endpoint.name",
            "rule": "policy.name",
            "reason": "status_detail",
            "count": "count",
        },
        status=2,
        severity=_LOW,
        control=_DENIED,
    ),
    "egress.ended": Row(
        uid=4001,
        activity=(2, "Close"),
        places={
            **_HOST,
            "bytes_in": "traffic.bytes_in",
            "bytes_out": "traffic.bytes_out",
            "duration_ms": "duration",
            "reason": "status_detail",
        },
        status=_unless_reason,
    ),
    "credential.resolved": Row(
        uid=6003,
        activity=(2, "Read"),
        places={**_SECRET, "version": "resources[].version"},
        fixed=_SECRETS,
        status=1,
    ),
    "credential.unresolved": Row(
        uid=6003,
        activity=(2, "Read"),
        places={**_SECRET, "reason": "status_detail"},
        fixed=_SECRETS,
        status=2,
        severity=_MEDIUM,
    ),
    "keeper.ended": Row(
        uid=6002,
        activity=(5, "Restart"),
        places={"how": "status_detail"},
        fixed={"app.name": "ringfence keeper", "app.vendor_name": PRODUCT},
        status=2,
        severity=_MEDIUM,
    ),
    "session.changed": Row(
        uid=6003,
        activity=_change,
        places={"action": "api.operation"},
        fixed={
            "api.service.name": "sessions",
            "api.operation": "changed",
            "resources[].type": "session",
            "resources[].name": "session",
        },
        status=1,
    ),
    "patch.applied": Row(
        uid=6003,
        activity=(3, "Update"),
        places={"patch_sha256": "resources[].uid"},
        fixed={
            "api.service.name": "workspace",
            "api.operation": "apply patch",
            "resources[].type": "patch",
            "resources[].name": "patch",
        },
        status=1,
    ),
    "log.opened": Row(uid=1008, activity=(6, "Start"), places=_SAID, fixed=_LOG, status=1),
    "log.closed": Row(uid=1008, activity=(7, "Stop"), places=_SAID, fixed=_LOG, status=1),
    "log.heartbeat": Row(uid=1008, activity=(99, "Heartbeat"), places=_SAID, fixed=_LOG),
    "log.clock_set_back": Row(
        uid=1008,
        activity=(99, "Clock Set Back"),
        places=_SAID,
        fixed=_LOG,
        severity=_MEDIUM,
    ),
    "log.anchored": Row(uid=1008, activity=(99, "Anchor"), places=_SAID, fixed=_LOG, status=1),
    "log.anchor_failed": Row(
        uid=1008,
        activity=(99, "Anchor"),
        places=_SAID,
        fixed=_LOG,
        status=2,
        severity=_HIGH,
    ),
    "log.refused": Row(
        uid=1008,
        activity=(99, "Refuse"),
        places=_SAID,
        fixed=_LOG,
        severity=_MEDIUM,
        control=_DENIED,
    ),
    "log.key_rotated": Row(
        uid=1008, activity=(99, "Rotate Key"), places=_SAID, fixed=_LOG, severity=_MEDIUM
    ),
}
UNKNOWN = Row(uid=0, activity=(99, "Other"))


def row_of(record: Record) -> Row:
    """The table's row for a record."""
    kind = record.get("type")
    if kind == "egress.allowed" and record.get("opaque") is True:
        return TABLE["egress.allowed, opaque"]
    return TABLE.get(kind, UNKNOWN) if isinstance(kind, str) else UNKNOWN
