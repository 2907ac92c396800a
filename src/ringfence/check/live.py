"""Attacks one isolation: few sandboxes, each a lane with canaries, probes side by side."""

from __future__ import annotations

import asyncio
import platform
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ringfence.check import acts, artefacts, hostside
from ringfence.check.finding import Finding, Outcome
from ringfence.check.ground import Ground
from ringfence.check.hostside import Judge, Stage, Verdict
from ringfence.check.judge import judge
from ringfence.check.own import OwnProbes, is_own
from ringfence.check.place import Lane, MakeBackend, Place, run_inside
from ringfence.check.probes.definition import Probe
from ringfence.check.twins import words
from ringfence.errors import RingfenceError, UnavailableError
from ringfence.policy.compiled import Limits, SandboxProfile
from ringfence.sandbox.protocol import Control, ControlState

LANES = 4
_EMULATED_LANES = 2
_GROUP = 4
_LONG = frozenset({"SEC-03", "HTTP-26", "SEC-04", "SEC-15"})
"""Searches of the whole file system, and waits."""
_MANY = 16
"""Probes without a verdict beyond which it is no busy host, and asking again is in vain."""
_SECONDS = 45.0
_SMALL = Limits(memory_mb=256, pids=64, disk_mb=64, cpus=0.5, open_files=256)
"""The limits that limit probes run against."""

Report = Callable[[Finding], None]
_Part = Callable[[Place, Sequence[Probe]], Awaitable[None]]


