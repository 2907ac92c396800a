"""An environment whose runs end as a test says, and an Alertmanager that is told of them."""

from __future__ import annotations

import asyncio
import json
import uuid
from datetime import datetime
from typing import Any, Self

import jsonschema

from ringfence.control.tenancy import new_id
from ringfence.store import environments, slo
from ringfence.store.database import Database
from ringfence.store.slo import Environment
from session_rig import a_tenant

# what its OpenAPI (api/v2, version 0.0.1) says of `postableAlerts`
_LABELS = {"type": "object", "additionalProperties": {"type": "string"}}
POSTABLE_ALERTS = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {
            "startsAt": {"type": "string", "format": "date-time"},
            "endsAt": {"type": "string", "format": "date-time"},
            "generatorURL": {"type": "string", "format": "uri"},
            "annotations": _LABELS,
            "labels": _LABELS,
        },
        "required": ["labels"],
        # beyond its own schema: it ignores what it does not know, and a misspelt field is that
        "additionalProperties": False,
    },
}


class Clock:
    """Microseconds since 1970, at the begin of an hour."""

    def __init__(self) -> None:
        self.at = 1_800_000_000_000_000

    def __call__(self) -> int:
        return self.at

    def forward(self, seconds: float) -> None:
        self.at += int(seconds * 1e6)


async def an_environment(database: Database, **block: Any) -> Environment:
    tenant = await a_tenant(database, f"t-{uuid.uuid4()}")
    identity = new_id("env")
    body = {"name": "production", "ringfence": block}
    async with database.writing() as connection:
        await environments.add(connection, tenant, identity, body, 1)
    return tenant, identity


async def ended(database: Database, place: Environment, at: int, **kinds: int) -> None:
    """Runs that ended at a moment; by kind: `good`, `bad`, `late` (beyond a day)."""
    numbers = {"good": 1, "bad": -1, "late": 18}
    async with database.writing() as connection:
        for kind, runs in kinds.items():
            for _ in range(runs):
                await slo.add(connection, *place, numbers[kind], at)


class Alertmanager:
    """Takes alerts as the real one: by labels, firing until `endsAt`; it keeps every change of what
    it would tell people. `away`: answers that many requests with 500.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.alerts: dict[tuple[tuple[str, str], ...], dict[str, Any]] = {}
        self.told: list[tuple[str, str]] = []
        self.posts: list[dict[str, str]] = []
        self.away = 0
        self.faults: list[str] = []

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await self._server.wait_closed()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")[:-2]
        headers = dict(line.split(": ", 1) for line in lines)
        body = await reader.readexactly(int(headers["content-length"]))
        self.posts.append(headers)
        status = 200
        try:
            assert first == "POST /api/v2/alerts HTTP/1.1", first
            self._take(json.loads(body))
        except (AssertionError, jsonschema.ValidationError, ValueError) as error:
            self.faults.append(str(error))
            status = 400
        except ConnectionError:
            status = 500
        writer.write(f"HTTP/1.1 {status} x\r\n\r\n".encode())
        await writer.drain()
        writer.close()

    def _take(self, alerts: Any) -> None:
        jsonschema.validate(alerts, POSTABLE_ALERTS)
        if self.away:
            self.away -= 1
            raise ConnectionError
        for alert in alerts:
            # its own validation (types/alert.go): times in order, labels with values
            start, end = (datetime.fromisoformat(alert[name]) for name in ("startsAt", "endsAt"))
            assert start <= end
            assert alert["labels"]["alertname"]
            assert all(alert["labels"].values()), alert["labels"]
            key = tuple(sorted(alert["labels"].items()))
            self.alerts[key] = alert | {"end": end.timestamp(), "start": start.timestamp()}
        self.tell()

    def firing(self) -> set[str]:
        now = self._clock() / 1e6
        return {dict(key)["rule"] for key, one in self.alerts.items() if one["end"] > now}

    def tell(self) -> None:
        """What has changed since it was looked at last."""
        known = {rule for rule in {r for r, _ in self.told} if self._last(rule) == "firing"}
        firing = self.firing()
        self.told += [(rule, "firing") for rule in sorted(firing - known)]
        self.told += [(rule, "resolved") for rule in sorted(known - firing)]

    def _last(self, rule: str) -> str:
        return [state for name, state in self.told if name == rule][-1]
