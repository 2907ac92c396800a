"""Before an attempt starts: the request against the policy, what `claude` is started with, and the
sandbox's socket.
"""

from __future__ import annotations

import json
import math
import os
import re
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path

from ringfence.agent.messages import Notice
from ringfence.agent.pending import CUSTOM_SERVER, Waiting, called, check_answers, custom_names
from ringfence.agent.settings import ClaudeSettings
from ringfence.errors import CallerError, DeniedError
from ringfence.model import RunRequest
from ringfence.policy.compiled import CompiledPolicy, SandboxProfile
from ringfence.policy.isolation import TECHNOLOGIES, enough, floor, strength
from ringfence.sandbox.imageroot import digest_of
from ringfence.sandbox.opening import WORKSPACES
from ringfence.sandbox.protocol import Control, ControlState, Emulating, not_held
from ringfence.sandbox.registry import Backends, Picked

_WORD_MAX = 128 * 1024 - 512  # MAX_ARG_STRLEN, less a name and its end
_START, _EMULATED_START = 60.0, 600.0
"""Seconds until `claude` answers: less than one, and on an idle host fifteen when the processor is
emulated."""
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)


def narrowed(policy: CompiledPolicy, request: RunRequest) -> CompiledPolicy:
    """The policy with what the request asks for: a request can only ever narrow it.

    Modes and the technology are taken as asked: `check` refuses those that the policy does not
    permit.
    """
    limits, model, tools = policy.sandbox.limits, policy.egress.model, policy.tools
    if request.timeout_seconds is not None:
        limits = replace(limits, wall_seconds=min(limits.wall_seconds, request.timeout_seconds))
    if request.max_budget_usd is not None:
        budget = min(request.max_budget_usd, model.max_budget_usd or request.max_budget_usd)
        model = replace(model, max_budget_usd=budget)
    if request.command and request.model and request.model in (model.models or (request.model,)):
        model = replace(model, models=(request.model,))
    if request.max_turns is not None:
        turns = min(request.max_turns, tools.max_turns or request.max_turns)
        tools = replace(tools, max_turns=turns)
    sandbox = replace(policy.sandbox, limits=limits)
    if request.workspace_mode is not None:
        sandbox = replace(sandbox, workspace_mode=request.workspace_mode)
    if request.isolation is not None:
        sandbox = replace(sandbox, isolation=request.isolation)
    custom = tuple(sorted(custom_names(request.custom_tools)))
    if custom:
        # what the caller executes needs no right of the policy's to be offered; a deny still holds
        model = replace(model, tools=(*model.tools, *custom))
        tools = replace(
            tools,
            offered=(*tools.offered, *custom),
            preapproved=(*tools.preapproved, *custom),
        )
    egress = replace(policy.egress, model=model)
    return replace(policy, sandbox=sandbox, egress=egress, tools=tools)


def pinned(policy: CompiledPolicy, state_dir: Path) -> CompiledPolicy:
    """The policy with the digest of its image: a name may stand for another before the run ends.

    Raises:
        CallerError: `image-unknown`.
        UnavailableError: `image-damaged`.
    """
    if policy.sandbox.image is None:
        return policy
    digest = digest_of(state_dir, policy.sandbox.image)
    return replace(policy, sandbox=replace(policy.sandbox, image=digest))


def claude_settings(
    policy: CompiledPolicy, request: RunRequest, *, session_id: str, run_id: str, sandbox_id: str
) -> ClaudeSettings:
    """What is fixed when `claude` starts; of a narrowed policy."""
    return ClaudeSettings(
        session_id=session_id,
        run_id=run_id,
        sandbox_id=sandbox_id,
        grants=policy.tools,
        mode=request.permission_mode or policy.tools.permission_mode,
        # a policy that names models offers its first; the CLI's own default may not be one
        model=request.model or next(iter(policy.egress.model.models), None),
        fallback_model=request.fallback_model or policy.tools.fallback_model,
        system_prompt=request.system_prompt,
        max_turns=policy.tools.max_turns,
        max_budget_usd=policy.egress.model.max_budget_usd,
        tool_seconds=policy.sandbox.limits.tool_seconds,
        start_seconds=_EMULATED_START if policy.sandbox.emulation else _START,
        resume=request.resume is not None,
        effort=request.effort,
        defer=request.defer,
        ask_tools=request.ask_tools,
        custom_tools=request.custom_tools,
        approval_seconds=request.approval_seconds,
        pending_tools=tuple(called(call) for call in request.pending),
    )


