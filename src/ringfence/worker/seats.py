"""Sandboxes that sessions of one environment share on this worker (`hosting: multi_agent`).

A turn takes a seat, and gives it back when it ends: nothing of it stays there. Who may sit together
is one key over tenant, environment and rules: never two of any of these. Where every seat is taken
another sandbox is started; one that nobody sits in is ended after its idle time.

Who could lie: nobody inside has a word in who sits where. Rules, credentials, budget and share of
the log at egress are a seat's, which has an id of its own there.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import structlog

from ringfence.config import LiveSettings
from ringfence.errors import AgentError, CallerError, DeniedError, RingfenceError
from ringfence.queue.handling import to_the_end
from ringfence.record.events import SandboxStopped
from ringfence.record.recorder import Recorder
from ringfence.sandbox.protocol import Backend, Sandbox, SandboxSpec
from ringfence.sandbox.sharing import SharedSandbox, SharedSpec, SharingBackend
from ringfence.worker.begins import sandbox_started
from ringfence.worker.ids import new_id
from ringfence.worker.livekey import shared_key

_LOG = structlog.get_logger("ringfence.worker")
_AGAIN_SECONDS = 30.0
_SESSIONS_OWN = (CallerError, DeniedError, AgentError)
"""What a seat is refused for by its session: its workspace, its files. The place is as it was."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Company:
    """Whom a session sits with: others of its tenant and environment.

    Attributes:
        environment: its body as of this turn. most: seats of one sandbox.
        idle_seconds: how long one without anybody stays; None leaves it to the worker.
    """

    tenant: str
    environment_id: str
    environment: Mapping[str, Any]
    most: int
    idle_seconds: float | None


@dataclass(eq=False, kw_only=True)
class _House:
    """One of the sandboxes. `over`: nobody sits down there any more."""

    key: str
    most: int
    idle_seconds: float
    starting: asyncio.Task[SharedSandbox]
    taken: int = 0
    over: bool = False
    timer: asyncio.TimerHandle | None = None


class SeatPool:
    """Those of one worker."""

    def __init__(self, settings: LiveSettings, recorder: Recorder) -> None:
        self._settings, self._recorder = settings, recorder
        self._houses: list[_House] = []
        self._ending: set[asyncio.Task[None]] = set()
        self._closing = asyncio.Event()

    @asynccontextmanager
    async def taken(
        self, backend: Backend, company: Company, spec: SandboxSpec
    ) -> AsyncIterator[Sandbox]:
        """A seat while the block runs.

        Raises:
            CallerError: `hosting-unsupported`; what `start_shared` and `seat` raise.
            UnavailableError: likewise.
        """
        if not isinstance(backend, SharingBackend):
            raise CallerError(
                "hosting-unsupported",
                f"{backend.name} cannot keep several agents apart in one sandbox",
                hint="isolation: container, or hosting: ephemeral",
            )
        house = self._join(backend, company, spec)
        try:
            async with self._seated(house, spec) as sandbox:
                yield sandbox
        finally:
            self._leave(house)

    def _join(self, backend: SharingBackend, company: Company, spec: SandboxSpec) -> _House:
        """Without a pause between the look and the place: two that come at once sit together."""
        key = _key(backend, company, spec)
        for house in self._houses:
            usable = not house.over and not _failed(house.starting)
            if house.key == key and usable and house.taken < house.most:
                break
        else:
            asked, most = company.idle_seconds, self._settings.idle_seconds
            loop = asyncio.get_running_loop()
            house = _House(
                key=key,
                most=company.most,
                idle_seconds=most if asked is None else min(asked, most),
                starting=loop.create_task(self._start(backend, company, spec)),
            )
            self._houses.append(house)
        house.taken += 1
        if house.timer is not None:
            house.timer.cancel()
        return house

    async def _start(
        self, backend: SharingBackend, company: Company, spec: SandboxSpec
    ) -> SharedSandbox:
        shared = await backend.start_shared(
            SharedSpec(
                sandbox_id=new_id("sb"),
                profile=spec.profile,
                state_dir=spec.state_dir,
                claude=spec.claude,
                ca_certificate=spec.ca_certificate,
                seats=company.most,
            )
        )
        try:
            ids = {"sandbox_id": shared.sandbox_id}
            await self._recorder.append(
                sandbox_started(
                    ids, backend, spec.profile, controls=shared.controls, seats=company.most
                )
            )
        except BaseException:
            await to_the_end(shared.close())
            raise
        return shared

    @asynccontextmanager
    async def _seated(self, house: _House, spec: SandboxSpec) -> AsyncIterator[Sandbox]:
        # whoever came first may be cancelled; the others wait for it still
        shared = await asyncio.shield(house.starting)
        try:
            sandbox = await shared.seat(spec)
        except (asyncio.CancelledError, *_SESSIONS_OWN):
            raise
        except BaseException:
            house.over = True  # whatever is wrong with it, the next turn finds another
            raise
        try:
            yield sandbox
        finally:
            try:
                await to_the_end(sandbox.close())
            except BaseException:
                house.over = True
                raise

    def _leave(self, house: _House) -> None:
        house.taken -= 1
        if house.taken:
            return
        if house.over or _failed(house.starting) or self._closing.is_set():
            self._end(house, "over")
        else:
            loop = asyncio.get_running_loop()
            house.timer = loop.call_later(house.idle_seconds, self._end, house, "idle")

    def _end(self, house: _House, why: str) -> None:
        if house not in self._houses:
            return
        self._houses.remove(house)
        house.over = True
        task = asyncio.get_running_loop().create_task(self._over(house, why))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def _over(self, house: _House, why: str) -> None:
        await asyncio.wait({house.starting})
        if _failed(house.starting):
            return  # it never was; who waited for it has been told
        shared = house.starting.result()
        while not await _ended(shared):
            if self._closing.is_set():
                return  # whoever is left dies with this worker, or is swept by the next
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), _AGAIN_SECONDS)
        _LOG.info("worker.shared_sandbox_ended", sandbox=shared.sandbox_id, why=why)
        with contextlib.suppress(RingfenceError):
            await self._recorder.append(
                SandboxStopped(sandbox_id=shared.sandbox_id, reason=why), durable=False
            )

    async def close(self) -> None:
        """End all of them, and everybody in them. Idempotent."""
        self._closing.set()
        for house in list(self._houses):
            if house.timer is not None:
                house.timer.cancel()
            self._end(house, "stopped")
        if self._ending:
            await to_the_end(asyncio.wait(set(self._ending)))


def _failed(starting: asyncio.Task[SharedSandbox]) -> bool:
    """Whether there will never be a sandbox."""
    return starting.done() and (starting.cancelled() or starting.exception() is not None)


async def _ended(shared: SharedSandbox) -> bool:
    try:
        await shared.close()
    except Exception as error:  # noqa: BLE001  whatever it is, somebody may be there still
        _LOG.error(
            "a shared sandbox cannot be ended", sandbox=shared.sandbox_id, why=type(error).__name__
        )
        return False
    return True


def _key(backend: Backend, company: Company, spec: SandboxSpec) -> str:
    status = spec.claude.stat() if spec.claude is not None else None
    return shared_key(
        spec.profile,
        tenant=company.tenant,
        environment_id=company.environment_id,
        environment=company.environment,
        isolation=backend.name,
        # one that was replaced on the host is another
        claude=f"{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}"
        if status is not None
        else "",
        ca_certificate=spec.ca_certificate,
    )
