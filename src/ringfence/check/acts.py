"""What a real claude is played through for a check, and who judges which probe of it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from ringfence.check import agent, takenover
from ringfence.check.finding import Outcome
from ringfence.check.hostside import Verdict
from ringfence.check.place import MakeBackend
from ringfence.check.theatre import Theatre, theatre
from ringfence.policy.compiled import SandboxProfile
from ringfence.simulator.script import Scenario

JUDGED = frozenset({*agent.JUDGES, *takenover.JUDGES})
"""Ids of all probes that an agent plays."""


async def verdicts(
    make_backend: MakeBackend, profile: SandboxProfile, claude: Path | None, ids: Sequence[str]
) -> Mapping[str, Verdict]:
    """Of each of these probes.

    Raises:
        UnavailableError: as a run that cannot start; `claude-missing` on a host without one.
    """
    with tempfile.TemporaryDirectory(prefix="ringfence-check-") as name:
        place = Path(name)
        stage = takenover.Stage.new(place)
        scenes = [
            {"match": prompt, "steps": steps} for prompt, steps in takenover.scripts(stage).items()
        ]
        scenario = Scenario.model_validate({"scenes": scenes, "default": agent.STEPS})
        async with theatre(place, make_backend, profile, claude, scenario, takenover.KEY) as on:
            return {**await _hostile(on, ids), **await _taken_over(on, stage, ids)}


async def _hostile(on: Theatre, ids: Sequence[str]) -> dict[str, Verdict]:
    wanted = [name for name in ids if name in agent.JUDGES]
    if not wanted:
        return {}
    played, why = await agent.play(on)
    if played is None:
        return dict.fromkeys(wanted, (Outcome.ERROR, why))
    return {name: agent.JUDGES[name](played) for name in wanted}


async def _taken_over(
    on: Theatre, stage: takenover.Stage, ids: Sequence[str]
) -> dict[str, Verdict]:
    wanted = [name for name in ids if name in takenover.JUDGES]
    if not wanted:
        return {}
    played, why = await takenover.play(on, stage, wanted)
    if why:
        return dict.fromkeys(wanted, (Outcome.ERROR, why))
    return {name: takenover.JUDGES[name](stage, played) for name in wanted}
