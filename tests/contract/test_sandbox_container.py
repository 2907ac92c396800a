"""The container backend passes the sandbox contract, with each of its engines."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from ringfence.sandbox.container import ENGINES, ContainerBackend
from ringfence.sandbox.protocol import Backend
from ringfence.testing.sandbox_contract import SandboxContract


class ContainerContract(SandboxContract):
    engine: str

    @pytest.fixture
    def backend(self, tmp_path: Path) -> ContainerBackend:
        if shutil.which(self.engine, path="/usr/sbin:/usr/bin") is None:
            pytest.skip(f"{self.engine} is not installed: apt-get install {self.engine}")
        if self.engine == "runc" and os.geteuid() != 0:
            pytest.skip("runc wants ids of its own: an ordinary user has crun")
        state = tmp_path / "state"
        state.mkdir(mode=0o700)
        return ContainerBackend(state_dir=state, engine=self.engine)

    @pytest.mark.root
    def test_root_can_freeze(self, backend: Backend, place: Path) -> None:
        async def work() -> None:
            async with self.started(backend, self.spec(backend, place)) as sandbox:
                assert await sandbox.freeze()

        self.run(work)


class TestRunc(ContainerContract):
    engine = "runc"


class TestCrun(ContainerContract):
    engine = "crun"


class TestPodman(ContainerContract):
    engine = "podman"


def test_every_engine_has_a_class() -> None:
    assert {one.engine for one in ContainerContract.__subclasses__()} == set(ENGINES)
