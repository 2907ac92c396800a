"""What a check is, what it found, and what a process that found it ends with. PURE."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class Outcome(StrEnum):
    """Of one check. Only `pass` says that something holds."""

    PASS = "pass"  # noqa: S105
    FAIL = "fail"
    NOT_AVAILABLE = "not available"
    """Nobody looked: the feature is not built, the technology is not here, no fence stops it."""
    ERROR = "error"
    """It was tried and gave no verdict: a probe broke, or what must work beside it did not."""


class Line(StrEnum):
    """The eight lines of the production checklist."""

    ISOLATION = "container isolation"
    NETWORK = "network allowlist"
    RATE = "rate limiting"
    TIMEOUTS = "timeouts"
    SECRETS = "secrets"
    AUDIT = "audit"
    ERROR_BUDGET = "error budget"
    DEGRADATION = "graceful degradation"


class Kind(StrEnum):
    """Where the answer to a check comes from."""

    STATIC = "static"
    """Read from the policy, the host and versions: what could happen here."""
    PROBE = "probe"
    """Tried in a live sandbox: what did happen."""


class Severity(StrEnum):
    """How bad a failure is, as the probes' authors say it."""

    CRITICAL = "crit"
    HIGH = "high"
    MEDIUM = "med"
    LOW = "low"


SEVERITIES = tuple(Severity)


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One question with a stable id.

    Attributes:
        id: never renamed or reused.
        layer: column of the matrix: `policy`, `host`, `version`, or the part that is attacked.
        live: needs a sandbox. expect: what is seen when it holds. mend: what to do when not.
        source: precedent: a CVE, an advisory, a paper, a requirement.
    """

    id: str
    line: Line
    layer: str
    title: str
    severity: Severity
    live: bool
    expect: str = ""
    mend: str = ""
    source: str = ""

    @property
    def kind(self) -> Kind:
        """Whether a sandbox was attacked for it."""
        return Kind.PROBE if self.live else Kind.STATIC


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """The answer to one check.

    Attributes:
        isolation: technology that was attacked; empty for a static check.
        evidence: what was seen; words from inside a sandbox may be in it, and are not trusted.
        seconds: wall time of the probe, without its twin.
    """

    check: Check
    outcome: Outcome
    evidence: str = ""
    isolation: str = ""
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Shape of a finding in JSON output and in a report."""
        value = asdict(self.check)
        value.pop("live")
        return {
            **value,
            "kind": self.check.kind.value,
            "isolation": self.isolation,
            "outcome": self.outcome.value,
            "evidence": self.evidence,
            "seconds": round(self.seconds, 3),
        }


def of_the_checklist(
    layer: str, name: str, line: Line, title: str, expect: str, mend: str
) -> Check:
    """A part of one of the seed's eight lines that is read from settings, not probed."""
    return Check(
        id=name,
        line=line,
        layer=layer,
        title=title,
        severity=Severity.HIGH,
        live=False,
        expect=expect,
        mend=mend,
        source="seed section 4",
    )


def exit_status(findings: Iterable[Finding]) -> int:
    """1 when anything failed; 4, as the platform's fault, when something gave no verdict or when
    nothing at all was proven; otherwise 0.
    """
    outcomes = {finding.outcome for finding in findings}
    if Outcome.FAIL in outcomes:
        return 1
    if Outcome.ERROR in outcomes or Outcome.PASS not in outcomes:
        return 4
    return 0


def count(findings: Iterable[Finding]) -> dict[str, int]:
    """How many of each outcome."""
    counts = dict.fromkeys((outcome.value for outcome in Outcome), 0)
    for finding in findings:
        counts[finding.outcome.value] += 1
    return counts


def by_kind(findings: Iterable[Finding]) -> dict[str, dict[str, int]]:
    """The same, of the static checks and of the probes each: a hole that the host is known to
    have is not a probe that got out.
    """
    found = list(findings)
    return {kind.value: count(f for f in found if f.check.kind is kind) for kind in Kind}
