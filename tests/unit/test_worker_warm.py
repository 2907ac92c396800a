"""The warm pool's decisions: which waits for what, how many, how long; and what stands in."""

from __future__ import annotations

import dataclasses
import fcntl
import inspect
import os
import sys
import time
from pathlib import Path
from typing import Any, cast

import pytest
from claude_agent_sdk import ClaudeAgentOptions, HookMatcher, SessionStore

from ringfence import api, wiring
from ringfence.agent.options import build_options
from ringfence.agent.settings import ClaudeSettings
from ringfence.config import WarmSettings, load_config
from ringfence.errors import CallerError
from ringfence.model import PermissionMode, RunRequest
from ringfence.policy.compile import compile_policy
from ringfence.policy.compiled import CompiledPolicy, McpServer
from ringfence.policy.load import from_mapping
from ringfence.worker.egressdir import EgressDirectory, sweep
from ringfence.worker.warm import WarmPool
from ringfence.worker.warmkey import PER_RUN, obstacle, warm_key
from ringfence.worker.warmplace import stand_in
from ringfence.worker.warmplan import Plan, Waiting, Want, plan

POLICY = compile_policy(from_mapping({"preset": "strict"}))
SETTINGS = ClaudeSettings(
    session_id="s", run_id="r", sandbox_id="b", grants=POLICY.tools, mode=PermissionMode.DEFAULT
)


class Nobody:
    calls = None


def options(settings: ClaudeSettings = SETTINGS) -> ClaudeAgentOptions:
    return build_options(settings, Nobody(), cast("SessionStore", None))


def key(**changed: Any) -> str:
    arguments: dict[str, Any] = {
        "options": options(),
        "environment": {"A": "b"},
        "policy": POLICY,
        "isolation": "bubblewrap",
        "claude": "/claude:1",
        "ca_certificate": b"pem",
        "workspace": "plain",
    }
    changed = {"options" if name == "opts" else name: value for name, value in changed.items()}
    given = arguments | changed
    return warm_key(given.pop("options"), **given)


def another(value: Any) -> Any:
    """A value of the same kind that is not the same."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, PermissionMode):
        return next(mode for mode in PermissionMode if mode is not value)
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, dict):
        return {**value, "one more": "x"}
    if isinstance(value, list | tuple):
        return [*value, "one more"]
    if isinstance(value, frozenset):
        return value | {"one more"}
    return None if callable(value) else "something"


def test_the_same_run_has_the_same_key() -> None:
    assert key() == key()
    # nobody's identity is part of it
    assert key(opts=options(dataclasses.replace(SETTINGS, session_id="other"))) == key()


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(ClaudeAgentOptions)])
def test_each_option_makes_another_key(name: str) -> None:
    """All of the SDK's, those that are not in use today and those that it will bring included."""
    changed = options()
    setattr(changed, name, another(getattr(changed, name)))
    assert (key(opts=changed) == key()) == (name in PER_RUN)


def test_hooks_are_told_apart_by_what_is_spawned() -> None:
    def hook(**more: Any) -> str:
        made = options()
        assert made.hooks is not None
        made.hooks["PreToolUse"] = [HookMatcher(hooks=[print], **more)]  # type: ignore[list-item]
        return key(opts=made)

    keys = {hook(), hook(matcher="Bash"), hook(timeout=1.0), hook(on_failure="block")}
    assert len(keys) == 4


@pytest.mark.parametrize(
    "name",
    # a run that defers is never served by one that waited
    sorted(
        {f.name for f in dataclasses.fields(ClaudeSettings)}
        - {"grants", "run_id", "defer", "ask_tools", "custom_tools", "pending_tools"}
        - {"approval_seconds"}
    ),
)
def test_each_setting_makes_another_key_or_is_not_spawned(name: str) -> None:
    changed = dataclasses.replace(SETTINGS, **{name: another(getattr(SETTINGS, name))})
    # ids, clocks that are kept outside, and a trace of one run: what waited for it has none
    outside = {"session_id", "sandbox_id", "tool_seconds", "start_seconds", "trace"}
    assert (key(opts=options(changed)) == key()) == (name in outside)


def _policies() -> dict[str, CompiledPolicy]:
    found = {"digest": dataclasses.replace(POLICY, digest="other")}
    for part in ("sandbox", "tools"):
        value = getattr(POLICY, part)
        for field in dataclasses.fields(value):
            if field.name == "limits":
                continue
            new = dataclasses.replace(value, **{field.name: another(getattr(value, field.name))})
            found[f"{part}.{field.name}"] = dataclasses.replace(POLICY, **{part: new})
    for field in dataclasses.fields(POLICY.sandbox.limits):
        value = getattr(POLICY.sandbox.limits, field.name)
        limits = dataclasses.replace(POLICY.sandbox.limits, **{field.name: another(value)})
        sandbox = dataclasses.replace(POLICY.sandbox, limits=limits)
        found[f"limits.{field.name}"] = dataclasses.replace(POLICY, sandbox=sandbox)
    return found


