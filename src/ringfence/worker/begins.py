"""What the record says when an attempt begins, and when its sandbox stands. PURE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ringfence.model import RunRequest
from ringfence.policy.compiled import CompiledPolicy, SandboxProfile
from ringfence.record.events import RunStarted, SandboxStarted
from ringfence.sandbox.protocol import Backend, ControlState, Sandbox, not_held
from ringfence.sandbox.sharing import SeatOf


def run_started(
    request: RunRequest,
    policy: CompiledPolicy,
    ids: Mapping[str, str],
    *,
    mode: str,
    prompt_hmac: str,
) -> RunStarted:
    """The record of a run's beginning; `mode`: of permission."""
    return RunStarted(
        **ids,
        kind="command" if request.command else "claude",
        policy_digest=policy.digest,
        role=policy.tools.role,
        permission_mode=mode,
        workspace_mode=policy.sandbox.workspace_mode.value,
        prompt_hmac=prompt_hmac,
        unenforced=sorted(policy.sandbox.accept_unenforced),
        resumed_from=request.resume or "",
    )


def sandbox_started(
    ids: Mapping[str, str],
    backend: Backend,
    rules: SandboxProfile,
    *,
    controls: Sequence[ControlState],
    sandbox: Sandbox | None = None,
    reason: str = "",
    waited_ms: float | None = None,
    seats: int = 0,
) -> SandboxStarted:
    """`sandbox` is the one that serves a run, and None for what several share; `waited_ms` is of
    one that was there before its run.
    """
    return SandboxStarted(
        **ids,
        isolation=backend.name,
        image=rules.image or "",
        reason=reason,
        threat_model=rules.threat_model or "",
        not_held=sorted(not_held(backend)),
        controls={state.control.value: state.enforced for state in controls},
        hidden_files=len(sandbox.hidden) if sandbox is not None else 0,
        warm=waited_ms is not None,
        waited_ms=waited_ms or 0.0,
        within=sandbox.within if isinstance(sandbox, SeatOf) else "",
        seats=seats,
    )