def check(request: RunRequest, policy: CompiledPolicy, *, state_dir: Path) -> None:
    """Refuse what cannot or may not run.

    Args:
        request: what is asked for.
        policy: the policy, narrowed or not.
        state_dir: where ringfence keeps its own.

    Raises:
        CallerError: `workspace-missing`, `usage`, `answer-refused`.
        DeniedError: `permission-mode-denied`, `workspace-mode-denied`, `isolation-denied`,
            `state-exposed`.
    """
    _check_words(request)
    _check_limits(request)
    _check_deferred(request, policy)
    if not Path(request.workspace).is_dir():
        raise CallerError(
            "workspace-missing", f"{request.workspace} is not a directory that can be read"
        )
    if request.fork and request.resume is None:
        raise CallerError("usage", "only a session that is resumed can be forked")
    mode, modes = request.permission_mode, policy.tools.permission_modes
    _check_permitted("permission-mode-denied", mode, modes)
    view, views = request.workspace_mode, policy.sandbox.workspace_modes
    _check_permitted("workspace-mode-denied", view, views)
    profile = policy.sandbox
    _check_isolation(request.isolation, profile)
    own = [] if of_a_session(state_dir, request.workspace) else [request.workspace]
    refuse_exposed(state_dir, [*own, *profile.readable, *profile.writable])


def prompt_bytes(request: RunRequest) -> bytes:
    """The user's turn as the audit log has it hashed: whatever of it the agent is told."""
    if not request.content:
        return request.prompt.encode("utf-8", "replace")
    return json.dumps([dict(block) for block in request.content], sort_keys=True).encode()


def _check_limits(request: RunRequest) -> None:
    for name, limit in (
        ("timeout", request.timeout_seconds),
        ("budget", request.max_budget_usd),
        ("number of turns", request.max_turns),
        ("time for an approval", request.approval_seconds),
    ):
        if limit is not None and not 0 < limit < math.inf:
            raise CallerError("usage", f"a {name} is a number above 0, not {limit}")


def _check_deferred(request: RunRequest, policy: CompiledPolicy) -> None:
    """Calls that wait belong to a session that waits.

    Raises:
        CallerError: `usage`, `answer-refused`, `answer-missing`.
    """
    names = custom_names(request.custom_tools)
    if len(names) < len(request.custom_tools):
        raise CallerError("usage", "two custom tools have one name")
    if names and not request.defer:
        raise CallerError("usage", "a custom tool is executed by a caller who answers later: defer")
    if request.defer and request.command:
        raise CallerError("usage", "a command asks nobody, so nothing of it can be deferred")
    if names and any(server.name == CUSTOM_SERVER for server in policy.tools.mcp_servers):
        raise CallerError("usage", f"no MCP server can be named {CUSTOM_SERVER!r}")
    if request.pending and (request.resume is None or request.fork or not request.defer):
        raise CallerError("usage", "pending calls are those of a session that is resumed, to defer")
    check_answers(request.pending, request.answers)
    Waiting(pending=request.pending, answers=request.answers, now=time.time()).check()


def _check_permitted(code: str, asked: StrEnum | None, permitted: Iterable[StrEnum]) -> None:
    allowed = [mode.value for mode in permitted]
    if asked is not None and asked.value not in allowed:
        raise DeniedError(
            code,
            f"the policy does not permit {' '.join(code.split('-')[:2])} {asked.value}",
            hint=f"it permits: {', '.join(allowed)}",
        )


def _check_isolation(asked: str | None, profile: SandboxProfile) -> None:
    if asked is None:
        return
    if asked not in TECHNOLOGIES:
        raise CallerError("usage", f"there is no isolation {asked!r}: {', '.join(TECHNOLOGIES)}")
    if strength(asked) < _floor(profile):
        raise _weaker(f"isolation {asked} is", asked, profile)


def pick(
    backends: Backends, profile: SandboxProfile, *, asked: str | None, stated: SandboxProfile
) -> Picked:
    """The technology of a narrowed policy, as strong on this very host as the stated one asks for.

    Raises:
        DeniedError: `isolation-denied`.
        UnavailableError: `isolation-unavailable`.
    """
    picked = backends.pick(profile)
    refuse_emulated(asked, picked, stated)
    return picked


def refuse_emulated(asked: str | None, picked: Picked, profile: SandboxProfile) -> None:
    """A machine that this host emulates is weaker than `check` could know, which looks at names.

    A policy's own choice is not judged here: its backend starts an emulated machine only where the
    policy allows one.

    Args:
        asked: what the request names.
        picked: its backend.
        profile: the policy's own, not narrowed.

    Raises:
        DeniedError: `isolation-denied`.
    """
    backend = picked.backend
    if asked is None or asked == profile.isolation:
        return
    emulated = isinstance(backend, Emulating) and backend.emulated
    if emulated and strength(asked, emulated=True) < _floor(profile):
        raise _weaker(f"isolation {asked} is emulated on this host, and so", asked, profile)


