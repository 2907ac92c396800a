"""Whether the sources of secrets give what the settings name: asked before the first run is."""

from __future__ import annotations

from ringfence.check.finding import Check, Finding, Line, Outcome, Severity
from ringfence.config import Config
from ringfence.egress.sources import SourceState, look
from ringfence.worker.launch import logins

SOURCES = Check(
    id="SRC-01",
    line=Line.SECRETS,
    layer="host",
    title="Every credential of the settings has a value in its source, and every login works",
    severity=Severity.HIGH,
    live=False,
    expect="a version from each source",
    mend="`ringfence vault sources check` says what each source answers.",
    source="requirement L",
)


def checks() -> tuple[Check, ...]:
    """The one there is."""
    return (SOURCES,)


async def findings(config: Config) -> list[Finding]:
    """Every source, asked now; no value is told."""
    return [judge(await look(config.secrets, config.state_dir, logins(config)))]


def _said(state: SourceState) -> str:
    """With its mend: it differs from source to source, and the check's own is that of all."""
    mend = f" ({state.hint})" if state.hint else ""
    return f"{state.name}: {state.code}, {state.message}{mend}"


def judge(states: list[SourceState]) -> Finding:
    """Of what the sources said."""
    if not states:
        why = "the settings place no credential in a source"
        return Finding(check=SOURCES, outcome=Outcome.NOT_AVAILABLE, evidence=why)
    bad = [_said(one) for one in states if not one.good]
    outcome = Outcome.FAIL if bad else Outcome.PASS
    good = f"{len(states)} credentials, each with a version"
    return Finding(check=SOURCES, outcome=outcome, evidence="; ".join(bad) or good)
