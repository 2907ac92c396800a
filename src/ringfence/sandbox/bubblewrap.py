"""The bubblewrap backend: namespaces, a seccomp filter, control groups, and no daemon."""

from __future__ import annotations

from typing import Any

from ringfence.policy.compiled import SandboxProfile
from ringfence.sandbox import hostfacts
from ringfence.sandbox.enforce import STAGED
from ringfence.sandbox.profile import HostFacts, enclose_options, exec_plan, refuse_waiting
from ringfence.sandbox.protocol import WaitingSpec
from ringfence.sandbox.staged import EnclosedSandbox, EnclosingBackend, Program

HOW = STAGED
"""What this backend does for each control."""


class BubblewrapBackend(EnclosingBackend):
    """`WaitingBackend` of the protocol: what is mounted on a shared mount of the place appears in
    bubblewrap's own namespaces, which an OCI runtime and a kernel in user space do not follow.
    """

    words = HOW

    @property
    def name(self) -> str:
        """See the protocol."""
        return "bubblewrap"

    @property
    def from_images(self) -> bool:
        """See StagedBackend."""
        return True

    def check(self) -> None:
        """See StagedBackend."""
        hostfacts.check_user_namespaces()

    async def start_waiting(self, spec: WaitingSpec) -> EnclosedSandbox:
        """See the protocol."""
        refuse_waiting(spec.profile)
        return await self._start(spec)

    def enclose(self, rules: SandboxProfile, facts: HostFacts, program: Program) -> dict[str, Any]:
        """See EnclosingBackend."""
        options = enclose_options(rules, facts, environment=program.environment, cwd=program.cwd)
        return exec_plan(facts, options, program.argv)
