"""Before an attempt starts: the request against the policy, and the sandbox's socket."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from ringfence.errors import CallerError, DeniedError
from ringfence.model import RunRequest
from ringfence.policy.compiled import CompiledPolicy


def narrowed(policy: CompiledPolicy, request: RunRequest) -> CompiledPolicy:
    """The policy with what the request asks for: a request can only ever narrow it."""
    limits, model = policy.sandbox.limits, policy.egress.model
    if request.timeout_seconds is not None:
        limits = replace(limits, wall_seconds=min(limits.wall_seconds, request.timeout_seconds))
    if request.max_budget_usd is not None:
        budget = min(request.max_budget_usd, model.max_budget_usd or request.max_budget_usd)
        model = replace(model, max_budget_usd=budget)
    sandbox = replace(policy.sandbox, limits=limits)
    if request.workspace_mode is not None:
        sandbox = replace(sandbox, workspace_mode=request.workspace_mode)
    return replace(policy, sandbox=sandbox, egress=replace(policy.egress, model=model))


def check(request: RunRequest, policy: CompiledPolicy, state_dir: Path) -> None:
    """Refuse what cannot or may not run.

    Raises:
        CallerError: `workspace-missing`, `usage`.
        DeniedError: `permission-mode-denied`, `state-exposed`.
    """
    if not Path(request.workspace).is_dir():
        raise CallerError(
            "workspace-missing", f"{request.workspace} is not a directory that can be read"
        )
    if request.fork and request.resume is None:
        raise CallerError("usage", "only a session that is resumed can be forked")
    mode = request.permission_mode
    if mode is not None and mode not in policy.tools.permission_modes:
        allowed = ", ".join(m.value for m in policy.tools.permission_modes)
        raise DeniedError(
            "permission-mode-denied",
            f"the policy does not permit mode {mode.value}",
            hint=f"it permits: {allowed}",
        )
    profile = policy.sandbox
    refuse_exposed(state_dir, [request.workspace, *profile.readable, *profile.writable])


def refuse_exposed(state_dir: Path, shown: Iterable[str]) -> None:
    """No mount of a sandbox may show the state directory, or lie in it.

    The keys of the vault and of the audit log are there, and every transcript. Directories are
    told apart by device and inode: a link or a bind mount is the same directory by another name.

    Raises:
        DeniedError: `state-exposed`.
    """
    around = _identities(state_dir)
    own = around[0] if around else None
    for path in shown:
        above = _identities(Path(path))
        if above and (above[0] in around or own in above):
            raise DeniedError(
                "state-exposed",
                f"{path} would show the agent ringfence's own state directory, {state_dir}",
                hint="name a directory beside it, or set RINGFENCE_STATE_DIR to one elsewhere",
            )


def _identities(path: Path) -> list[tuple[int, int]]:
    """Device and inode of a path and of all that is above it; empty when it does not exist."""
    place = Path(os.path.realpath(path))  # Path.resolve raises for a loop of links
    try:
        return [(s.st_dev, s.st_ino) for s in (p.stat() for p in (place, *place.parents))]
    except OSError:
        return []


def listen(path: Path) -> socket.socket:
    """A listening unix socket. Bound through the directory's descriptor, because a socket's path
    may have 108 bytes only (unix(7)) and a state directory can be deeper.
    """
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(f"/proc/self/fd/{directory}/{path.name}")
        listener.listen(256)
    except BaseException:
        listener.close()
        raise
    finally:
        os.close(directory)
    return listener
