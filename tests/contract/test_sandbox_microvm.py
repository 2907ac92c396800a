"""microvm passes the sandbox contract."""

from __future__ import annotations

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
    """One state directory for all clauses: the snapshot is made once."""
    directory = tmp_path_factory.mktemp("microvm")
    try:
        check_tools()
        build(directory / "microvm")
    except UnavailableError as error:
        pytest.skip(f"{error}: {error.hint}")
    return directory


class TestMicrovm(SandboxContract):
    patience = 6.0

    @pytest.fixture
    def backend(self, shared: Path) -> MicrovmBackend:
        return MicrovmBackend(state_dir=shared)

    def spec(self, backend: Backend, place: Path, number: int = 0, **profile: Any) -> SandboxSpec:
        return super().spec(backend, place, number, emulation=True, **profile)
