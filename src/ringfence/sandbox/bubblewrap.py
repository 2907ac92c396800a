"""The bubblewrap backend: namespaces, a seccomp filter, control groups, and no daemon."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from ringfence.policy.compiled import SandboxProfile
from ringfence.sandbox import hostfacts
from ringfence.sandbox.bwrap_options import enclose_options
from ringfence.sandbox.enforce import STAGED
from ringfence.sandbox.profile import HostFacts, exec_plan, refuse_waiting
from ringfence.sandbox.protocol import WaitingSpec
from ringfence.sandbox.seats import SeatIds, SeatingBackend
from ringfence.sandbox.staged import EnclosedSandbox
from ringfence.sandbox.staging import Program

HOW = STAGED
"""What this backend does for each control."""


class BubblewrapBackend(SeatingBackend):
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

    def seat_ids(self, facts: HostFacts, number: int) -> SeatIds:  # noqa: ARG002
        """See SeatingBackend: bubblewrap maps one id, so that a seat has a host uid of its own, and
        inside it is the 1000 of a user namespace of its own.
        """
        if os.geteuid() != 0:
            return SeatIds(facts)
        lease = hostfacts.lease_uid(self._uids)
        return SeatIds(replace(facts, uid=lease.uid), lease)

    def enclose(self, rules: SandboxProfile, facts: HostFacts, program: Program) -> dict[str, Any]:
        """See EnclosingBackend."""
        options = enclose_options(rules, facts, environment=program.environment, cwd=program.cwd)
        return exec_plan(facts, options, program.argv)
