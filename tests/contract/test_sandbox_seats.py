"""Several agents in one sandbox: the clauses of seats, and the whole contract of a single seat."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from backends import needs
from ringfence.policy.isolation import SEATS
from ringfence.sandbox.bubblewrap import BubblewrapBackend
from ringfence.sandbox.container import ContainerBackend
from ringfence.sandbox.sharing import SharingBackend
from ringfence.testing.sandbox_contract import SandboxContract
from ringfence.testing.sandbox_seats import SeatClauses, Seated
from ringfence.wiring import technologies


def container(engine: str, tmp_path: Path) -> ContainerBackend:
    if shutil.which(engine, path="/usr/sbin:/usr/bin") is None:
        pytest.skip(f"{engine} is not installed: apt-get install {engine}")
    if engine == "runc" and os.geteuid() != 0:
        pytest.skip("runc wants ids of its own: an ordinary user has crun")
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    return ContainerBackend(state_dir=state, engine=engine)


class TestRunc(SeatClauses):
    @pytest.fixture
    def sharing(self, tmp_path: Path) -> SharingBackend:
        return container("runc", tmp_path)


@pytest.mark.storm
class TestCrun(SeatClauses):
    @pytest.fixture
    def sharing(self, tmp_path: Path) -> SharingBackend:
        return container("crun", tmp_path)


@pytest.mark.storm
class TestPodman(SeatClauses):
    @pytest.fixture
    def sharing(self, tmp_path: Path) -> SharingBackend:
        return container("podman", tmp_path)


@pytest.mark.storm
@needs("bubblewrap")
class TestBubblewrap(SeatClauses):
    @pytest.fixture
    def sharing(self, tmp_path: Path) -> SharingBackend:
        state = tmp_path / "state"
        state.mkdir(mode=0o700)
        return BubblewrapBackend(state_dir=state)


@pytest.mark.storm
class TestRuncAlone(SandboxContract):
    """Every clause again, of a seat."""

    @pytest.fixture
    def backend(self, tmp_path: Path) -> Seated:
        return Seated(container("runc", tmp_path))


@pytest.mark.storm
@needs("bubblewrap")
class TestBubblewrapAlone(SandboxContract):
    @pytest.fixture
    def backend(self, tmp_path: Path) -> Seated:
        state = tmp_path / "state"
        state.mkdir(mode=0o700)
        return Seated(BubblewrapBackend(state_dir=state))


def test_the_table_says_who_shares(tmp_path: Path) -> None:
    """What an environment is held against is what the backends are."""
    from ringfence.config import load_config

    config = load_config({"RINGFENCE_STATE_DIR": str(tmp_path)}, settings_file=Path("/nonexistent"))
    found = {name: make(config) for name, make in technologies().items()}
    assert {name for name, one in found.items() if isinstance(one, SharingBackend)} == {
        name for name, why_not in SEATS.items() if not why_not
    }
    assert set(found) == set(SEATS)
