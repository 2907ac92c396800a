"""Requirement K: one agent cannot stop the fleet by filling the log. PURE.

Each sandbox has a share. Three kinds of event:

- **never counted**: start and end of runs and sandboxes, disagreeing witnesses. They are few, and
  a run without them is not explained.
- **coalesced past the share**: refusals. What an agent can make without end at no cost is counted
  and written as one record a minute, reason and sandbox, with `count`.
- **refused past ten shares**: everything else, which is written before something is done
  (a model request, an allowed request, a tool call) or tells how that ended. The doing is refused
  with it, so the agent that floods stops itself, and nobody else. Tool decisions are among them:
  whoever forges frames inside can ask for as many as it likes.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

SHARE = 20_000
"""Records of one sandbox, unless its policy says otherwise."""
_HARD = 10
_MAX_SANDBOXES = 65_536
_MAX_HELD = 4_096
NEVER_COUNTED = frozenset(
    {
        "run.started",
        "run.ended",
        "sandbox.started",
        "sandbox.stopped",
        "witness.disagreed",
        "session.changed",
        "patch.applied",
    }
)
COALESCED = frozenset({"egress.refused"})


class Verdict(Enum):
    """What happens to an event."""

    WRITE = "write"
    COUNT = "count"
    REFUSE = "refuse"


class Quota:
    """Shares of one recorder's sandboxes."""

    def __init__(self, share: int = SHARE) -> None:
        self._share = share
        self._shares: dict[str, int] = {}
        self._written: dict[str, int] = {}
        self._held: dict[tuple[str, str], dict[str, Any]] = {}

    def allow(self, sandbox: str, records: object) -> None:
        """Give a sandbox another share than the usual one."""
        if isinstance(records, int) and not isinstance(records, bool) and records > 0:
            self._make_room(self._shares)
            self._shares[sandbox] = records

    def judge(self, event: dict[str, Any]) -> Verdict:
        """Write, count or refuse; a counted one comes back with `flush`."""
        kind = event["type"]
        if kind in NEVER_COUNTED:
            if kind == "sandbox.stopped":
                self._forget(event.get("sandbox_id", ""))
            return Verdict.WRITE
        sandbox = event.get("sandbox_id", "")
        share = self._shares.get(sandbox, self._share)
        written = self._written.get(sandbox, 0)
        if kind in COALESCED and written >= share:
            return self._hold(sandbox, event)
        if written >= share * _HARD:
            return Verdict.REFUSE
        if written == 0:
            self._make_room(self._written)
        self._written[sandbox] = written + 1
        return Verdict.WRITE

    def _hold(self, sandbox: str, event: dict[str, Any]) -> Verdict:
        reason = str(event.get("reason", ""))
        if len(self._held) >= _MAX_HELD and (sandbox, reason) not in self._held:
            reason = "several"
        held = self._held.setdefault(
            (sandbox, reason),
            {
                "type": event["type"],
                "run_id": event.get("run_id", ""),
                "session_id": event.get("session_id", ""),
                "sandbox_id": sandbox,
                "target": "",
                "rule": "audit.max_records",
                "reason": reason,
                "count": 0,
                "source": "recorder",
            },
        )
        held["count"] += max(1, int(event.get("count", 1)))
        return Verdict.COUNT

    def flush(self) -> list[dict[str, Any]]:
        """What was counted since the last flush, one record a sandbox and reason."""
        held = list(self._held.values())
        self._held.clear()
        return held

    def _forget(self, sandbox: str) -> None:
        self._written.pop(sandbox, None)
        self._shares.pop(sandbox, None)

    def _make_room(self, table: dict[str, int]) -> None:
        """A client that invents sandboxes must not make this grow without end."""
        if len(table) >= _MAX_SANDBOXES:
            table.pop(next(iter(table)))
