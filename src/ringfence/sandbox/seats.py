"""Several agents in one sandbox: a place that they share, and in it a seat for each.

What is shared: one boundary to this kernel, one lease of host ids, one set of limits for all, the
system inside. What is not: everything an agent writes, reads of its session, or could be reached
by. A seat's programs have a uid, mount, PID, IPC and network namespaces and control groups of their
own, so that each of two locks, the uid and the namespaces, holds without the other.

Who could lie: an agent, to the next in its seat. So nothing of a seat is handed on but its number:
the mounts die with the processes, and a number is given back when nobody is left in its groups.
"""

from __future__ import annotations

import asyncio
import os
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Never

from ringfence.errors import CallerError, UnavailableError
from ringfence.policy.compiled import Limits, SandboxProfile
from ringfence.sandbox import cgroups, enforce, hostfacts
from ringfence.sandbox.launcher import prepare
from ringfence.sandbox.opening import look_at, open_workspace
from ringfence.sandbox.profile import HostFacts
from ringfence.sandbox.protocol import INSIDE_HOME, Control, ControlState, SandboxSpec
from ringfence.sandbox.seatplan import refuse_written, seat_plan, share
from ringfence.sandbox.sharing import SharedSpec
from ringfence.sandbox.staged import EnclosedSandbox, EnclosingBackend
from ringfence.sandbox.undoing import undo


class SeatIds(NamedTuple):
    """The facts with a seat's ids, and the lease of one that was taken for it."""

    facts: HostFacts
    lease: hostfacts.UidLease | None = None


class SeatingBackend(EnclosingBackend):
    """`SharingBackend` of the protocol."""

    @abstractmethod
    def seat_ids(self, facts: HostFacts, number: int) -> SeatIds:
        """The ids of a seat, by its number from 0; an ordinary user's seats have his own.

        Raises:
            UnavailableError: `sandbox-start-failed`.
        """

    async def start_shared(self, spec: SharedSpec) -> SharedPlace:
        """See the protocol."""
        refuse_written(spec.profile)
        if spec.seats > hostfacts.MOST_SEATS:
            # behind those ids nobody has looked for accounts
            raise CallerError("internal", f"{spec.seats} agents are too many for one sandbox")
        states = counted_apart(self.probe(spec.profile))
        enforce.refuse(states, spec.profile)
        refuse_alike(states, spec.profile)
        place = await SharedPlace.start(
            spec, states, self._uids, self._state_dir, self._spare, self
        )
        try:
            await place.ready()
        except BaseException:
            await asyncio.shield(place.close())
            raise
        return place


def counted_apart(states: Sequence[ControlState]) -> list[ControlState]:
    """The states for several agents. Without a control group processes are counted by uid and user
    namespace, and those of an ordinary user's seats together: a storm of one would keep the others
    from starting a program.
    """
    if Control.PIDS in cgroups.discover().parents:
        return list(states)
    return [
        replace(state, enforced=False, how=_TOGETHER, mend=_CGROUP)
        if state.control is Control.PIDS
        else state
        for state in states
    ]


_TOGETHER = "RLIMIT_NPROC, which counts the agents of one uid together"
_CGROUP = "start as root, or delegate a cgroup v2 subtree to this user (systemd: Delegate=yes)"


def refuse_alike(states: Sequence[ControlState], rules: SandboxProfile) -> None:
    """Raise UnavailableError `control-unenforceable` where two agents would have one uid, and the
    policy does not accept that: namespaces alone would stand between them.
    """
    name = Control.UID_PER_SANDBOX
    for state in states:
        if state.control is name and not state.enforced and name not in rules.accept_unenforced:
            raise UnavailableError(
                "control-unenforceable",
                f"agents in one sandbox need a uid each, and this host gives them {state.how}",
                hint=f"{state.mend}; or hosting: ephemeral; or name it in the policy: "
                f"accept_unenforced: [{name}]",
            )


class Seat(EnclosedSandbox):
    """`Sandbox` of the protocol, and `SeatOf`.

    Attributes:
        within: the shared sandbox's id.
        given_back: called once, when nobody is left in it.
    """

    within: str = ""
    given_back: Callable[[], None] | None = None

    async def stop(self) -> None:
        """See the protocol.

        Raises:
            UnavailableError: `sandbox-start-failed` when somebody is left: then it is given to
                nobody.
        """
        await super().stop()
        # its programs are dead with their PID namespaces; whoever is left all the same, by uid
        # and group is the seat's, and must not be there for the next
        if not await asyncio.to_thread(self._groups.end):
            raise UnavailableError(
                "sandbox-start-failed", f"processes of {self.sandbox_id} could not be ended"
            )
        await asyncio.to_thread(self._groups.remove)

    async def close(self) -> None:
        """See the protocol."""
        await super().close()
        given_back, self.given_back = self.given_back, None
        if given_back is not None:
            given_back()