@pytest.mark.parametrize("name", sorted(_policies()))
def test_each_line_of_the_policy_makes_another_key(name: str) -> None:
    """The time of a run is kept outside, and is the one that does not."""
    assert (key(policy=_policies()[name]) == key()) == (name == "limits.wall_seconds")


@pytest.mark.parametrize(
    "changed",
    [
        {"environment": {"A": "c"}},
        {"isolation": "container"},
        {"claude": "/claude:2"},
        {"ca_certificate": None},
        {"workspace": "git ref: refs/heads/main"},
    ],
)
def test_the_place_makes_another_key(changed: dict[str, Any]) -> None:
    assert key(**changed) != key()


def test_what_has_no_canonical_form_has_no_key() -> None:
    changed = options()
    changed.sandbox = cast("Any", object())
    with pytest.raises(TypeError):
        key(opts=changed)


@pytest.mark.parametrize(
    ("name", "waits"),
    [("bubblewrap", True), ("runtime", False), ("container", False), ("gvisor", False)],
)
def test_only_what_takes_a_workspace_later_waits(tmp_path: Path, name: str, *, waits: bool) -> None:
    """The backend says it; the others start cold. Each that waits is of its own technology."""
    config = load_config({"RINGFENCE_WARM__SIZE": "1", "HOME": "/"})
    backends = wiring.backends(config)
    assert name in backends.names
    pool = WarmPool(config, claude=Path(sys.executable), ca_certificate=None)
    request = RunRequest(prompt="", workspace=str(tmp_path))
    recipe = pool.recipe(POLICY, request, backends.get(name))
    assert (recipe is not None) == waits
    assert recipe is None or recipe.backend.name == name


SERVER = McpServer(name="docs", command=("python3", "/workspace/docs.py"))


@pytest.mark.parametrize(
    ("request_", "tools", "writable", "waits"),
    [
        ({}, {}, (), True),
        ({}, {}, ("/workspace",), True),
        ({"command": ("ls",)}, {}, (), False),
        ({"resume": "id"}, {}, (), False),
        ({"resume": "id", "fork": True}, {}, (), False),
        ({}, {"mcp_servers": (SERVER,)}, (), False),
        ({}, {}, ("/srv/cache",), False),
        ({"defer": True}, {}, (), False),
        ({"ask_tools": ("Bash",)}, {}, (), False),
    ],
)
def test_which_runs_may_wait(
    request_: dict[str, Any], tools: dict[str, Any], writable: tuple[str, ...], *, waits: bool
) -> None:
    policy = dataclasses.replace(
        POLICY,
        tools=dataclasses.replace(POLICY.tools, **tools),
        sandbox=dataclasses.replace(POLICY.sandbox, writable=writable),
    )
    found = obstacle(policy, RunRequest(prompt="", workspace="/w", **request_))
    assert (found is None) == waits


# how many, how long

A, B = Want(key="a", used_at=10.0), Want(key="b", used_at=20.0)


def waiting(*names: str, since: float = 0.0) -> list[Waiting]:
    """`a1` waits for key `a`."""
    return [Waiting(identity=name, key=name[0], since=since) for name in names]


def settings(**more: Any) -> WarmSettings:
    return WarmSettings(**{"size": 2, "max_age_seconds": 100.0, **more})


@pytest.mark.parametrize(
    ("chosen", "wants", "there", "expected"),
    [
        (settings(), [], [], Plan()),
        (settings(), [A], [], Plan(start=("a", "a"))),
        (settings(), [A], waiting("a1"), Plan(start=("a",), again_in=70.0)),
        (settings(), [A], waiting("a1", "a2"), Plan(again_in=70.0)),
        # off: nobody waits, and who does is ended
        (settings(size=0), [A], waiting("a1"), Plan(end=("a1",))),
        # nobody wants it any more
        (settings(), [], waiting("a1"), Plan(end=("a1",))),
        (settings(keys=1), [A, B], waiting("a1"), Plan(end=("a1",), start=("b", "b"))),
        # a size that was made smaller: the latest stay
        (
            settings(size=1),
            [A],
            [*waiting("a1"), *waiting("a2", since=5.0)],
            Plan(end=("a1",), again_in=75.0),
        ),
        # too old, and replaced
        (settings(max_age_seconds=30.0), [A], waiting("a1"), Plan(end=("a1",), start=("a", "a"))),
        (settings(max_age_seconds=30.1), [A], waiting("a1", "a2"), Plan(again_in=0.1)),
        # memory: the latest used comes first, and what is left is for the others
        (settings(memory_mb=768, member_mb=256), [A, B], [], Plan(start=("b", "b", "a"))),
        (settings(memory_mb=255, member_mb=256), [A], [], Plan()),
        (
            settings(memory_mb=512, member_mb=256),
            [A, B],
            waiting("a1", "a2"),
            Plan(end=("a1", "a2"), start=("b", "b")),
        ),
    ],
)
def test_the_plan(
    chosen: WarmSettings, wants: list[Want], there: list[Waiting], expected: Plan
) -> None:
    found = plan(chosen, wants, there, 30.0)
    assert (found.end, found.start) == (expected.end, expected.start)
    assert found.again_in == pytest.approx(expected.again_in)


