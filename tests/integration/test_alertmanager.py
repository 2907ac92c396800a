"""Debian's own Alertmanager: what it makes of our alerts, told again and again."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from prometheus import Server, alertmanager, missing
from ringfence.config import SloSettings
from ringfence.config.slo import AlertmanagerSettings
from ringfence.control.slo_watch import Watch
from ringfence.store.database import Database, now
from ringfence.store.environments import remove
from slo_rig import Clock, an_environment, ended

ALL = {"fast", "slow", "ticket", "budget"}


class People(ThreadingHTTPServer):
    """Whom it tells. `heard`: tenant and rule, and what of it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Told)
        self.alerts: list[dict[str, Any]] = []

    def heard(self) -> Counter[tuple[str, str, str]]:
        return Counter(
            (one["labels"]["environment"], one["labels"]["rule"], one["status"])
            for one in self.alerts
        )


class _Told(BaseHTTPRequestHandler):
    server: People

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.alerts += body["alerts"]
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def people() -> Iterator[People]:
    with People() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def manager(people: People) -> Iterator[Server]:
    """It tells of each alert by itself, soon, and of none again within an hour."""
    if reason := missing("prometheus-alertmanager"):
        pytest.skip(reason)
    url = f"http://127.0.0.1:{people.server_address[1]}/"
    route = {
        "receiver": "people",
        "group_by": ["..."],
        "group_wait": "0s",
        "group_interval": "1s",
        "repeat_interval": "1h",
    }
    told = [{"url": url, "send_resolved": True}]
    config = {"route": route, "receivers": [{"name": "people", "webhook_configs": told}]}
    with alertmanager(config) as server:
        yield server


@pytest.fixture
async def database(place: Any) -> Any:
    found = place.open()
    await found.migrate()
    yield found
    await found.close()


def _stand(server: Server) -> dict[tuple[str, str], dict[str, Any]]:
    """What stands there, by environment and rule."""
    found = server.api("/api/v2/alerts")
    by = {(one["labels"]["environment"], one["labels"]["rule"]): one for one in found}
    assert len(by) == len(found), "one alert is there once"
    return by


async def test_alerts_arrive_are_told_of_once_and_end(
    database: Database, manager: Server, people: People
) -> None:
    """Two watches, and each alert told of five times over four minutes."""
    clock = Clock()
    # it has a clock of its own, by which an alert stands or has ended
    clock.at = now() - 240_000_000
    well, ill, gone = [await an_environment(database) for _ in range(3)]
    await ended(database, well, clock.at, good=20)
    for one in (ill, gone):
        await ended(database, one, clock.at, bad=20)
    settings = SloSettings(
        success=0.9,
        alertmanagers={"real": AlertmanagerSettings(url=manager.url, within=True)},
        runbook="https://runbooks.example.com/slo",
    )
    watches = [Watch(database, settings, clock=clock) for _ in range(2)]
    changed = set()
    for _ in range(4):
        for watch in watches:
            await watch.look()
        changed.add(tuple(sorted(one["updatedAt"] for one in _stand(manager).values())))
        clock.forward(60)
    found = _stand(manager)
    expected = {(one[1], rule) for one in (ill, gone) for rule in ALL}
    assert found.keys() == expected, "and nothing of the one that keeps its promise"
    assert len(changed) == 4, "it took each telling"
    (told,) = {json.dumps(one["labels"]) for key, one in found.items() if key == (ill[1], "fast")}
    assert json.loads(told) == {
        "alertname": found[ill[1], "fast"]["labels"]["alertname"],
        "severity": "page",
        "service": "ringfence",
        "tenant": ill[0],
        "environment": ill[1],
        "slo": "success",
        "rule": "fast",
    }
    assert found[ill[1], "fast"]["annotations"]["runbook_url"] == settings.runbook
    manager.until(lambda: sum(people.heard().values()) >= len(expected))
    # the environment is gone; the other one's runs end well again
    async with database.writing() as connection:
        await remove(connection, *gone)
    await ended(database, ill, clock.at, good=400)
    clock.at = now()
    for watch in watches:
        await watch.look()
    manager.until(lambda: _resolved(people) >= expected)
    assert people.heard() == Counter(
        {(*key, what): 1 for key in expected for what in ("firing", "resolved")}
    ), "each is told of twice, whoever looked and however often"
    assert _stand(manager) == {}


def _resolved(people: People) -> set[tuple[str, str]]:
    return {(place, rule) for place, rule, what in people.heard() if what == "resolved"}
