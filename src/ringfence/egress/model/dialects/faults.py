"""Errors of clouds as the Messages API's own. PURE.

Of who we are and what we may nothing passes: what a cloud says of a signature or a role may repeat
a token or an account, and no agent can mend it. What it says of the request does pass, because
clients act on it: a prompt that is too long is made shorter.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

MAX_ERROR = 64 << 10
_MAX_WORDS = 2000

EXPIRED, REFUSED = "provider-credential-expired", "provider-credential-refused"
DENIED, NO_MODEL = "provider-access-denied", "provider-model-missing"


class Fault(NamedTuple):
    """An error of the Messages API. tag: of one that is told in words of ours alone."""

    status: int
    kind: str
    tag: str = ""


_INVALID = Fault(400, "invalid_request_error")
_BUSY = Fault(429, "rate_limit_error")
_OVER = Fault(529, "overloaded_error")
_BROKEN = Fault(500, "api_error")
_LATE = Fault(504, "timeout_error")
_LARGE = Fault(413, "request_too_large")
_WHO = Fault(403, "permission_error", REFUSED)
_MAY = Fault(403, "permission_error", DENIED)
_OLD = Fault(403, "permission_error", EXPIRED)
_NONE = Fault(404, "not_found_error", NO_MODEL)

AWS: Mapping[str, Fault] = {
    "throttlingexception": _BUSY,
    "servicequotaexceededexception": _BUSY,
    "toomanyrequestsexception": _BUSY,
    "modelnotreadyexception": _BUSY,
    "serviceunavailableexception": _OVER,
    "internalserverexception": _BROKEN,
    "modelerrorexception": _BROKEN,
    "modelstreamerrorexception": _BROKEN,
    "modeltimeoutexception": _LATE,
    "validationexception": _INVALID,
    "resourcenotfoundexception": _NONE,
    "accessdeniedexception": _MAY,
    "expiredtokenexception": _OLD,
    "expiredtoken": _OLD,
    "requestexpired": _OLD,
    "unrecognizedclientexception": _WHO,
    "invalidsignatureexception": _WHO,
    "signaturedoesnotmatch": _WHO,
    "incompletesignatureexception": _WHO,
    "missingauthenticationtokenexception": _WHO,
    "invalidclienttokenid": _WHO,
}
"""By the code of `x-amzn-errortype`, in small letters: the errors of InvokeModel and its stream,
and those that every service of AWS has."""

GOOGLE: Mapping[str, Fault] = {
    "INVALID_ARGUMENT": _INVALID,
    "FAILED_PRECONDITION": _INVALID,
    "OUT_OF_RANGE": _INVALID,
    "UNAUTHENTICATED": _WHO,
    "PERMISSION_DENIED": _MAY,
    "NOT_FOUND": _NONE,
    "RESOURCE_EXHAUSTED": _BUSY,
    "UNAVAILABLE": _OVER,
    "DEADLINE_EXCEEDED": _LATE,
    "INTERNAL": _BROKEN,
}
"""By google.rpc.Code."""

_BY_STATUS = {
    400: _INVALID,
    401: _WHO,
    403: _MAY,
    404: _NONE,
    408: _LATE,
    413: _LARGE,
    424: _BROKEN,
    429: _BUSY,
    500: _BROKEN,
    502: _BROKEN,
    503: _OVER,
    504: _LATE,
    529: _OVER,
}


def by_status(status: int) -> Fault:
    """Of an error that says nothing else."""
    return _BY_STATUS.get(status) or (_INVALID if status < 500 else _BROKEN)


def aws(status: int, code: str) -> Fault:
    """Of Bedrock: `code` as the header or the exception of a stream has it."""
    name = code.partition(":")[0].rpartition("#")[2].strip().lower()
    return AWS.get(name) or by_status(status)


def google(status: int) -> Fault:
    """Of Vertex AI, by the head alone: its own code comes in the body, and says the same."""
    return by_status(status)


def words(body: bytes) -> str:
    """What an error says, in each shape that clouds and models have; empty for none."""
    if len(body) > MAX_ERROR:
        return ""
    try:
        value: Any = json.loads(body.decode("utf-8"))
    except (ValueError, RecursionError):
        return ""
    if isinstance(value, list):
        value = value[0] if value else None
    if not isinstance(value, dict):
        return ""
    inner = value.get("error")
    if isinstance(inner, dict):
        value = inner
    said = value.get("message", value.get("Message"))
    return said[:_MAX_WORDS] if isinstance(said, str) else ""


def body_of(fault: Fault, said: str) -> bytes:
    """An error's body, as the Messages API shapes it."""
    message = f"ringfence: {fault.tag}" if fault.tag else said or "the provider gave no reason"
    error = {"type": fault.kind, "message": message}
    return json.dumps({"type": "error", "error": error}).encode()
