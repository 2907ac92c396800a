"""The model route's rules. PURE: bytes and headers in, decisions and meters out."""

from ringfence.egress.model.body import Facts
from ringfence.egress.model.exchange import (
    Admitted,
    Cut,
    Judged,
    ModelExchange,
    Refusal,
    Report,
    RunState,
    judge,
)
from ringfence.egress.model.ledger import Violation
from ringfence.egress.model.sse import ToolUseSeen

__all__ = [
    "Admitted",
    "Cut",
    "Facts",
    "Judged",
    "ModelExchange",
    "Refusal",
    "Report",
    "RunState",
    "ToolUseSeen",
    "Violation",
    "judge",
]
