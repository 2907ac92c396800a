"""The sandbox runtime holds the contract but for the clauses that it names, and exactly those."""

from __future__ import annotations

from pathlib import Path

import pytest

from backends import config, needs
from ringfence.sandbox.protocol import Backend
from ringfence.testing.sandbox_contract import SandboxContract
from ringfence.wiring import backends

pytestmark = needs("runtime")


class TestRuntime(SandboxContract):
    @pytest.fixture
    def backend(self, tmp_path: Path) -> Backend:
        state = tmp_path / "state"
        state.mkdir(mode=0o700)
        return backends(config(state)).get("runtime")
