"""gVisor passes the sandbox contract."""

from __future__ import annotations

from pathlib import Path

import pytest

from backends import needs
from ringfence.sandbox.gvisor import GvisorBackend
from ringfence.testing.sandbox_contract import SandboxContract

pytestmark = needs("gvisor")


class TestGvisor(SandboxContract):
    shares_a_kernel = False

    @pytest.fixture
    def backend(self, tmp_path: Path) -> GvisorBackend:
        state = tmp_path / "state"
        state.mkdir(mode=0o700)
        return GvisorBackend(state_dir=state)
