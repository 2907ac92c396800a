"""The fence that `ringfence check` attacks, held open for a module of tests that are not async."""

from __future__ import annotations

import asyncio
import os
import threading
from dataclasses import replace
from typing import Any

from attacked import make

from ringfence.check.canaries import Canaries
from ringfence.check.place import HOST, RULES, Place, run_inside
from ringfence.policy.compiled import EgressRules, Limits, SandboxProfile
from ringfence.sandbox.protocol import INSIDE_EGRESS_SOCKET

KEY = "sk-ant-api03-sk-REAL-CANARY-0123456789abcdef"
CANARY = "CANARY_SECRET_0123456789abcdef"

ACCEPTED = frozenset() if os.geteuid() == 0 else frozenset({"memory", "cpu", "pids"})
PROFILE = SandboxProfile(
    accept_unenforced=ACCEPTED,
    emulation=True,
    hidden=(".env",),
    blocked=("/etc", "/root", "/var/secrets"),
    limits=Limits(wall_seconds=120, memory_mb=1024, cpus=2, pids=256, disk_mb=256),
)


class Fence:
    """Started once for a module; `probe` runs a command inside and returns what it printed."""

    def __init__(self, isolation: str = "bubblewrap") -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._held = Place(lambda state: make(isolation, state), PROFILE, key=KEY, secret=CANARY)
        self.place = self._held.directory
        self.upstream, self.bad = self._held.upstream, self._held.bad
        self.records = self._held.records
        self._canaries = Canaries(self.place, CANARY)

    def start(self) -> None:
        self.run(self._held.__aenter__())
        self.link, self.notices = self._held.link, self._held.notices
        self.egress_process = self._held.egress_process
        self.recorder_process = self._held.recorder_process
        self.backend = self._held.backend
        self.sandbox = self.run(self.open(RULES))

    @property
    def host_hits(self) -> tuple[str, ...]:
        return self._canaries.hits()

    def assert_only_what_was_granted_came_out(self) -> None:
        """After all probes: the methods and hosts that the upstream saw."""
        for seen in self.upstream.seen:
            headers = {name.lower(): value for name, value in seen.headers}
            assert headers["host"] in {HOST, "tunnel.test"}
            assert seen.method == "GET"
            assert headers.get("accept-encoding") in {"identity", None}
            assert "x-forwarded-for" not in headers

    def run(self, work: Any, seconds: float = 60) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(seconds)

    async def open(self, rules: EgressRules, profile: SandboxProfile = PROFILE) -> Any:
        """One more sandbox behind the same egress."""
        return await self._held.open(rules, profile)

    def environment(self) -> dict[str, str]:
        return {
            "EGRESS_SOCK": INSIDE_EGRESS_SOCKET,
            "ALLOW_HOST": HOST,
            "ALLOW_PORT": "443",
            "PYTHONPATH": "/workspace",
            **self._canaries.environment(),
        }

    def probe(self, command: str, sandbox: Any = None, seconds: float = 45) -> tuple[str, int]:
        """(output and errors, exit status; -1 when it was out of time)."""
        saw = self.run(
            run_inside(sandbox or self.sandbox, command, self.environment(), seconds=seconds),
            seconds + 15,
        )
        return saw.output, -1 if saw.status is None else saw.status

    def stop(self) -> None:
        self._canaries.close()
        self.run(self._held.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


def narrowed(rules: EgressRules = RULES, **fields: Any) -> EgressRules:
    """Other rules for one more sandbox."""
    return replace(rules, **fields)
