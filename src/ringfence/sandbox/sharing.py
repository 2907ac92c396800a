"""The seam for several agents in one sandbox, beside `protocol`. Its docstrings are the contract;
`ringfence.testing` holds a backend to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from ringfence.sandbox.protocol import Backend, ControlState, Sandbox, SandboxSpec, WaitingSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedSpec(WaitingSpec):
    """One sandbox for several agents, each with a seat of its own. `egress_dir` stays None.

    Attributes:
        seats: how many may be taken at once; `profile.limits` are those of all of them together,
            and each has a share of memory, processes and disk (`seatplan.share`).
    """

    seats: int


class SharedSandbox(Protocol):
    """One boundary, several agents: one set of limits, one network that leads nowhere for each, one
    system inside. Of one tenant, one environment and one set of rules; the caller sees to that.
    """

    @property
    def sandbox_id(self) -> str:
        """The spec's."""
        ...

    @property
    def controls(self) -> Sequence[ControlState]:
        """What is enforced on all of them together, read back from the kernel."""
        ...

    async def seat(self, spec: SandboxSpec) -> Sandbox:
        """A seat: all that the contract says of a sandbox holds for it, and towards the others.

        It has a uid that no other seat has (but where the policy accepts by name that there is
        none), directories, limits and a network of its own. None of its files, processes, sockets
        and descriptors is there for another seat, nor for whoever has it next. `spec.egress_dir`
        is given to its uid alone. `stop` and `close` end the seat and nothing else; one whose
        processes could not be ended is never given to another.

        Raises:
            UnavailableError: `sandbox-start-failed`, also when all are taken.
            CallerError: as `Backend.start`; `internal` for other rules or another claude than the
                sandbox was started with.
        """
        ...

    async def close(self) -> None:
        """End every seat and free everything. Idempotent."""
        ...


@runtime_checkable
class SeatOf(Protocol):
    """A sandbox that is a seat of a shared one."""

    @property
    def within(self) -> str:
        """Id of that."""
        ...


@runtime_checkable
class SharingBackend(Backend, Protocol):
    """A technology in whose sandboxes several agents can be kept apart."""

    async def start_shared(self, spec: SharedSpec) -> SharedSandbox:
        """As `start`, without a workspace and without a program.

        Raises:
            UnavailableError: as `start`; `control-unenforceable` where this host has no uid for
                each, and the policy does not accept that by name (`uid_per_sandbox`).
            CallerError: `profile-path-refused` for a writable path beside the workspace, which all
                would have.
        """
        ...
