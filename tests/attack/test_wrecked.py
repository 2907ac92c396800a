"""A sandbox that dies in the middle of a check: only what it died of loses its verdict."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fence import PROFILE

from ringfence.check import artefacts
from ringfence.check.finding import Outcome
from ringfence.check.live import Attack
from ringfence.check.probes.definition import Probe, built_in
from ringfence.errors import UnavailableError
from ringfence.sandbox.bubblewrap import BubblewrapBackend


class Fragile(BubblewrapBackend):
    """Each sandbox dies when a program with these words is to run in it."""

    def __init__(self, state: Path, words: str) -> None:
        super().__init__(state_dir=state)
        self.wreckers, self.started, self.died = words, 0, 0

    async def start(self, spec: Any) -> Any:
        self.started += 1
        sandbox = await super().start(spec)
        plain = sandbox.exec

        async def fragile(argv: list[str], **more: Any) -> Any:
            if self.wreckers in " ".join(argv):
                self.died += 1
                await sandbox.stop()
            return await plain(argv, **more)

        sandbox.exec = fragile
        return sandbox


def attacked(probes: list[Probe], words: str) -> tuple[dict[str, Outcome], Fragile]:
    found: list[Any] = []
    backends: list[Fragile] = []

    def make(state: Path) -> Fragile:
        backends.append(Fragile(state, words))
        return backends[-1]

    attack = Attack("bubblewrap", make, PROFILE, probes, found.append)
    asyncio.run(attack.run())
    assert sum(one.died for one in backends) == backends[0].died, "what wrecks is not asked again"
    return {finding.check.id: finding.outcome for finding in found}, backends[0]


def test_a_probe_that_kills_its_sandbox_costs_its_own_verdict_only() -> None:
    inside = [p for p in built_in() if not (p.host or p.residual or p.agent or p.unless)]
    wrecker, *others = [p for p in inside if not (p.alone or p.limits)][:9]
    outcomes, backend = attacked([wrecker, *others], wrecker.command)
    assert outcomes.pop(wrecker.check.id) is Outcome.ERROR
    assert set(outcomes.values()) == {Outcome.PASS}, outcomes
    assert backend.died == 2, "it is tried again in a sandbox of its own"


def test_an_attack_on_limits_that_kills_its_sandbox_costs_its_own_verdict_only() -> None:
    alone = [p for p in built_in() if p.alone and not (p.limits or p.host or p.agent or p.unless)]
    wrecker, *others = alone[:3]
    outcomes, backend = attacked([wrecker, *others], wrecker.command)
    assert outcomes.pop(wrecker.check.id) is Outcome.ERROR
    assert others
    assert set(outcomes.values()) == {Outcome.PASS}, outcomes
    assert backend.died == 2


def test_where_nothing_dies_no_sandbox_is_replaced() -> None:
    inside = [p for p in built_in() if not (p.host or p.residual or p.agent or p.unless)]
    probes = [p for p in inside if not (p.alone or p.limits)][:3]
    outcomes, backend = attacked(probes, "no probe has these words")
    assert set(outcomes.values()) == {Outcome.PASS}, outcomes
    assert (backend.started, backend.died) == (1, 0)


class Slow(BubblewrapBackend):
    """A program with these words has no time, the first `times`; then it runs as any other."""

    def __init__(self, state: Path, words: str, times: int) -> None:
        super().__init__(state_dir=state)
        self.slowed, self.times, self.tried = words, times, 0

    async def start(self, spec: Any) -> Any:
        sandbox = await super().start(spec)
        plain = sandbox.exec

        async def slow(argv: list[str], **more: Any) -> Any:
            if self.slowed in " ".join(argv):
                self.tried += 1
                if self.tried <= self.times:
                    raise TimeoutError
            return await plain(argv, **more)

        sandbox.exec = slow
        return sandbox


@pytest.mark.parametrize("kind", ["shared", "alone", "limits"])
@pytest.mark.parametrize(("times", "outcome"), [(1, Outcome.PASS), (2, Outcome.ERROR)])
def test_a_probe_that_had_no_time_is_asked_once_more(
    kind: str, times: int, outcome: Outcome
) -> None:
    inside = [p for p in built_in() if not (p.host or p.residual or p.agent or p.unless)]
    ways = {
        "shared": lambda p: not (p.alone or p.limits),
        "alone": lambda p: p.alone and not p.limits,
        "limits": lambda p: p.limits,
    }
    probe = next(p for p in inside if ways[kind](p))
    found: list[Any] = []
    backend: list[Slow] = []

    def make(state: Path) -> Slow:
        backend[:] = backend or [Slow(state, probe.command, times)]
        return backend[0]

    asyncio.run(Attack("bubblewrap", make, PROFILE, [probe], found.append).run())
    assert [(one.check.id, one.outcome) for one in found] == [(probe.check.id, outcome)]
    assert backend[0].tried == 2


def test_a_probe_that_failed_is_not_asked_again() -> None:
    inside = [p for p in built_in() if not (p.host or p.residual or p.agent or p.unless)]
    probe = next(p for p in inside if not (p.alone or p.limits))
    worse = replace(probe, command=f"echo ESCAPED {probe.check.id}")
    found: list[Any] = []
    backend: list[Slow] = []

    def make(state: Path) -> Slow:
        backend.append(Slow(state, worse.command, 0))
        return backend[-1]

    asyncio.run(Attack("bubblewrap", make, PROFILE, [worse], found.append).run())
    assert [one.outcome for one in found] == [Outcome.FAIL]
    assert [one.tried for one in backend] == [1]


class Scarce(BubblewrapBackend):
    """One sandbox starts, and those after it are refused so many times."""

    def __init__(self, state: Path, times: int) -> None:
        super().__init__(state_dir=state)
        self.times, self.asked = times, 0

    async def start(self, spec: Any) -> Any:
        self.asked += 1
        if 1 < self.asked <= 1 + self.times:
            raise UnavailableError("host-failed", "no more sandboxes")
        return await super().start(spec)


@pytest.mark.parametrize("kind", ["alone", "limits", "artefacts"])
@pytest.mark.parametrize("refused", [1, 1000])
def test_a_part_whose_sandbox_does_not_start_costs_no_other_part(kind: str, refused: int) -> None:
    probes = [p for p in built_in() if not (p.residual or p.agent or p.unless)]
    ways = {
        "alone": lambda p: p.alone and not (p.limits or p.host),
        "limits": lambda p: p.limits,
        "artefacts": lambda p: p.check.id in artefacts.JUDGES,
    }
    shared = next(p for p in probes if not (p.alone or p.limits or p.host))
    other = next(p for p in probes if ways[kind](p))
    found: list[Any] = []
    backends: list[Scarce] = []

    def make(state: Path) -> Scarce:
        backends[:] = backends or [Scarce(state, refused)]
        return backends[0]

    asyncio.run(Attack("bubblewrap", make, PROFILE, [shared, other], found.append).run())
    outcomes = {one.check.id: one for one in found}
    assert outcomes[shared.check.id].outcome is Outcome.PASS
    told = outcomes[other.check.id]
    assert told.outcome is (Outcome.PASS if refused == 1 else Outcome.ERROR), told
    assert refused == 1 or "no more sandboxes" in told.evidence
