"""What is counted of a start-up."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ringfence.policy.compiled import SandboxProfile
from ringfence.sandbox import measure
from ringfence.sandbox.protocol import ControlState


class Fake:
    """A backend that enforces nothing that is looked at here."""

    def __init__(self) -> None:
        self.asked: list[SandboxProfile] = []

    def probe(self, profile: SandboxProfile) -> list[ControlState]:
        self.asked.append(profile)
        return []


@pytest.mark.parametrize(
    ("times", "seconds", "runs"),
    [
        ([0.5, 0.1, 0.2, 0.3, 0.4, 0.1], 0.2, 5),  # the first fills caches
        ([40.0, 2.0], 2.0, 1),  # the first saved a machine; one that is slow again is enough
        ([40.0, 0.4, 0.4, 0.5, 0.4, 0.4], 0.4, 5),
    ],
)
def test_the_first_start_is_not_counted(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    times: list[float],
    seconds: float,
    runs: int,
) -> None:
    left: Iterator[float] = iter(times)

    async def once(*_: Any) -> float:
        return next(left)

    monkeypatch.setattr(measure, "once", once)
    backend: Any = Fake()
    found = asyncio.run(measure.measure(backend, tmp_path, emulation=True))
    assert (found.seconds, found.runs) == (seconds, runs)
    assert list(left) == []
    assert all(profile.emulation for profile in backend.asked)
