"""A request can only ever narrow a policy; what it may not ask for is refused before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ringfence.errors import DeniedError, UnavailableError
from ringfence.model import PermissionMode, RunRequest, WorkspaceMode
from ringfence.policy.compile import compile_policy
from ringfence.policy.compiled import CompiledPolicy
from ringfence.policy.load import from_mapping, load_policy
from ringfence.sandbox.registry import Backends
from ringfence.worker.prepare import absent, check, narrowed


def policy(**values: Any) -> CompiledPolicy:
    return compile_policy(from_mapping(values))


def request(place: Path, **values: Any) -> RunRequest:
    return RunRequest(prompt="x", workspace=str(place), **values)


def test_numbers_are_the_smaller_of_the_two(tmp_path: Path) -> None:
    bounded = policy(
        execution={"max_duration_seconds": 100}, model={"max_budget_usd": 5, "max_turns": 10}
    )
    wide = request(tmp_path, timeout_seconds=1000, max_budget_usd=50, max_turns=100)
    assert narrowed(bounded, wide) == bounded
    less = narrowed(bounded, request(tmp_path, timeout_seconds=1, max_budget_usd=0.5, max_turns=1))
    assert less.sandbox.limits.wall_seconds == 1
    assert less.egress.model.max_budget_usd == 0.5
    assert less.tools.max_turns == 1
    unbounded = policy()
    assert narrowed(unbounded, wide).tools.max_turns == 100
    assert narrowed(unbounded, wide).egress.model.max_budget_usd == 50
    assert narrowed(unbounded, request(tmp_path)) == unbounded


@pytest.mark.parametrize(
    ("preset", "permitted"),
    [
        ("strict", {"readonly", "review", "direct"}),
        ("ci", {"readonly", "review"}),
        ("review", {"readonly"}),
        ("developer", {"readonly", "review", "direct"}),
    ],
)
def test_a_workspace_mode_must_be_permitted(
    tmp_path: Path, preset: str, permitted: set[str]
) -> None:
    rules = compile_policy(load_policy(preset=preset))
    for mode in WorkspaceMode:
        asked = request(tmp_path, workspace_mode=mode)
        if mode.value in permitted:
            check(asked, rules, state_dir=tmp_path / "state")
            assert narrowed(rules, asked).sandbox.workspace_mode is mode
            continue
        with pytest.raises(DeniedError) as caught:
            check(asked, narrowed(rules, asked), state_dir=tmp_path / "state")
        assert caught.value.code == "workspace-mode-denied"
        assert mode.value not in caught.value.hint


def test_a_permission_mode_must_be_permitted(tmp_path: Path) -> None:
    rules = compile_policy(load_policy(preset="review"))
    check(
        request(tmp_path, permission_mode=PermissionMode.PLAN),
        rules,
        state_dir=tmp_path / "state",
    )
    with pytest.raises(DeniedError) as caught:
        check(
            request(tmp_path, permission_mode=PermissionMode.AUTO),
            rules,
            state_dir=tmp_path / "state",
        )
    assert caught.value.code == "permission-mode-denied"


def test_another_isolation_than_the_named_one_is_no_substitute() -> None:
    made: list[str] = []

    def factory(name: str) -> Callable[[], Any]:
        return lambda: made.append(name) or name

    known = Backends({name: factory(name) for name in ("bubblewrap", "container")})
    with pytest.raises(UnavailableError) as caught:
        known.get("gvisor")
    assert caught.value.code == "isolation-unavailable"
    assert "gvisor" in caught.value.message
    assert made == []
    assert [known.get("container"), known.get("container")] == ["container", "container"]
    assert made == ["container"], "each is made once, and none that is not asked for"


def test_a_path_that_the_host_lacks_is_named(tmp_path: Path) -> None:
    there, gone = str(tmp_path), str(tmp_path / "gone")
    rules = policy(filesystem={"readable_paths": [there, gone, "/workspace"]})
    assert absent(rules) == (gone,)
