"""The storm at full size: 8 workers of 50 runs each, a limit that they exceed eightfold, and a provider
that is overloaded now and then, drops streams, and goes down for a while.

Time is scaled as the limits' windows are: 12 seconds here are the minute that a provider counts, and
the minute for which it is down.
"""

from __future__ import annotations

import random
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from limits_worker import TORN
from test_limits_fleet import (
    LIMIT,
    RUNS,
    WINDOW,
    WORKERS,
    Processes,
    kind_of,
    played,
    report,
    runs,
    store,
)

from ringfence.simulator.server import Simulator

__all__ = ["store"]

SCALE = WINDOW / 60.0
OVERLOADED, DROPPED = 0.02, 0.01
EARLY, LATE = 1, 3
"""Events of a stream that pass before it drops: its head alone, or some of its content."""
LIMITS = {"requests": LIMIT, "window_seconds": WINDOW}
EACH = 6


class Weather:
    """What stands before a provider: faults at seeded moments, and an outage."""

    def __init__(self, app: Any, seed: int) -> None:
        self._app, self._dice = app, random.Random(seed)
        self.down = False
        self.given: Counter[str] = Counter()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        self.given["asked"] += 1
        chance = self._dice.random()
        if self.down:
            self.given["outage"] += 1
            await _refused(send, 503)
        elif chance < OVERLOADED:
            self.given["overloaded"] += 1
            await _refused(send, 529)
        elif chance < OVERLOADED + DROPPED:
            late = chance < OVERLOADED + DROPPED / 2
            self.given["late" if late else "early"] += 1
            await self._app(scope, receive, _dropping(send, LATE if late else EARLY))
        else:
            await self._app(scope, receive, send)


async def _refused(send: Any, status: int) -> None:
    body = b'{"type":"error","error":{"type":"overloaded_error","message":"simulated"}}'
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _dropping(send: Any, events: int) -> Any:
    left = events

    async def some(message: Any) -> None:
        nonlocal left
        if message["type"] == "http.response.body":
            if left == 0:
                raise ConnectionAbortedError("the storm breaks it off here")
            left -= 1
        await send(message)

    return some


class Rough(Simulator):
    """A provider under its weather."""

    def __init__(self, seed: int) -> None:
        super().__init__(played(LIMITS))
        self.weather = Weather(self._server.config.app, seed)
        self._server.config.app = self.weather


def outage(weather: Weather, over: threading.Event) -> None:
    """A minute of the provider's, when two of them have passed."""
    if over.wait(120 * SCALE):
        return
    weather.down = True
    over.wait(60 * SCALE)
    weather.down = False


@pytest.mark.storm
@pytest.mark.timeout(360)
def test_every_run_completes_in_a_storm(store: str) -> None:
    """And nobody inside hears of a 429, nor is a tenth more asked than runs ask for."""
    rates = {name: {**LIMITS, "provider": name} for name in ("anthropic", "second")}
    over, wanted = threading.Event(), WORKERS * RUNS * EACH
    with Rough(1) as first, Rough(2) as second:
        ways = {"others": {"second": second.base_url}, "limited": True}
        scaled = {
            "breakers": {"window_seconds": 30 * SCALE, "open_seconds": 10 * SCALE},
            "retries": {"base_seconds": 0.5 * SCALE, "longest_seconds": 20 * SCALE},
        }
        told = {"rates": rates}
        made = Processes(store, runs(EACH), told, first.base_url, **ways, **scaled)
        with made as fleet:
            falls = threading.Thread(target=outage, args=(first.weather, over))
            falls.start()
            began = time.monotonic()
            try:
                seen = fleet.run()
            finally:
                over.set()
                falls.join()
        took = seen[-1].ended - began
    asked = first.weather.given["asked"] + second.weather.given["asked"]
    ends = Counter(each.status for each in seen)
    report(
        f"storm on {kind_of(store)}",
        seconds=took,
        wanted=wanted,
        asked=asked,
        extra=asked / wanted - 1,
        ends=ends,
        refused=[first.refused, second.refused],
        first=first.weather.given,
        second=second.weather.given,
    )
    assert ends[200] == wanted, "every request of every run was answered in the end"
    assert set(ends) <= {200, TORN}
    assert first.weather.given["outage"] > 0, "it was down while runs asked"
    assert second.weather.given["asked"] > 0
    assert wanted <= asked <= wanted * 1.1
