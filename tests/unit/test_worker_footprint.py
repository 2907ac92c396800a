"""What one more sandbox is counted with, and what a host has left for it."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringfence.sandbox.cgroups import memory_left, working_set
from ringfence.sandbox.resident import resident
from ringfence.worker.footprint import FEW, FLOOR_MB, MEMBER_MB, QUANTILE, WINDOW, member_mb
from ringfence.worker.memory import RESERVE_MB, Memory, owed_mb

samples = st.lists(st.floats(1, 1e5), max_size=200)


def test_the_constant_stands_until_something_is_measured() -> None:
    assert member_mb(()) == MEMBER_MB
    assert member_mb([float("nan"), float("inf")]) == MEMBER_MB
    # one small sandbox proves nothing, and many do
    assert member_mb([200.0]) == MEMBER_MB
    assert member_mb([200.0] * WINDOW) == 200
    assert member_mb([900.0] * FEW) == 900


@given(samples)
def test_it_is_never_below_the_floor_nor_above_what_was_seen(them: list[float]) -> None:
    found = member_mb(them)
    assert FLOOR_MB <= found <= max([FLOOR_MB, MEMBER_MB, *them]) + 1


@given(st.lists(st.floats(1, 1e5), min_size=FEW, max_size=WINDOW))
def test_most_of_what_was_seen_fits_and_order_is_nothing(them: list[float]) -> None:
    found = member_mb(them)
    assert sum(one <= found for one in them) >= QUANTILE * len(them)
    assert member_mb(sorted(them)) == member_mb(them) == member_mb(sorted(them, reverse=True))


@given(samples, st.integers(0, 199), st.floats(0, 1e5))
def test_who_takes_more_never_makes_it_less(them: list[float], at: int, more: float) -> None:
    grown = [one + more if number == at else one for number, one in enumerate(them)]
    assert member_mb(grown) >= member_mb(them)


@given(st.lists(st.floats(1, 1000), min_size=WINDOW, max_size=WINDOW))
def test_one_agent_alone_cannot_make_it_what_it_likes(them: list[float]) -> None:
    """It holds one sample of many: neither a giant nor a dwarf moves it past its neighbours."""
    ordered = sorted(them)
    for lie in (1e9, 0.1):
        told = member_mb([*them[1:], lie])
        assert told <= max(FLOOR_MB, ordered[-1] + 1)
        assert told >= FLOOR_MB


class Growing:
    """A sandbox whose account the test writes."""

    def __init__(self, *values: int) -> None:
        self._values = list(values)

    def memory(self) -> int | None:
        return self._values.pop(0) if self._values else 0

    def memory_kills(self) -> int | None:
        return 0


async def test_the_highest_use_of_each_is_a_sample_and_outlives_the_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ringfence.worker.memory._LOOK_SECONDS", 0.01)
    memory = Memory(tmp_path / "kept.json")
    async with memory.metering(cast("Any", Growing(100 << 20, 700 << 20, 300 << 20))):
        await asyncio.sleep(0.3)
    # what nobody counts is no sample
    async with memory.metering(cast("Any", Growing())):
        await asyncio.sleep(0.05)
    async with memory.metering(cast("Any", object())):
        pass
    assert memory.measured == 1
    assert json.loads((tmp_path / "kept.json").read_text()) == [700.0]
    later = Memory(tmp_path / "kept.json")
    assert (later.measured, later.member_mb) == (1, memory.member_mb)
    for damaged in ("{", "{}", '["x", true, -1, 1e999]'):
        (tmp_path / "kept.json").write_text(damaged)
        assert Memory(tmp_path / "kept.json").measured == 0


async def test_a_sandbox_that_was_just_started_has_its_room_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two leases in one moment see the same free memory: the second waits for the first to grow."""
    monkeypatch.setattr("ringfence.worker.memory._LOOK_SECONDS", 0.01)
    available = RESERVE_MB + 500
    memory = Memory(
        start=300, read=lambda: f"MemAvailable: {available << 10} kB\n", left=lambda: None
    )
    assert memory.wait() == 0.0
    async with memory.metering(cast("Any", Growing())):
        assert memory.wait() > 0
    assert memory.wait() == 0.0
    async with memory.metering(cast("Any", Growing(290 << 20))):
        await asyncio.sleep(0.2)
        assert memory.wait() == 0.0


@given(st.lists(st.integers(0, 1 << 33), max_size=20), st.integers(1, 5000))
def test_what_is_owed_is_never_more_than_all_of_it(used: list[int], member: int) -> None:
    assert 0 <= owed_mb(used, member) <= member * len(used)
    assert owed_mb([*used, member << 20], member) == owed_mb(used, member)


STAT = "cache 10\ninactive_file 1\ntotal_inactive_file 50\n"


def group(path: Path, used: int, limit: str, *, unified: bool) -> None:
    path.mkdir(parents=True, exist_ok=True)
    names = (
        ("memory.current", "memory.max")
        if unified
        else ("memory.usage_in_bytes", "memory.limit_in_bytes")
    )
    for name, value in zip(names, (str(used), limit), strict=True):
        (path / name).write_text(f"{value}\n")
    (path / "memory.stat").write_text("inactive_file 50\n" if unified else STAT)


def test_the_tightest_limit_above_the_worker_counts(tmp_path: Path) -> None:
    one = tmp_path / "memory"
    own = "3:cpuset:/\n2:memory:/a/b\n0::/\n"
    group(one, 500, str(1 << 63), unified=False)
    assert memory_left(tmp_path, own) is None
    group(one / "a", 400, "1000", unified=False)
    group(one / "a" / "b", 100, str(1 << 63), unified=False)
    assert working_set(one / "a") == 350
    assert memory_left(tmp_path, own) == 650
    group(one / "a" / "b", 100, "200", unified=False)
    assert memory_left(tmp_path, own) == 150
    # a path of another namespace's view: ours begins at the top
    assert memory_left(tmp_path, "2:memory:/../../x\n") is None
    group(one / "a" / "b", 900, "200", unified=False)
    assert memory_left(tmp_path, own) == 0


def test_the_tightest_limit_of_version_2(tmp_path: Path) -> None:
    (tmp_path / "cgroup.controllers").write_text("memory\n")
    group(tmp_path, 500, "max", unified=True)
    assert memory_left(tmp_path, "0::/\n") is None
    group(tmp_path / "a", 400, "1000", unified=True)
    assert memory_left(tmp_path, "0::/a\n") == 650


def test_without_groups_the_processes_are_counted() -> None:
    own = resident([os.getpid()])
    assert own > 1 << 20
    assert resident([os.getpid(), os.getpid()]) == pytest.approx(own, rel=0.2)
    assert resident([1 << 30]) == 0
