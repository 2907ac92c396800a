"""bubblewrap passes the sandbox contract."""

from __future__ import annotations

from pathlib import Path

import pytest

from backends import needs
from ringfence.errors import UnavailableError
from ringfence.sandbox.bubblewrap import BubblewrapBackend
from ringfence.testing.sandbox_contract import SandboxContract
from ringfence.testing.sandbox_waiting import Attached, WaitingClauses

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


class TestBubblewrapWaiting(WaitingClauses):
    @pytest.fixture
    def waiting(self, tmp_path: Path) -> BubblewrapBackend:
        state = tmp_path / "state"
        state.mkdir(mode=0o700)
        return BubblewrapBackend(state_dir=state)

    @pytest.mark.root
    def test_a_limit_that_was_changed_stops_the_hand_over(
        self, waiting: BubblewrapBackend, place: Path
    ) -> None:
        """The limits are read again; the twin, unchanged, is every other clause."""
        spec = self.spec(waiting, place)

        async def work() -> None:
            async with self.held(waiting, spec) as sandbox:
                groups = sandbox._groups  # type: ignore[attr-defined]
                (pids,) = (path for path in groups.paths if (Path(path) / "pids.max").exists())
                (Path(pids) / "pids.max").write_text("max")
                with pytest.raises(UnavailableError, match=r"pids\.max=max"):
                    await sandbox.attach(spec.workspace)

        self.run(work)


class TestBubblewrapAttached(SandboxContract):
    """Every clause again, of a sandbox whose workspace came late."""

    @pytest.fixture
    def backend(self, tmp_path: Path) -> Attached:
        state = tmp_path / "state"
        state.mkdir(mode=0o700)
        return Attached(BubblewrapBackend(state_dir=state))
