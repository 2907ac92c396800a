"""Errors as the official client's types have them, and which status each code has. PURE.

`{"type": "error", "error": {"type", "message", "details": {"error_code"}}, "request_id"}`, and
the id again as the header `request-id`. `error_code` is our code with underscores; where the
client has a code of its own for the same cause (`environment_archived`), they are the same word.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ringfence.errors import CallerError, DeniedError, RingfenceError, UnavailableError

RETRY_SECONDS = 5
"""What a caller is asked to wait when the platform is away."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """An error as it goes out."""

    status: int
    body: dict[str, Any]
    headers: dict[str, str]


_STATUS: dict[str, tuple[int, str]] = {
    "agent-not-found": (404, "not_found_error"),
    "environment-not-found": (404, "not_found_error"),
    "session-not-found": (404, "not_found_error"),
    "resource-not-found": (404, "not_found_error"),
    "environment-in-use": (409, "conflict_error"),
    "session-running": (409, "conflict_error"),
    "session-full": (429, "rate_limit_error"),
    "streams-exhausted": (429, "rate_limit_error"),
    "not-supported": (404, "not_found_error"),
    "route-unknown": (404, "not_found_error"),
    "file-not-found": (404, "not_found_error"),
    "file-expired": (404, "not_found_error"),
    "vault-not-found": (404, "not_found_error"),
    "credential-not-found": (404, "not_found_error"),
    "credential-conflict": (409, "conflict_error"),
    "token-invalid": (401, "authentication_error"),
    "version-conflict": (409, "conflict_error"),
    # the draft's own status for it (draft-ietf-httpapi-idempotency-key-header-07, 2.7)
    "idempotency-mismatch": (422, "invalid_request_error"),
    "api-key-missing": (401, "authentication_error"),
    "api-key-invalid": (401, "authentication_error"),
    "request-too-large": (413, "invalid_request_error"),
    "request-too-slow": (408, "timeout_error"),
    "request-rate": (429, "rate_limit_error"),
    "gateway-busy": (503, "overloaded_error"),
}
_FAMILY: dict[type[RingfenceError], tuple[int, str]] = {
    CallerError: (400, "invalid_request_error"),
    DeniedError: (403, "permission_error"),
    UnavailableError: (503, "api_error"),
}


def answer(
    error: RingfenceError, request_id: str, *, status: int | None = None, wait: float | None = None
) -> Answer:
    """An error of ours on the wire. `wait`: seconds after which another try makes sense."""
    usual, kind = _STATUS.get(error.code) or _FAMILY.get(type(error), (500, "api_error"))
    if error.code == "internal":
        usual = 500
    # what an operator can mend is no business of a caller's
    hint = error.hint if isinstance(error, CallerError | DeniedError) else ""
    headers = {"request-id": request_id}
    number = status or usual
    if number == 503 or wait is not None:
        headers["retry-after"] = str(max(1, round(RETRY_SECONDS if wait is None else wait)))
    if number == 409:
        # the client tries a conflict again by itself, and this one stays one
        headers["x-should-retry"] = "false"
    if number == 401:
        headers["www-authenticate"] = "Bearer"
    body = {
        "type": "error",
        "error": {
            "type": kind,
            "message": f"{error.message} ({hint})" if hint else error.message,
            "details": {"error_code": error.code.replace("-", "_")},
        },
        "request_id": request_id,
    }
    return Answer(status=number, body=body, headers=headers)