@dataclass(eq=False)
class _Seats:
    """Numbers that are free, and who has the others."""

    free: list[int]
    taken: dict[int, Seat]

    def take(self) -> int:
        if not self.free:
            raise UnavailableError("sandbox-start-failed", "every seat of the sandbox is taken")
        return self.free.pop(0)

    def give_back(self, number: int) -> None:
        self.taken.pop(number, None)
        self.free = sorted([*self.free, number])


class SharedPlace(EnclosedSandbox):
    """`SharedSandbox` of the protocol: no program runs in it but in its seats."""

    _spec: SharedSpec
    _backend: SeatingBackend
    _inner: cgroups.Hierarchy

    def __init__(self, spec: SharedSpec, *rest: Any) -> None:
        super().__init__(spec, *rest)
        self._seats = _Seats(list(range(spec.seats)), {})

    async def ready(self) -> None:
        """Make it fit for seats. Raises UnavailableError `sandbox-start-failed`."""
        self._inner = self._groups.within()
        if self._ready is not None:
            # what prepared the place has no program to become
            launcher, self._ready = self._ready, None
            await launcher.end()

    async def _begin(self, *_: object, **__: object) -> Never:
        raise CallerError("internal", "programs run in the seats of a shared sandbox")

    async def seat(self, spec: SandboxSpec) -> Seat:
        """See the protocol."""
        self._refuse_other(spec)
        self._refuse_stopped()
        number = self._seats.take()
        try:
            seat = await self._seated(spec, number)
        except BaseException:
            # no program was started in it
            self._seats.give_back(number)
            raise
        self._seats.taken[number], seat.within = seat, self.sandbox_id
        seat.given_back = lambda: self._seats.give_back(number)
        try:
            # again: who stopped the others while it was made did not know of it
            self._refuse_stopped()
            files = {f"{INSIDE_HOME}/{k}": v for k, v in (spec.home_files or {}).items()}
            await seat.copy_in(files)
        except BaseException:
            await asyncio.shield(seat.close())
            raise
        return seat

    def _refuse_stopped(self) -> None:
        if self._stopped:
            raise UnavailableError("sandbox-start-failed", "the sandbox is stopped")

    def _refuse_other(self, spec: SandboxSpec) -> None:
        """Never two sets of rules in one sandbox."""
        own = self._spec
        if (_lasting(spec.profile), spec.claude, spec.ca_certificate) != (
            *(_lasting(own.profile), own.claude),
            own.ca_certificate,
        ):
            raise CallerError("internal", "a seat is taken under the rules of its sandbox")

    async def _seated(self, spec: SandboxSpec, number: int) -> Seat:
        limits = share(spec.profile.limits, self._spec.seats)
        spec = replace(spec, profile=replace(spec.profile, limits=limits))
        held = [open_workspace(spec.workspace, spec.state_dir), self._mnt, self._user]
        groups = cgroups.Groups(self._inner, spec.sandbox_id)
        lease = launcher = None
        handles: list[int] = []
        try:
            facts, lease = self._backend.seat_ids(self._facts, number)
            controls = self._limited(groups, limits)
            facts = await asyncio.to_thread(
                look_at, _own(facts, spec), spec.profile, spec.workspace, held[0]
            )
            _give(spec.egress_dir, facts)
            plan: dict[str, Any] = seat_plan(spec.profile, facts)
            plan["creators"] = self._backend.creators(facts)
            launcher = self._spare.take()
            handles = await prepare(launcher, plan, held)
            rest = (launcher, self._spare, handles, self._backend, None)
            return Seat(spec, facts, lease, groups, controls, *rest)
        except BaseException:
            await undo(launcher, handles, groups, lease)
            raise
        finally:
            os.close(held[0])

    def _limited(self, groups: cgroups.Groups, limits: Limits) -> list[ControlState]:
        """The seat's own limits, and those of all once more: what holds one agent off another is
        the sum of both.
        """
        host = self._backend.host_limits
        self._groups.read_back(host(self._spec.profile.limits))
        return enforce.read_back(self._controls, groups.make(host(limits)))

    async def stop(self) -> None:
        """See the protocol."""
        self._stopped = True
        ends = [seat.close() for seat in list(self._seats.taken.values())]
        problems = await asyncio.gather(*ends, return_exceptions=True)
        await super().stop()
        for problem in problems:
            if isinstance(problem, BaseException):
                raise problem


def _lasting(rules: SandboxProfile) -> SandboxProfile:
    """The rules less a run's time, which is kept outside."""
    return replace(rules, limits=replace(rules.limits, wall_seconds=0.0))


def _own(facts: HostFacts, spec: SandboxSpec) -> HostFacts:
    return replace(
        facts,
        egress_dir=str(spec.egress_dir) if spec.egress_dir else None,
        session_files=str(spec.session_files) if spec.session_files else None,
    )


def _give(egress_dir: Path | None, facts: HostFacts) -> None:
    """The way out, to one uid: it may enter, and the directory stays the host's. No other seat has
    it mounted; were it there, it would be shut.
    """
    if egress_dir is not None and facts.as_root:
        os.chown(egress_dir, -1, facts.uid)
        egress_dir.chmod(0o750)
