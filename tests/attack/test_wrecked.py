"""A sandbox that dies in the middle of a check: only what it died of loses its verdict."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from fence import PROFILE

from ringfence.check.finding import Outcome
from ringfence.check.live import Attack
from ringfence.check.probes.definition import Probe, built_in
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
