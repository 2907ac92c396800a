"""microvm passes the sandbox contract."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ringfence.errors import UnavailableError
from ringfence.sandbox.microvm import MicrovmBackend
from ringfence.sandbox.microvm_image import build
from ringfence.sandbox.microvm_machine import check_tools
from ringfence.sandbox.protocol import Backend, SandboxSpec
from ringfence.testing.sandbox_contract import SandboxContract


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kernel and snapshots of all clauses: made once."""
    directory = tmp_path_factory.mktemp("microvm")
    try:
        check_tools()
        build(directory)
    except UnavailableError as error:
        pytest.skip(f"{error}: {error.hint}")
    return directory


def _link(source: Path, target: Path) -> None:
    for path in source.iterdir():
        if path.name != "lock" and not (target / path.name).exists():
            os.link(path, target / path.name)


class TestMicrovm(SandboxContract):
    patience = 6.0

    @pytest.fixture
    def backend(self, shared: Path, tmp_path: Path) -> Iterator[MicrovmBackend]:
        directory = tmp_path / "state" / "microvm"
        directory.mkdir(mode=0o700, parents=True)
        directory.parent.chmod(0o700)
        _link(shared, directory)
        yield MicrovmBackend(state_dir=directory.parent)
        _link(directory, shared)

    def spec(self, backend: Backend, place: Path, number: int = 0, **profile: Any) -> SandboxSpec:
        return super().spec(backend, place, number, emulation=True, **profile)
