"""The contract of a sandbox, one test a clause; every backend passes it unchanged.

Subclass `SandboxContract`, give it a `backend` fixture, and pytest collects the clauses. Every
denial has an allowed twin in the same clause or beside it, so that a place in which nothing works
cannot pass for a safe one. What a backend claims to enforce it is held to; what it does not claim
a policy has to accept by name. A clause that it declares not to hold (`Subset`) must fail. No clause looks for the sandbox's processes on the host.
"""

from __future__ import annotations

from ringfence.sandbox.protocol import Backend, not_held
from ringfence.testing.sandbox_base import shell
from ringfence.testing.sandbox_files import FileClauses
from ringfence.testing.sandbox_running import RunningClauses
from ringfence.testing.sandbox_workspace import WorkspaceClauses

__all__ = ["SandboxContract", "shell"]


class SandboxContract(RunningClauses, FileClauses, WorkspaceClauses):
    """All clauses. Override `backend`."""

    def test_a_declaration_names_clauses(self, backend: Backend) -> None:
        """What a backend says it does not hold is a part of this suite."""
        unknown = [name for name in not_held(backend) if not hasattr(self, f"test_{name}")]
        assert unknown == []
