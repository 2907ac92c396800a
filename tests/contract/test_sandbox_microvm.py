"""microvm passes the sandbox contract."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from backends import needs
from ringfence.policy.compiled import SandboxProfile
from ringfence.sandbox.microvm import MicrovmBackend
from ringfence.sandbox.microvm_image import build
from ringfence.testing.sandbox_contract import SandboxContract

# every clause starts a machine, on an emulated processor: a quarter of an hour for all
pytestmark = [needs("microvm"), pytest.mark.storm, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kernel and snapshots of all clauses: made once."""
    directory = tmp_path_factory.mktemp("microvm")
    build(directory)
    return directory


def _link(source: Path, target: Path) -> None:
    for path in source.iterdir():
        if path.name != "lock" and not (target / path.name).exists():
            os.link(path, target / path.name)


class TestMicrovm(SandboxContract):
    patience = 6.0
    rules = SandboxProfile(emulation=True)
    # `shares_a_kernel` stays: a FIFO lies on the host's file system and has no reader there, the
    # guest takes what is sent to egress's socket, and its clock was compared with the host's

    @pytest.fixture
    def backend(self, shared: Path, tmp_path: Path) -> Iterator[MicrovmBackend]:
        directory = tmp_path / "state" / "microvm"
        directory.mkdir(mode=0o700, parents=True)
        directory.parent.chmod(0o700)
        _link(shared, directory)
        yield MicrovmBackend(state_dir=directory.parent)
        _link(directory, shared)
