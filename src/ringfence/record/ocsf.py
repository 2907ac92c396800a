"""Records of the audit log as events of the Open Cybersecurity Schema Framework, 1.8.0. PURE.

One table: each kind of the catalogue, and the places of its fields. What has no place, or does not
fit the one it has (a name that is no host's, an address that is none), is kept under `unmapped`,
so that nothing of a record is lost; empty texts and lists are not told. A kind that the table does
not know, of a newer log, becomes a Base Event.

`metadata.uid` is the record's leaf hash (RFC 6962) in hex: an event can be traced to a log that
verifies, by whoever holds one. The events themselves are unsigned copies.
"""

from __future__ import annotations

from typing import Any

from ringfence.record.ocsf_fit import fit, milliseconds, put
from ringfence.record.ocsf_rows import PRODUCT, UNKNOWN, Record, Row, row_of

VERSION = "1.8.0"
PROFILES = ["host", "security_control"]

CLASSES = {
    0: ("Base Event", 0, "Uncategorized"),
    1007: ("Process Activity", 1, "System Activity"),
    1008: ("Event Log Activity", 1, "System Activity"),
    2004: ("Detection Finding", 2, "Findings"),
    4001: ("Network Activity", 4, "Network Activity"),
    4002: ("HTTP Activity", 4, "Network Activity"),
    6002: ("Application Lifecycle", 6, "Application Activity"),
    6003: ("API Activity", 6, "Application Activity"),
}
"""Caption, category and its caption, by `class_uid`."""

_SEVERITIES = {1: "Informational", 2: "Low", 3: "Medium", 4: "High"}
_STATUSES = {0: "Unknown", 1: "Success", 2: "Failure", 99: "Other"}
_FINDING_STATUSES = {1: "New"}
_ACTIONS = {1: "Allowed", 2: "Denied", 3: "Observed", 99: "Other"}
_DISPOSITIONS = {1: "Allowed", 2: "Blocked", 14: "Delayed", 17: "Logged"}
_WITHOUT_AGENT = ("run.", "sandbox.", "session.", "patch.", "log.", "credential.", "keeper.")
_COMMON = frozenset({"type", "time", "source", "run_id", "session_id", "sandbox_id"})


def event(record: Record, *, index: int, leaf: str, version: str) -> dict[str, Any]:
    """One record as an OCSF event. `leaf` is its hash in hex, `version` ringfence's.

    Raises:
        ValueError: it has no time, and so is no record.
    """
    row = row_of(record)
    told: dict[str, Any] = _classified(row, record)
    told["time"] = milliseconds(record.get("time"))
    told["metadata"] = _metadata(row, record, index=index, leaf=leaf, version=version)
    unmapped = {}
    for name, value in record.items():
        if name in _COMMON or value in ("", None, [], {}):
            continue
        path = row.places.get(name)
        fitting = fit(path, value) if path is not None else None
        if path is None or fitting is None:
            unmapped[name] = value
        else:
            put(told, path, fitting)
    _surround(told, row, record, leaf)
    for path, value in row.fixed.items():
        put(told, path, value, over=False)
    if unmapped:
        told["unmapped"] = unmapped
    return told


def _classified(row: Row, record: Record) -> dict[str, Any]:
    caption, category, category_caption = CLASSES[row.uid]
    activity, name = row.activity(record) if callable(row.activity) else row.activity
    severity = row.severity(record) if callable(row.severity) else row.severity
    status = row.status(record) if callable(row.status) else row.status
    control = row.control(record) if callable(row.control) else row.control
    told = {
        "class_uid": row.uid,
        "class_name": caption,
        "category_uid": category,
        "category_name": category_caption,
        "activity_id": activity,
        "activity_name": name,
        "type_uid": row.uid * 100 + activity,
        "type_name": f"{caption}: {name}",
        "severity_id": severity,
        "severity": _SEVERITIES[severity],
    }
    if row.uid == 2004:
        told |= {"status_id": 1, "status": _FINDING_STATUSES[1]}
    elif status is not None:
        told |= {"status_id": status, "status": _STATUSES[status]}
    if control is not None:
        action, disposition = control
        told |= {"action_id": action, "action": _ACTIONS[action]}
        told |= {"disposition_id": disposition, "disposition": _DISPOSITIONS[disposition]}
    return told


def _metadata(row: Row, record: Record, *, index: int, leaf: str, version: str) -> dict[str, Any]:
    # ai_model and message_context belong to a profile that not every class has
    more = ["ai_operation"] if any(path.startswith("ai_model") for path in row.fixed) else []
    metadata: dict[str, Any] = {
        "version": VERSION,
        "product": {"name": PRODUCT, "vendor_name": PRODUCT, "version": version},
        "profiles": [*PROFILES, *more],
        "log_name": "ringfence audit",
        "uid": leaf,
        "sequence": index,
        "original_time": record["time"],
    }
    for name, place in (
        ("type", "event_code"),
        ("run_id", "correlation_uid"),
        ("source", "log_provider"),
    ):
        if record.get(name):
            metadata[place] = str(record[name])
    return metadata


def _surround(told: dict[str, Any], row: Row, record: Record, leaf: str) -> None:
    """Who acted, and where: the agent in its sandbox, or ringfence itself."""
    kind, sandbox = str(record.get("type", "")), str(record.get("sandbox_id", "") or "unknown")
    itself = kind.startswith(_WITHOUT_AGENT) or row is UNKNOWN
    put(told, "actor.app_name", PRODUCT if itself else "agent")
    if record.get("session_id"):
        put(told, "actor.session.uid", str(record["session_id"]))
    if record.get("sandbox_id") or row.uid == 1007:
        device = told.setdefault("device", {})
        device |= {"type_id": 6, "type": "Virtual", "uid": sandbox}
    if row.uid in {4001, 4002, 6003}:
        told["src_endpoint"] = {"type_id": 6, "type": "Virtual", "uid": sandbox}
    if row.uid == 1007:
        put(told, "process.uid", sandbox)
    if row.uid == 2004:
        put(told, "finding_info.uid", leaf)
    if row.uid in {4001, 4002}:
        endpoint = told.setdefault("dst_endpoint", {})
        if not endpoint.keys() & {"hostname", "name"}:
            endpoint["name"] = "unknown"
    if kind == "session.changed" and record.get("session_id"):
        put(told, "resources[].uid", str(record["session_id"]))
