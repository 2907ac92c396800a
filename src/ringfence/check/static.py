"""What can be said without a sandbox: of the policy, and of what is not built yet. PURE."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from ringfence.check.finding import Check, Finding, Line, Outcome, Severity, of_the_checklist
from ringfence.policy.compiled import CompiledPolicy
from ringfence.policy.document import PolicyDocument
from ringfence.policy.lint import CATALOGUE, lint
from ringfence.policy.lint import Severity as LintSeverity
from ringfence.sandbox.protocol import REQUIRED, Control, ControlState

_SEVERITY = {
    LintSeverity.ERROR: Severity.HIGH,
    LintSeverity.WARNING: Severity.MEDIUM,
    LintSeverity.INFO: Severity.LOW,
}
_SECRETS = {"POL007", "POL008", "POL023", "POL032", "POL040"}
_NETWORK = {"POL001", "POL002", "POL003", "POL004", "POL005", "POL006", "POL009", "POL033"}


def policy_checks() -> tuple[Check, ...]:
    """One a lint rule."""
    return tuple(
        Check(
            id=name,
            line=_line(name),
            layer="policy",
            title=title,
            severity=_SEVERITY[severity],
            live=False,
            expect="the policy does not say this",
            mend="`ringfence policy lint` names the line and what to write instead.",
            source="policy lint",
        )
        for name, (severity, title) in CATALOGUE.items()
    )


def _line(name: str) -> Line:
    if name in _SECRETS:
        return Line.SECRETS
    if name == "POL035":
        return Line.RATE
    if name == "POL036":
        return Line.TIMEOUTS
    return Line.NETWORK if name in _NETWORK else Line.ISOLATION


def policy_findings(document: PolicyDocument, *, exists: Callable[[str], bool]) -> list[Finding]:
    """Every lint rule against a policy. What lint calls a fact worth knowing is no failure."""
    said: dict[str, list[str]] = {}
    for finding in lint(document, exists=exists):
        said.setdefault(finding.id, []).append(f"{finding.path}: {finding.message}")
    found = []
    for check in policy_checks():
        lines = said.get(check.id, [])
        fact = CATALOGUE[check.id][0] is LintSeverity.INFO
        outcome = Outcome.FAIL if lines and not fact else Outcome.PASS
        found.append(Finding(check=check, outcome=outcome, evidence="; ".join(lines)))
    return found


_settled = partial(of_the_checklist, "policy")

SESSION_LIMIT = _settled(
    "TMO-01", Line.TIMEOUTS, "A run has a wall-clock limit", "a finite number of seconds",
    "execution.max_execution_time in the policy",
)  # fmt: skip
TOOL_LIMIT = _settled(
    "TMO-02", Line.TIMEOUTS, "A tool call has a limit below the run's", "finite seconds",
    "execution.max_tool_seconds in the policy",
)  # fmt: skip
SPEND = _settled(
    "RATE-01", Line.RATE, "A run has a limit in dollars or requests", "one of the two",
    "model.max_budget_usd in the policy",
)  # fmt: skip
FALLBACK = _settled(
    "DEG-01", Line.DEGRADATION, "The policy names a model to go on with", "a fallback model",
    "model.failover or model.fallback in the policy",
)  # fmt: skip
NOT_BUILT = {
    _settled(
        "EBG-02", Line.ERROR_BUDGET, "A release that spends its error budget is stopped",
        "a rollback", "not built yet",
    ): "releases are not built",
}  # fmt: skip


def feature_checks() -> tuple[Check, ...]:
    """What is read from the compiled policy, and what is not built."""
    return (SESSION_LIMIT, TOOL_LIMIT, SPEND, FALLBACK, *NOT_BUILT)


def feature_findings(policy: CompiledPolicy) -> list[Finding]:
    """Limits of the policy; lines without a feature are not available, never passed."""
    limits, model = policy.sandbox.limits, policy.egress.model
    wall, tool = limits.wall_seconds, limits.tool_seconds
    spend = model.max_budget_usd is not None or model.max_requests is not None
    found = [
        _answer(SESSION_LIMIT, 0 < wall < float("inf"), f"{wall:g} s"),
        _answer(TOOL_LIMIT, 0 < tool <= wall, f"{tool:g} s of {wall:g} s"),
    ]
    if not model.enabled:
        off = "the policy allows no model"
        found += [_absent(SPEND, off), _absent(FALLBACK, off)]
    else:
        how = f"{model.max_budget_usd} dollars, {model.max_requests} requests"
        found.append(_answer(SPEND, True, how) if spend else _absent(SPEND, "none is set (POL035)"))
        others = [leg.model or leg.provider or "" for leg in model.failover]
        fallback = policy.tools.fallback_model or ", ".join(others)
        found.append(
            _answer(FALLBACK, True, fallback)
            if fallback
            else _absent(FALLBACK, "the policy names no other model or provider")
        )
    return found + [_absent(check, why) for check, why in NOT_BUILT.items()]


def _answer(check: Check, good: bool, evidence: str) -> Finding:  # noqa: FBT001
    outcome = Outcome.PASS if good else Outcome.FAIL
    return Finding(check=check, outcome=outcome, evidence=evidence)


def _absent(check: Check, why: str) -> Finding:
    return Finding(check=check, outcome=Outcome.NOT_AVAILABLE, evidence=why)


def control_checks() -> tuple[Check, ...]:
    """One a control of the sandbox protocol."""
    return tuple(_control(control) for control in Control)


def _control(control: Control) -> Check:
    return Check(
        id=f"HOST-{control.value}",
        line=Line.NETWORK if control is Control.NETWORK else Line.ISOLATION,
        layer="host",
        title=f"The host enforces {control.value.replace('_', ' ')}",
        severity=Severity.HIGH if control in REQUIRED else Severity.MEDIUM,
        live=False,
        expect="enforced, as read back from the kernel",
        mend="`ringfence doctor` says what to set or install.",
        source="sandbox protocol, Control",
    )


def control_findings(
    isolation: str, states: Sequence[ControlState], accepted: frozenset[str]
) -> list[Finding]:
    """A control that must hold and does not is a failure, accepted by the policy or not: accepting
    lets a run start and protects nobody. Of the others it is said that they are not there.
    """
    found = []
    by_name = {state.control: state for state in states}
    for control in Control:
        state = by_name.get(control)
        if state is None:
            outcome, evidence = Outcome.NOT_AVAILABLE, f"{isolation} does not speak of it"
        elif state.enforced:
            outcome, evidence = Outcome.PASS, state.how
        else:
            required = control in REQUIRED
            outcome = Outcome.FAIL if required else Outcome.NOT_AVAILABLE
            accepts = "; the policy accepts it" if control.value in accepted else ""
            evidence = f"{state.how}{accepts}. {state.mend}".strip()
        check = _control(control)
        found.append(Finding(check=check, outcome=outcome, evidence=evidence, isolation=isolation))
    return found


def absent_controls(isolation: str, why: str) -> list[Finding]:
    """For a technology that cannot run here: nobody looked."""
    return [
        Finding(check=check, outcome=Outcome.NOT_AVAILABLE, evidence=why, isolation=isolation)
        for check in control_checks()
    ]
