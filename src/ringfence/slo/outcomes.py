"""Whose failure is it? What of the runs that have ended counts, and as what.

A run counts once, when its turn is over, however often it was attempted. What the caller took back,
what a rule refused and what a limit of the caller's stopped says nothing of the platform, and is
kept apart. Whatever nobody can explain counts as bad.

Who could lie: an agent can fail on purpose, and say that it has succeeded. It spends, or saves, the
budget of its own environment alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from ringfence.model import RunStatus
from ringfence.slo.budget import Counts
from ringfence.slo.objective import BOUNDS, Objective, Sli


class Verdict(StrEnum):
    """What a run counts as."""

    GOOD = "good"
    BAD = "bad"
    SKIPPED = "not counted"


@dataclass(frozen=True, slots=True)
class Reason:
    """A line of the table."""

    verdict: Verdict
    why: str


_CALLERS = "the caller's own act"
_RULE = "a rule of the operator's, the caller's or the environment's refused it"
_LIMIT = "a limit in money or calls that was set for it stopped it"

CAUSES: Mapping[str, Reason] = MappingProxyType(
    {
        "run-interrupted": Reason(Verdict.SKIPPED, _CALLERS),
        "operator-cancelled": Reason(Verdict.SKIPPED, "the operator took it back"),
        "budget-exhausted": Reason(Verdict.SKIPPED, _LIMIT),
        "turn-limit": Reason(Verdict.SKIPPED, _LIMIT),
        "agent-denied": Reason(Verdict.SKIPPED, _RULE),
        "environment-denied": Reason(Verdict.SKIPPED, _RULE),
        "unrestricted-denied": Reason(Verdict.SKIPPED, _RULE),
        "permission-mode-denied": Reason(Verdict.SKIPPED, _RULE),
        "workspace-mode-denied": Reason(Verdict.SKIPPED, _RULE),
        "isolation-denied": Reason(Verdict.SKIPPED, _RULE),
        "hosting-unsupported": Reason(Verdict.SKIPPED, _RULE),
        "turn-unsupported": Reason(Verdict.SKIPPED, "it asked for what nobody offers"),
        "request-invalid": Reason(Verdict.SKIPPED, "it asked for what nobody offers"),
        "request-too-large": Reason(Verdict.SKIPPED, "it asked for what nobody offers"),
        "file-not-found": Reason(Verdict.SKIPPED, "it names a file that its caller removed"),
        "file-expired": Reason(Verdict.SKIPPED, "it names a file that its caller let expire"),
        "agent-failed": Reason(
            Verdict.BAD, "the agent ran and did not do it: its user has no answer, whoever erred"
        ),
        # a limit, but none of money: were it not counted, whoever makes a program that leaks, and
        # whoever gives too little memory, would never hear of it
        "memory-exhausted": Reason(
            Verdict.BAD, "memory ran out: one that leaks looks like one that was given too little"
        ),
        "run-timeout": Reason(
            Verdict.BAD, "time ran out: one that hangs looks like one that has too much to do"
        ),
        "model-unavailable": Reason(Verdict.BAD, "the model did not answer, however often asked"),
        "dead-letter": Reason(Verdict.BAD, "every attempt failed on its way, or its worker died"),
        "run-lost": Reason(Verdict.BAD, "the queue ended it without its worker"),
    }
)
"""Why a run ended as it did, to what that counts as: codes of errors, and what has none."""

UNKNOWN = Reason(Verdict.BAD, "nobody can explain it")
SUCCEEDED = Reason(Verdict.GOOD, "the turn came to its end, or stopped to ask somebody")
CANCELLED = Reason(Verdict.SKIPPED, _CALLERS)


def reason(status: RunStatus, cause: str) -> Reason:
    """What a run counts as. `cause`: a key of CAUSES, or any other code of an error."""
    if status is RunStatus.SUCCEEDED:
        return SUCCEEDED
    if status is RunStatus.CANCELLED:
        return CANCELLED
    if status is RunStatus.EXPIRED:
        return CAUSES["run-timeout"]
    return CAUSES.get(cause, UNKNOWN)


BAD, SKIPPED, UNTIMED = -1, -2, 0
"""Kinds of counted runs, as they are stored: beside these, 1 and up are good ones by how long they
took, the place in BOUNDS of the first that was not passed, and one more for those beyond all."""


def kind_of(status: RunStatus, cause: str, *, seconds: float, timed: bool) -> int:
    """The kind of a run. `timed`: somebody waits for it; what runs in the background when there is
    room has no time to keep, least of all while it is held back.
    """
    verdict = reason(status, cause).verdict
    if verdict is not Verdict.GOOD:
        return BAD if verdict is Verdict.BAD else SKIPPED
    if not timed:
        return UNTIMED
    # a clock that was set back makes no run end before it began
    return 1 + sum(max(0.0, seconds) > bound for bound in BOUNDS)


def counted(objective: Objective, kinds: Mapping[int, int]) -> Counts:
    """What an objective says of runs by their kinds."""
    good = {kind: runs for kind, runs in kinds.items() if kind >= UNTIMED}
    if objective.sli is Sli.SUCCESS:
        bad = kinds.get(BAD, 0)
        return Counts(sum(good.values()) + bad, bad)
    late = sum(runs for kind, runs in good.items() if kind > 1 + _place(objective.seconds))
    return Counts(sum(runs for kind, runs in good.items() if kind != UNTIMED), late)


def _place(seconds: float) -> int:
    return [float(bound) for bound in BOUNDS].index(float(seconds))


def causes_in_order() -> Sequence[tuple[str, Reason]]:
    """The table for people."""
    return (
        ("succeeded", SUCCEEDED),
        ("cancelled", CANCELLED),
        *sorted(CAUSES.items()),
        ("anything else", UNKNOWN),
    )
