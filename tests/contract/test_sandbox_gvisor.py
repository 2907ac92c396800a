"""gVisor passes the sandbox contract, started by us and by podman."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from backends import needs
from ringfence.sandbox.gvisor import GvisorBackend
from ringfence.testing.sandbox_contract import SandboxContract

pytestmark = needs("gvisor")


class TestGvisor(SandboxContract):
    shares_a_kernel = False
    engine = "auto"

    @pytest.fixture
    def backend(self, tmp_path: Path) -> GvisorBackend:
        state = tmp_path / "state"
        state.mkdir(mode=0o700)
        return GvisorBackend(state_dir=state, engine=self.engine)


@pytest.mark.skipif(shutil.which("podman") is None, reason="podman is not installed")
class TestGvisorBelowPodman(TestGvisor):
    engine = "podman"