def _floor(profile: SandboxProfile) -> int:
    return floor(profile.isolation, profile.threat_model, emulation=profile.emulation)


def _weaker(what: str, asked: str, profile: SandboxProfile) -> DeniedError:
    permitted = [one for one in TECHNOLOGIES if one != asked and strength(one) >= _floor(profile)]
    why = profile.isolation
    if why == "auto":
        why = f"what threat model {profile.threat_model} asks for"
    return DeniedError(
        "isolation-denied",
        f"{what} weaker than {why}",
        hint=f"the policy permits: {', '.join(permitted)}" if permitted else "",
    )


def start_notices(picked: Picked, profile: SandboxProfile) -> list[Notice]:
    """What a person has to know about the technology before anything runs in it."""
    backend, notices = picked.backend, []
    if picked.reason:
        notices.append(Notice(kind="isolation", text=f"isolation: {picked.reason}"))
    emulated = isinstance(backend, Emulating) and backend.emulated
    if profile.threat_model and not enough(backend.name, profile.threat_model, emulated=emulated):
        text = f"isolation {backend.name} is weaker than threat model {profile.threat_model} asks"
        notices.append(Notice(kind="isolation-weak", text=f"{text} for; the policy names it"))
    if missing := not_held(backend):
        clauses = "; ".join(f"{name.replace('_', ' ')} ({what})" for name, what in missing.items())
        text = f"isolation {backend.name} holds a part of the sandbox contract only, not: {clauses}"
        notices.append(Notice(kind="not-held", text=text))
    return notices


def unenforced(controls: Iterable[ControlState]) -> tuple[str, ...]:
    """What this host does not hold of a sandbox, and a person should know."""
    return tuple(
        state.control.value
        for state in controls
        if not state.enforced and state.control is not Control.UID_PER_SANDBOX
    )


def started_notices(policy: CompiledPolicy, missing: Sequence[str]) -> list[Notice]:
    """And about the sandbox that stands; `missing` as `unenforced` has it."""
    texts = [f"{path} cannot be found on this host: left out" for path in absent(policy)]
    notices = [Notice(kind="absent", text=text) for text in texts]
    if missing:
        text = f"not enforced on this host: {', '.join(missing)}"
        notices.append(Notice(kind="unenforced", text=text))
    return notices


def absent(policy: CompiledPolicy) -> tuple[str, ...]:
    """Host paths that the policy shows and that this host does not have: a finding, not a fault."""
    profile = policy.sandbox
    shown = (*profile.readable, *profile.writable)
    # pathlib's raises for a path below a directory that this user may not enter
    return tuple(path for path in shown if not os.path.exists(path))  # noqa: PTH110


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


def of_a_session(state_dir: Path, workspace: str) -> bool:
    """Whether it lies just below the one place in the state directory that is made to be worked
    in. Only a workspace may: a policy's path that names one would show a session to others.
    """
    sessions = _identities(state_dir / WORKSPACES)[:1]
    return bool(sessions) and _identities(Path(workspace))[1:2] == sessions


def _identities(path: Path) -> list[tuple[int, int]]:
    """Device and inode of a path and of all that is above it; empty when it does not exist."""
    place = Path(os.path.realpath(path))  # Path.resolve raises for a loop of links
    try:
        return [(s.st_dev, s.st_ino) for s in (p.stat() for p in (place, *place.parents))]
    except OSError:
        return []


def _check_words(request: RunRequest) -> None:
    """What becomes an argument or a variable of a process: without NUL, not too long (execve(2)),
    and a variable has a name. A prompt of `claude` goes through its standard input.
    """
    words = [*request.command, *(value for _, value in request.environment)]
    if request.command:
        words.append(request.prompt)
    else:
        words += [request.system_prompt or "", request.model or "", request.fallback_model or ""]
        if request.environment:
            raise CallerError("usage", "an environment belongs to a command, and there is none")
    for name, _ in request.environment:
        if not _VARIABLE.fullmatch(name):
            raise CallerError("usage", f"{name!r} cannot be the name of a variable")
    if any("\0" in word for word in (*words, request.prompt)):
        raise CallerError("usage", "a prompt, argument or variable holds a NUL character")
    if any(len(os.fsencode(word)) > _WORD_MAX for word in words):
        raise CallerError(
            "usage",
            f"an argument or variable is longer than {_WORD_MAX} bytes, which no program can get",
            hint="put it into a file of the workspace",
        )


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
