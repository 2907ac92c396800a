from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from harness import Box
from zygote import Zygote

from ringfence.simulator.server import Simulator


@pytest.fixture(scope="module")
def simulator() -> Iterator[Simulator]:
    with Simulator() as running:
        yield running


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    with contextlib.closing(Zygote()) as ready:
        yield ready


@pytest.fixture
def box(tmp_path: Path, simulator: Simulator, zygote: Zygote) -> Box:
    simulator.requests.clear()
    return Box(tmp_path, simulator.base_url, zygote)
