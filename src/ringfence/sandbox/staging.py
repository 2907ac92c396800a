"""A technology whose sandboxes are started in a prepared place: what it says of itself, and what it
has ready. How one is started in the place is `staged`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from ringfence.errors import UnavailableError
from ringfence.policy.compiled import Limits, SandboxProfile
from ringfence.sandbox import enforce, profile
from ringfence.sandbox.imageroot import HeldImage, hold
from ringfence.sandbox.launcher import Spare
from ringfence.sandbox.protocol import Control, ControlState, Enforcement


class Program(NamedTuple):
    """What is to run inside. `environment` is all of it."""

    argv: Sequence[str]
    environment: Mapping[str, str]
    cwd: str


class StagedBackend(ABC):
    """`Backend` of the protocol, less what starts a sandbox in the place."""

    words: ClassVar[Mapping[Control, Enforcement]] = enforce.STAGED
    """What it does for each control; `HOW` of its module, which the docs are made of."""
    phases: ClassVar[tuple[str, ...]] = ()
    """Modules beside launch.py that its programs are begun by."""
    by_bubblewrap: ClassVar[bool] = True
    """Whether bubblewrap runs in the place, and has to lie in it."""

    def __init__(
        self, *, state_dir: Path, uid_base: int = 2_000_000, uid_count: int = 65_536
    ) -> None:
        self._state_dir = state_dir
        self._uids = range(uid_base, uid_base + uid_count)
        self._spare = Spare(*self.phases)

    @property
    @abstractmethod
    def name(self) -> str:
        """As a policy names it."""

    @abstractmethod
    def check(self) -> None:
        """Raise UnavailableError `isolation-unavailable` where it cannot run, tried and not
        guessed.
        """

    def place(self, rules: SandboxProfile, facts: profile.HostFacts) -> dict[str, Any]:
        """The plan of launch.py's first phase; what a technology needs beside it is added here."""
        return profile.prepare_plan(rules, facts)

    @property
    def reads_programs(self) -> bool:
        """Whether who encloses opens a program to run it: an execute-only file cannot be then."""
        return False

    @property
    def from_images(self) -> bool:
        """Whether an image can be the system. Where it cannot, a profile that names one is refused
        by `probe`: its agent would find the host's files.
        """
        return False

    @property
    def needed_of_images(self) -> Sequence[str]:
        """Files below an image's root without which no program can be started in it."""
        return ()

    def creators(self, facts: profile.HostFacts) -> list[int]:  # noqa: ARG002
        """Host ids beside the sandbox's own that make files in the workspace's name: they give
        each to its owner at once, and the mount has to know them.
        """
        return []

    def host_limits(self, limits: Limits) -> Limits:
        """What the control groups are set to: who encloses may need room beside the program."""
        return limits

    def probe(self, profile: SandboxProfile) -> Sequence[ControlState]:
        """See the protocol."""
        self.refuse_image(profile)
        self.check()
        return enforce.states(self.words, profile)

    def refuse_image(self, profile: SandboxProfile) -> None:
        """Raise UnavailableError `isolation-unavailable` where an image is asked for in vain."""
        if profile.image is not None and not self.from_images:
            raise UnavailableError(
                "isolation-unavailable",
                f"{self.name} cannot start from an image, and the policy names {profile.image}",
                hint="isolation.backend: bubblewrap, container, gvisor or microvm",
            )

    def hold_image(self, rules: SandboxProfile, name: str) -> HeldImage:
        """The image of a name or digest for a sandbox of these rules; raises as `hold`."""
        needed = self.needed_of_images
        return hold(self._state_dir, name, blocked=rules.blocked, needed=needed)

    def warm(self) -> None:
        """See the protocol."""
        self._spare.keep()

    async def close(self) -> None:
        """See the protocol."""
        await self._spare.close()
