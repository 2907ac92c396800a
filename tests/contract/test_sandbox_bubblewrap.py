"""bubblewrap passes the sandbox contract."""

from __future__ import annotations

from pathlib import Path

import pytest

from ringfence.sandbox.bubblewrap import BubblewrapBackend
from ringfence.testing.sandbox_contract import SandboxContract


class TestBubblewrap(SandboxContract):
    @pytest.fixture
    def backend(self, tmp_path: Path) -> BubblewrapBackend:
        state = tmp_path / "state"
        state.mkdir(mode=0o700)
        return BubblewrapBackend(state_dir=state)
