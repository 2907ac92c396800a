"""The bubblewrap backend: namespaces, a seccomp filter, control groups, and no daemon."""

from __future__ import annotations

from typing import Any

from ringfence.policy.compiled import SandboxProfile
from ringfence.sandbox import hostfacts
from ringfence.sandbox.enforce import STAGED
from ringfence.sandbox.profile import HostFacts, enclose_options, exec_plan
from ringfence.sandbox.staged import Program, StagedBackend

HOW = STAGED
"""What this backend does for each control."""


class BubblewrapBackend(StagedBackend):
    """`Backend` of the protocol."""

    words = HOW

    @property
    def name(self) -> str:
        """See the protocol."""
        return "bubblewrap"

    def check(self) -> None:
        """See StagedBackend."""
        hostfacts.check_user_namespaces()

    def enclose(self, rules: SandboxProfile, facts: HostFacts, program: Program) -> dict[str, Any]:
        """See StagedBackend."""
        options = enclose_options(rules, facts, environment=program.environment, cwd=program.cwd)
        return exec_plan(facts, options, program.argv)
