"""One worker of a fleet under a limit, as a process: its recorder, its egress process, its desk, and
runs that ask one thing after the other. What it is to do comes as JSON on its command line; it says
`ready`, begins when a line comes, and prints what its runs saw.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import structlog

sys.path.insert(0, str(Path(__file__).parent))
from egress_rig import RULES, ask

from ringfence.channel.link import EgressLink
from ringfence.channel.messages import (
    CloseSandbox,
    Configure,
    DeskMessage,
    OpenSandbox,
    ProviderConfig,
)
from ringfence.channel.spawn import EgressProcess
from ringfence.config import LimitSettings
from ringfence.config.resilience import BreakerSettings, RetrySettings
from ringfence.limits.postgres import PostgresLimits
from ringfence.limits.redis import RedisLimits
from ringfence.limits.sqlite import SqliteLimits
from ringfence.limits.store import LimitStore
from ringfence.policy.codec import egress_to_json
from ringfence.policy.compiled import Failover
from ringfence.record.client import RecorderClient, RecorderProcess
from ringfence.worker.desk import Desk
from ringfence.worker.prepare import listen

TORN = 0
"""The status of an answer that broke off when its beginning had come."""
TRIES = 3
"""As `claude` has them: what has begun is its own to ask for again."""


def store_at(url: str) -> LimitStore:
    """By what a URL begins with; a path is a file."""
    if url.startswith("postgresql"):
        return PostgresLimits(url)
    return SqliteLimits(Path(url)) if url.startswith("/") else RedisLimits(url)


class Fleet:
    """The processes and sandboxes of one worker."""

    def __init__(self, told: dict[str, Any], stack: AsyncExitStack) -> None:
        self._told, self._stack = told, stack
        self._place, self._desk = Path(told["place"]), None
        self.seen: list[tuple[str, float, float, int]] = []

    async def open(self) -> None:
        told, stack = self._told, self._stack
        recorder = RecorderProcess.start(self._place / "audit")
        stack.push_async_callback(asyncio.to_thread, recorder.close)
        egress = EgressProcess.start()
        stack.push_async_callback(asyncio.to_thread, egress.close)
        client = RecorderClient(recorder.sockets["worker"])
        stack.push_async_callback(client.close)
        self._link = EgressLink(egress.connection, self._notice)
        stack.push_async_callback(self._link.close)
        await client.ready()
        desk = self._desk = Desk(
            LimitSettings.model_validate(told["settings"]),
            store_at(told["store"]),
            client,
            reply=self._link.tell,
            # who is put off here has no queue to wait in: why is what the storms ask
            post=lambda off: print("put off:", off.reason, file=sys.stderr),
            name=told["name"],
            breakers=BreakerSettings.model_validate(told.get("breakers", {})),
            retries=RetrySettings.model_validate(told.get("retries", {})),
        )
        stack.push_async_callback(desk.close)
        urls = {"anthropic": told["url"], **told.get("others", {})}
        named = {n: ProviderConfig(base_url=url, credential=None) for n, url in urls.items()}
        ways = tuple(Failover(provider=name) for name in told.get("others", {}))
        self._rules = replace(RULES, model=replace(RULES.model, failover=ways))
        await self._link.request(
            Configure,
            descriptors=[recorder.sockets["egress"].fileno()],
            providers=named,
            limited=told.get("limited", False),
            state_dir=str(self._place),
            ca_dir=str(self._place / "ca"),
            asks_for_turns=True,
        )
        recorder.sockets["egress"].close()
        for number, run in enumerate(told["runs"]):
            client.quota(f"sb{number}", 1 << 30)
            await self._sandbox(number, run)

    def _notice(self, notice: Any) -> None:
        if isinstance(notice, DeskMessage) and self._desk is not None:
            self._desk.heard(notice)

    async def _sandbox(self, number: int, run: dict[str, Any]) -> None:
        (self._place / str(number)).mkdir()
        listener = listen(self._place / str(number) / "s")
        await self._link.request(
            OpenSandbox,
            descriptors=[listener.fileno()],
            sandbox_id=f"sb{number}",
            run_id=f"{self._told['name']}-{number}",
            session_id="",
            rules=egress_to_json(self._rules),
            tenant=run["tenant"],
            batch=run["batch"],
        )
        listener.close()

    async def run(self) -> None:
        await asyncio.gather(*(self._one(*item) for item in enumerate(self._told["runs"])))
        for number in range(len(self._told["runs"])):
            await self._link.request(CloseSandbox, sandbox_id=f"sb{number}")

    async def _one(self, number: int, run: dict[str, Any]) -> None:
        path = str(self._place / str(number) / "s")
        kind = "batch" if run["batch"] else run["tenant"]
        reader, writer = await asyncio.open_unix_connection(path)
        for _ in range(run["requests"]):
            for _ in range(TRIES):
                asked = time.monotonic()
                writer.write(ask(stream=True))
                try:
                    status = await _answered(reader)
                except (asyncio.IncompleteReadError, ConnectionError):
                    status = TORN
                    writer.close()
                    reader, writer = await asyncio.open_unix_connection(path)
                self.seen.append((kind, asked, time.monotonic(), status))
                if status != TORN:
                    break
        writer.close()


async def _answered(reader: asyncio.StreamReader) -> int:
    """Its status, when all of it has come."""
    head = await reader.readuntil(b"\r\n\r\n")
    if b"chunked" in head:
        while not (await reader.readuntil(b"\r\n")).startswith(b"0\r\n"):
            pass
        await reader.readuntil(b"\r\n")
    else:
        lines = head.lower().split(b"\r\n")
        length = next(line for line in lines if line.startswith(b"content-length"))
        await reader.readexactly(int(length.partition(b":")[2]))
    return int(head.split(b" ")[1])


async def main(told: dict[str, Any]) -> None:
    async with AsyncExitStack() as stack:
        fleet = Fleet(told, stack)
        await fleet.open()
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        await fleet.run()
        print(json.dumps(fleet.seen), flush=True)


if __name__ == "__main__":
    # what is printed here is read: warnings go where people look
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    asyncio.run(main(json.loads(sys.argv[1])))