class Attack:
    """One run of probes against one isolation; findings go out as they come. `declared` are the
    clauses that it says it does not hold (`Subset`): they fail, and the finding says it too.
    """

    def __init__(
        self,
        name: str,
        make_backend: MakeBackend,
        profile: SandboxProfile,
        probes: Iterable[Probe],
        report: Report,
        *,
        claude: Path | None = None,
        declared: Mapping[str, str] | None = None,
    ) -> None:
        self._name, self._make_backend, self._profile = name, make_backend, profile
        self.probes = tuple(probes)
        self._report, self._claude = report, claude
        self._declared = declared or {}
        self._told: set[str] = set()
        self._unclear: dict[Probe, tuple[Verdict, float]] = {}
        self.controls: Sequence[ControlState] = ()
        self.start_seconds: float | None = None

    async def run(self) -> None:
        """Every probe gets a finding, whatever fails on the way: what cannot start is an error of
        each that needed it.
        """
        why = "the check was ended before this probe"
        try:
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._guard(self._main()))
                    group.create_task(self._guard(self._without_egress()))
                    group.create_task(self._guard(self._agent(self._pick(lambda p: p.agent))))
                await self._guard(self._once_more())
            except* RingfenceError as errors:
                why = f"no verdict: {_first(errors)}"
        finally:
            for probe, (verdict, seconds) in self._unclear.items():
                self._tell(probe, verdict, seconds)
            for probe in self.probes:
                self._tell(probe, (Outcome.ERROR, why), 0.0)

    async def _guard(self, work: Any) -> None:
        """A host that refuses something in the middle is an error of what did not run."""
        try:
            await work
        except (OSError, RuntimeError, TimeoutError) as error:
            raise UnavailableError("host-failed", words(error)) from error

    def _settle(self, probe: Probe, verdict: Verdict, seconds: float) -> None:
        """Tell it; what has no verdict is asked once more at the end, what failed is not."""
        if verdict[0] is Outcome.ERROR and probe not in self._unclear:
            self._unclear[probe] = verdict, seconds
        else:
            self._tell(probe, verdict, seconds)

    async def _once_more(self) -> None:
        """What had no verdict, one after the other with nothing beside it: most of them had no time
        on a busy host.
        """
        unclear = list(self._unclear)
        if not unclear or len(unclear) > _MANY:
            return
        await self._agent([probe for probe in unclear if probe.agent])
        bare = [probe for probe in unclear if not probe.agent]
        if not bare:
            return
        async with Place(self._make_backend, self._profile) as place:
            for probe in bare:
                await self._on_its_own(place, probe)

    async def _on_its_own(self, place: Place, probe: Probe) -> None:
        if probe.limits:
            await self._limits(place, [probe])
        elif probe.check.id in hostside.JUDGES:
            await self._judges(place, [probe])
        elif probe.check.id in artefacts.JUDGES:
            await self._artefacts(place, [probe])
        else:
            await self._alone(place, [probe])

    def _tell(self, probe: Probe, verdict: Verdict, seconds: float) -> None:
        if probe.check.id in self._told:
            return
        self._told.add(probe.check.id)
        outcome, evidence = verdict
        if outcome is Outcome.FAIL and probe.clause in self._declared:
            evidence += f"; {self._name} declares it: {self._declared[probe.clause]}"
        self._report(
            Finding(
                check=probe.check,
                outcome=outcome,
                evidence=evidence,
                isolation=self._name,
                seconds=seconds,
            )
        )

    def _pick(self, chosen: Callable[[Probe], bool]) -> list[Probe]:
        return [probe for probe in self.probes if chosen(probe)]

    async def _main(self) -> None:
        self._settle_unasked()
        inside = self._pick(lambda p: not (p.host or p.residual or self._unless(p)))
        shared = [p for p in inside if not (p.alone or p.limits or is_own(p))]
        alone = [p for p in inside if p.alone and not p.limits]
        parts: tuple[tuple[_Part, list[Probe]], ...] = (
            (self._limits, [p for p in inside if p.limits]),
            (self._artefacts, self._pick(lambda p: p.check.id in artefacts.JUDGES)),
            (self._alone, alone),
            (self._judges, self._pick(lambda p: p.check.id in hostside.JUDGES and not p.residual)),
        )
        async with Place(self._make_backend, self._profile) as place:
            began = time.monotonic()
            grounds = [await Ground.open(place)]
            self.start_seconds = time.monotonic() - began
            self.controls = grounds[0].lane.sandbox.controls
            # emulated processors share the host's few: more at once would only wait for each other
            emulated = place.patience > 1
            wanted = min(_EMULATED_LANES if emulated else LANES, 1 + len(shared) // 4)
            grounds += [await Ground.open(place) for _ in range(wanted - 1)]
            queue, turn = _queue(shared), asyncio.Semaphore(1 if emulated else len(parts))
            async with asyncio.TaskGroup() as group:
                for ground in grounds:
                    group.create_task(self._lane(place, ground, queue))
                for part, chosen in parts:
                    group.create_task(self._part(turn, place, part, chosen))
            await self._own(place, [p for p in inside if is_own(p)])
            await self._last(place)

    async def _part(
        self, turn: asyncio.Semaphore, place: Place, part: _Part, probes: Sequence[Probe]
    ) -> None:
        """A part whose sandbox does not start has no verdict, and costs no other part its own."""
        if not probes:
            return
        async with turn:
            try:
                await part(place, probes)
            except RingfenceError as error:
                self._without_verdict(probes, error)

    def _without_verdict(self, probes: Sequence[Probe], error: RingfenceError) -> None:
        for probe in probes:
            if probe.check.id not in self._told and probe not in self._unclear:
                self._settle(probe, (Outcome.ERROR, words(error)), 0.0)

    def _unless(self, probe: Probe) -> str:
        if probe.unless == "tmp_exec" and self._profile.tmp_exec:
            return "the policy lets programs run from /tmp and the home"
        if probe.unless == "guest_root" and self._name in _OWN_MACHINE:
            return "ids inside are those of a kernel of its own"
        if probe.unless == "own_clock" and self._name in _OWN_KERNEL:
            return "a kernel of its own counts processor time as it likes; the host limits it"
        if probe.unless == "other_processor" and platform.machine() != "x86_64":
            # elsewhere they are other calls, or none: refused for that, and not by our filter
            return f"the numbers of its system calls are those of x86_64, not {platform.machine()}"
        return ""

    def _settle_unasked(self) -> None:
        for probe in self.probes:
            reason = probe.residual or self._unless(probe)
            if reason:
                self._tell(probe, (Outcome.NOT_AVAILABLE, reason), 0.0)

    async def _lane(self, place: Place, ground: Ground, queue: asyncio.Queue[list[Probe]]) -> None:
        while not queue.empty():
            probes = queue.get_nowait()
            try:
                await self._in_turn(place, ground, probes)
            except RingfenceError as error:
                # no other sandbox starts in place of one that died: the other lanes go on
                self._without_verdict(probes, error)
                return

    async def _in_turn(self, place: Place, ground: Ground, probes: Sequence[Probe]) -> None:
        tried = ground.lane
        found = await self._group(place, ground, probes)
        for probe, (verdict, seconds) in zip(probes, found, strict=True):
            if verdict[0] is not Outcome.ERROR:
                self._settle(probe, verdict, seconds)
        for probe, (verdict, seconds) in zip(probes, found, strict=True):
            if verdict[0] is not Outcome.ERROR:
                continue
            if await ground.renewed() or ground.lane is not tried:
                [(verdict, seconds)] = await self._group(place, ground, [probe])  # noqa: PLW2901
                self._tell(probe, verdict, seconds)
            else:
                self._settle(probe, verdict, seconds)

    async def _group(
        self, place: Place, ground: Ground, probes: Sequence[Probe]
    ) -> list[tuple[Verdict, float]]:
        """Probes of one twin, one after the other; it runs beside the last of them and counts for
        all, since it began when each had begun.
        """
        ended = [await self._try(place, ground.lane, probe) for probe in probes[:-1]]
        last, wrong = await asyncio.gather(
            self._try(place, ground.lane, probes[-1]), ground.confirm(probes[-1].twin)
        )
        return [
            ((Outcome.ERROR, wrong) if wrong and verdict[0] is Outcome.PASS else verdict, seconds)
            for verdict, seconds in [*ended, last]
        ]

    async def _try(self, place: Place, lane: Lane, probe: Probe) -> tuple[Verdict, float]:
        """One probe without its twin: its verdict, and how long it took."""
        began, before = time.monotonic(), lane.canaries.hits()
        secrets = (place.secret, place.key)
        try:
            patience = _SECONDS * place.patience * (4 if probe.check.id in _LONG else 1)
            saw = await run_inside(
                lane.sandbox,
                probe.command,
                lane.environment(),
                seconds=patience,
                secrets=secrets,
            )
        except Exception as error:  # noqa: BLE001  a probe that breaks costs its own verdict only
            return (Outcome.ERROR, words(error)), time.monotonic() - began
        seconds = time.monotonic() - began
        hits = lane.canaries.hits()[len(before) :]
        verdict = judge(
            probe.command,
            replace(saw, hits=hits),
            secrets,
            believe=not probe.blind,
            must_say=not is_own(probe),
        )
        if probe.check.id in _MAY_DIE and saw.status == _KILLED and verdict[0] is Outcome.ERROR:
            # gVisor's kernel is within the same limit, and dies with what it ran
            verdict = Outcome.PASS, "the limit ended the program and all that was around it"
        return verdict, seconds

    async def _own(self, place: Place, probes: Sequence[Probe]) -> None:
        own = OwnProbes(place, lambda lane, probe: self._try(place, lane, probe))
        for probe in probes:
            verdict, seconds = await own.verdict(probe)
            self._tell(probe, verdict, seconds)

    async def _attack(self, place: Place, ground: Ground, probe: Probe) -> None:
        """A probe that leaves its twin no room: the twin runs after it."""
        verdict, seconds = await self._try(place, ground.lane, probe)
        wrecked = verdict[0] is Outcome.ERROR and await ground.renewed()
        if wrecked:
            verdict, seconds = await self._try(place, ground.lane, probe)
        if verdict[0] is Outcome.PASS:
            if probe.check.id in _MAY_DIE:
                await ground.renewed()
            wrong = await ground.confirm(probe.twin)
            verdict = (Outcome.ERROR, wrong) if wrong else _read_back(probe, ground.lane, verdict)
        (self._tell if wrecked else self._settle)(probe, verdict, seconds)

    async def _limits(self, place: Place, probes: Sequence[Probe]) -> None:
        """The twin is looked for after the attack: beside it, it would meet the same limit."""
        ground = await Ground.open(place, replace(self._profile, limits=_SMALL))
        for probe in probes:
            await self._attack(place, ground, probe)

    async def _alone(self, place: Place, probes: Sequence[Probe]) -> None:
        ground = await Ground.open(place)
        for probe in probes:
            await self._attack(place, ground, probe)

    async def _judges(self, place: Place, probes: Sequence[Probe]) -> None:
        ground = await Ground.open(place)
        stage = Stage(place=place, lane=ground.lane)
        for probe in probes:
            await self._judge(stage, ground, probe, hostside.JUDGES[probe.check.id])

    async def _judge(self, stage: Stage, ground: Ground | None, probe: Probe, look: Judge) -> None:
        began, before = time.monotonic(), stage.lane.canaries.hits()
        try:
            verdict = await look(stage, probe)
        except Exception as error:  # noqa: BLE001  a judge that breaks costs its own verdict only
            verdict = Outcome.ERROR, words(error)
        seconds = time.monotonic() - began
        hits = stage.lane.canaries.hits()[len(before) :]
        if hits:
            verdict = Outcome.FAIL, f"reached on the host: {', '.join(hits)}"
        if ground is not None and verdict[0] is Outcome.PASS:
            wrong = await ground.confirm(probe.twin)
            verdict = (Outcome.ERROR, wrong) if wrong else verdict
        (self._tell if ground is None else self._settle)(probe, verdict, seconds)

    async def _artefacts(self, place: Place, probes: Sequence[Probe]) -> None:
        began = time.monotonic()
        changes, why = await artefacts.collect(place)
        seconds = time.monotonic() - began
        for probe in probes:
            self._tell(probe, artefacts.verdict(probe.check.id, changes, why), seconds)

    async def _last(self, place: Place) -> None:
        by_id = {probe.check.id: probe for probe in self.probes}
        chosen = [(by_id[name], look) for name, look in hostside.LAST.items() if name in by_id]
        if chosen:
            stage = Stage(place=place, lane=await place.lane())
            for probe, look in chosen:
                await self._judge(stage, None, probe, look)

    async def _agent(self, probes: Sequence[Probe]) -> None:
        """A host without claude has no agent to attack: nobody looked."""
        if not probes:
            return
        began = time.monotonic()
        profile = replace(self._profile, isolation=self._name, threat_model=None)
        try:
            verdicts = await acts.verdicts(
                self._make_backend, profile, self._claude, [probe.check.id for probe in probes]
            )
        except RingfenceError as error:
            missing = error.code == "claude-missing"
            verdict = (Outcome.NOT_AVAILABLE if missing else Outcome.ERROR), words(error)
            verdicts = dict.fromkeys((probe.check.id for probe in probes), verdict)
        for probe in probes:
            self._settle(probe, verdicts[probe.check.id], time.monotonic() - began)

    async def _without_egress(self) -> None:
        """In places of their own, because they are broken on purpose."""
        for probe in self._pick(lambda p: p.check.id in hostside.ALONE):
            async with Place(self._make_backend, self._profile) as place:
                stage = Stage(place=place, lane=await place.lane())
                await self._judge(stage, None, probe, hostside.ALONE[probe.check.id])


_OWN_KERNEL = frozenset({"gvisor", "microvm"})
_OWN_MACHINE = frozenset({"microvm"})
_MAY_DIE = frozenset({"LIM-01"})
_KILLED = 128 + 9
_ONLY_A_LIMIT = {"LIM-04": Control.CPU}


def _first(errors: BaseExceptionGroup[BaseException]) -> str:
    """The first of what may be groups in groups: theirs are no words for a person."""
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return words(error)


def _read_back(probe: Probe, lane: Lane, verdict: Verdict) -> Verdict:
    """A busy host gives a program no more than a limit would: what was not used proves a limit
    only where the kernel says that there is one.
    """
    control = _ONLY_A_LIMIT.get(probe.check.id)
    if control is None:
        return verdict
    if any(state.control is control and state.enforced for state in lane.sandbox.controls):
        return verdict
    return (
        Outcome.NOT_AVAILABLE,
        f"{control.value} is not limited, and the host was too busy to tell",
    )


def _queue(probes: Sequence[Probe]) -> asyncio.Queue[list[Probe]]:
    """Groups of one twin each, those that take long first, so that none is waited for alone."""
    groups: list[list[Probe]] = [[probe] for probe in probes if probe.check.id in _LONG]
    unfilled: dict[str, list[Probe]] = {}
    for probe in probes:
        if probe.check.id in _LONG:
            continue
        group = unfilled.get(probe.twin.command)
        if group is None or len(group) == _GROUP:
            group = unfilled[probe.twin.command] = []
            groups.append(group)
        group.append(probe)
    queue: asyncio.Queue[list[Probe]] = asyncio.Queue()
    for group in groups:
        queue.put_nowait(group)
    return queue
