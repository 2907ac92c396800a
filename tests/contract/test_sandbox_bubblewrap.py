"""bubblewrap passes the sandbox contract."""

from __future__ import annotations

from pathlib import Path

import pytest

from backends import needs
from ringfence.sandbox.bubblewrap import BubblewrapBackend
from ringfence.testing.sandbox_contract import SandboxContract

pytestmark = needs("bubblewrap")


class TestBubblewrap(SandboxContract):
    @pytest.fixture
    def backend(self, tmp_path: Path) -> BubblewrapBackend:
        state = tmp_path / "state"
        state.mkdir(mode=0o700)
        return BubblewrapBackend(state_dir=state)

    @pytest.mark.root
    def test_root_can_freeze(self, backend: BubblewrapBackend, place: Path) -> None:
        async def work() -> None:
            async with self.started(backend, self.spec(backend, place)) as sandbox:
                assert await sandbox.freeze()

        self.run(work)