def test_carrying_a_plan_out_ends_in_no_plan() -> None:
    chosen, there, now = settings(memory_mb=900, member_mb=256), waiting("a1", "c1"), 1.0
    first = plan(chosen, [A, B], there, now)
    there = [one for one in there if one.identity not in first.end]
    there += [
        Waiting(identity=f"{key}+{n}", key=key, since=now) for n, key in enumerate(first.start)
    ]
    last = plan(chosen, [A, B], there, now)
    assert (last.end, last.start) == ((), ())
    assert len(there) == 3


def test_the_operators_settings() -> None:
    environment = {
        "RINGFENCE_WARM__SIZE": "3",
        "RINGFENCE_WARM__MAX_AGE_SECONDS": "60",
        "HOME": "/",
    }
    assert load_config(environment).warm == WarmSettings(size=3, max_age_seconds=60.0)
    assert load_config({"HOME": "/"}).warm.size == 0
    with pytest.raises(CallerError) as caught:
        load_config({"RINGFENCE_WARM__SIZE": "-1", "HOME": "/"})
    assert "RINGFENCE_WARM__SIZE" in (caught.value.hint or "")


# what stands in for a workspace


def _tree(place: Path, head: bytes | None) -> Path:
    if head is not None:
        (place / ".git").mkdir()
        (place / ".git" / "HEAD").write_bytes(head)
    return place


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (None, "plain"),
        (b"ref: refs/heads/main\n", "git ref: refs/heads/main"),
        (b"ref: refs/heads/feature/one-2\n", "git ref: refs/heads/feature/one-2"),
        (b"0123456789" * 4 + b"\n", "git " + "0" * 40),
        (b"ref: refs/heads/../../x\n", None),
        (b"ref: refs/heads/a\nb\n", None),
        (b"ref: refs/heads/" + b"a" * 5000, None),
        (b"", None),
    ],
)
def test_what_stands_in_for_a_tree(tmp_path: Path, head: bytes | None, kind: str | None) -> None:
    found = stand_in(_tree(tmp_path, head), git=True)
    assert (found.kind if found else None) == kind


def test_what_is_no_plain_tree_starts_cold(tmp_path: Path) -> None:
    """A linked working tree, links, a FIFO that nobody writes to: none is followed or waited for."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / ".git").write_text("gitdir: /elsewhere\n")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / ".git").symlink_to("/etc")
    (tmp_path / "c" / ".git").mkdir(parents=True)
    (tmp_path / "c" / ".git" / "HEAD").symlink_to("/etc/passwd")
    (tmp_path / "d" / ".git").mkdir(parents=True)
    os.mkfifo(tmp_path / "d" / ".git" / "HEAD")
    (tmp_path / "e" / ".git").mkdir(parents=True)
    for name in "abcde":
        assert stand_in(tmp_path / name, git=True) is None, name


# what is left of dead workers


def test_a_dead_workers_egress_directory_is_swept_and_a_live_ones_is_not(tmp_path: Path) -> None:
    live = EgressDirectory(tmp_path, "sb_live")
    for name in ("sb_dead", "sb_young"):
        (tmp_path / "egress" / name).mkdir()
    (tmp_path / "egress" / "sb_dead" / "egress.sock").touch()
    old = time.time() - 60
    for name in ("sb_dead", "sb_live"):
        os.utime(tmp_path / "egress" / name, (old, old))
    assert sweep(tmp_path) == 1
    assert {path.name for path in (tmp_path / "egress").iterdir()} == {"sb_live", "sb_young"}
    with live.listen() as listener:
        assert listener.getsockname().endswith("/egress.sock")
    live.remove()
    live.remove()
    assert not live.path.exists()
    assert sweep(tmp_path / "nowhere") == 0


def test_the_lock_is_gone_with_its_directory(tmp_path: Path) -> None:
    one = EgressDirectory(tmp_path, "sb_one")
    descriptor = os.open(one.path, os.O_RDONLY)
    try:
        with pytest.raises(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        one.remove()
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(descriptor)


def test_a_worker_takes_what_a_run_takes() -> None:
    """Both say it once more than needed; this keeps them one."""
    explicit = {
        name: parameter.annotation
        for name, parameter in inspect.signature(api.run).parameters.items()
        if name not in {"prompt", "approver", "on_message"}
    }
    assert explicit == {
        name: hint.__forward_arg__ for name, hint in api.RunOptions.__annotations__.items()
    }
