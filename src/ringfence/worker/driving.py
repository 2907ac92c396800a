"""The agent at work in a sandbox that stands: driven, bounded in time, ended on a wish."""

from __future__ import annotations

import asyncio
import codecs
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ringfence.agent.calls import Word
from ringfence.agent.claude import GRACE_SECONDS, ClaudeDriver, Run
from ringfence.agent.command import run_command
from ringfence.agent.messages import Progress, Text, TurnEnded
from ringfence.agent.pending import Waiting
from ringfence.channel.messages import ToolDecided
from ringfence.errors import AgentError, UnavailableError
from ringfence.model import PendingCall, Prompt, RunRequest
from ringfence.policy.call_input import CallInput
from ringfence.policy.compiled import CompiledPolicy
from ringfence.queue.handling import to_the_end
from ringfence.record.leased import LeasedStore
from ringfence.sandbox.protocol import Sandbox
from ringfence.worker.control import RunControl, Wish
from ringfence.worker.deferring import first_turns
from ringfence.worker.livekey import live_settings
from ringfence.worker.outcome import Outcome
from ringfence.worker.prepare import claude_settings
from ringfence.worker.station import OnMessage, Station


@dataclass(kw_only=True)
class Driving:
    """One run's work, from a sandbox that was started to an agent that said its last.

    Attributes:
        outcome: filled in while the work goes on.
        ids: `run_id`, `session_id` and `sandbox_id`.
        driver: of a `claude` that was there before the run; None starts one.
        frozen: that one stands still, and goes on when it has the run.
        keeps: `claude` may stay when the turn has ended well.
        rests: the driver of one that stays.
        home: the session's files, by path, as they were put before `claude`.
        known: ids of the tool calls that its transcript held before.
        pending: calls at which the agent stopped, once the work is done.
    """

    station: Station
    policy: CompiledPolicy
    request: RunRequest
    sandbox: Sandbox
    control: RunControl
    outcome: Outcome
    on_message: OnMessage
    ids: Mapping[str, str]
    driver: ClaudeDriver | None
    frozen: bool
    keeps: bool
    home: Mapping[str, bytes]
    known: Sequence[str]
    pending: tuple[PendingCall, ...] = ()
    rests: ClaudeDriver | None = None
    _driver: ClaudeDriver | None = field(default=None, init=False)

    async def within_time(self, lease: LeasedStore | None) -> None:
        """The clock is out here: at the limit the turn is interrupted, then killed. A cancel that
        fails ends the work and is raised: else the run would go on as if nobody had said so.
        """
        async with self.station.metering(self.sandbox):
            await self._within_time(lease)

    async def _within_time(self, lease: LeasedStore | None) -> None:
        loop = asyncio.get_running_loop()
        work = loop.create_task(self._drive(lease))
        lost = loop.create_task(self.station.lost())
        wishes = loop.create_task(
            self.control.follow(interrupt=self._interrupt, cancel=self._cancel)
        )
        try:
            await self._in_time(work, lost, wishes)
            if lost.done():
                self.outcome.fail(lost.result())
                await self.sandbox.stop()
            elif not work.done():
                await self._expire(work)
            await asyncio.wait({work})
            if not work.cancelled():
                work.result()
        finally:
            for task in (work, lost, wishes):
                task.cancel()
            await to_the_end(asyncio.gather(work, lost, wishes, return_exceptions=True))

    async def _in_time(
        self,
        work: asyncio.Task[None],
        lost: asyncio.Task[UnavailableError],
        wishes: asyncio.Task[None],
    ) -> None:
        """Until the work is over, its host lost, or its time up. Raises what a cancel raised."""
        clock = asyncio.get_running_loop().time
        until = clock() + self.policy.sandbox.limits.wall_seconds
        for watched in ({work, lost, wishes}, {work, lost}):
            left = max(0.0, until - clock())
            await asyncio.wait(watched, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if work.done() or lost.done() or not wishes.done():
                return
            if (error := wishes.exception()) is not None:
                work.cancel()
                raise error

    async def _expire(self, work: asyncio.Task[None]) -> None:
        seconds = self.policy.sandbox.limits.wall_seconds
        self.outcome.expired = True
        self.outcome.fail(
            AgentError(
                "run-timeout",
                f"the run reached its limit of {seconds:g} seconds",
                hint="raise execution.max_duration_seconds in the policy, or --timeout",
            )
        )
        await self._interrupt()
        await self.sandbox.stop()
        # nobody inside is left to write; what still waits out here is given up
        await asyncio.wait({work}, timeout=GRACE_SECONDS)
        if not work.done():
            work.cancel()

    async def _interrupt(self) -> None:
        if self._driver is not None:
            await self._driver.interrupt()
        else:
            await self.sandbox.stop()

    async def _cancel(self) -> None:
        await self.sandbox.stop()

    async def _drive(self, lease: LeasedStore | None) -> None:
        if self.request.command:
            await self._drive_command()
        else:
            assert lease is not None  # noqa: S101  a session has a lease
            await self._drive_claude(lease)

    async def _drive_command(self) -> None:
        request, model = self.request, self.policy.egress.model
        # a character may lie across two reads
        text = codecs.getincrementaldecoder("utf-8")("replace")
        self.outcome.command = await run_command(
            self.sandbox,
            request.command,
            task=request.prompt,
            environment=dict(request.environment),
            model=(request.model or "") if model.enabled else None,
            on_output=lambda data: self.on_message(Text(text=text.decode(data))),
        )

    async def _drive_claude(self, lease: LeasedStore) -> None:
        request = self.request
        driver = self.driver or self._new_driver()
        driver.serve(
            Run(
                run_id=self.ids["run_id"],
                recorder=self.station.recorder,
                announce=self._announce,
                approver=self.station.approver,
                mirror=lease,
                waiting=self._waiting(),
                gate=self.station.gate,
            )
        )
        self._driver = driver
        try:
            if self.frozen:
                await self.sandbox.thaw()
                self.frozen = False
            if self.driver is None:
                self.on_message(Progress(waits_for="agent"))
                await driver.start()
            self.on_message(Progress(waits_for="ready"))
            for prompt in first_turns(request, self.home):
                await self._turn(driver, prompt)
                if driver.pending or not (self.outcome.ended and self.outcome.ended.ok):
                    break
            if driver.pending and driver.failure is None and self.control.wish is Wish.GO_ON:
                await driver.offered()
            if self.keeps and self.outcome.failure is None and await driver.rest():
                self.rests = driver
        finally:
            self._driver = None
            if self.rests is None:
                await self._over(driver, stands_still=self.frozen)
        if driver.failure is not None:
            self.outcome.fail(driver.failure)
        self.pending = driver.pending
        if lease.failed:
            self.outcome.fail(
                UnavailableError(
                    "transcript-lost", "the transcript could not be kept, so the run was ended"
                )
            )

    async def give_up(self) -> None:
        """End a `claude` that rests, and that nobody takes over. Idempotent."""
        driver, self.rests = self.rests, None
        if driver is not None:
            await self._over(driver, stands_still=True)

    async def _over(self, driver: ClaudeDriver, *, stands_still: bool) -> None:
        try:
            if stands_still:
                await self.sandbox.stop()  # what stands still cannot be asked to end
        finally:
            await driver.close()

    def _waiting(self) -> Waiting:
        request = self.request
        return Waiting(
            pending=request.pending, answers=request.answers, known=self.known, now=time.time()
        )

    async def _turn(self, driver: ClaudeDriver, prompt: Prompt | None) -> None:
        async for message in driver.turn(prompt, self.request.prompt_id):
            if isinstance(message, TurnEnded):
                self.outcome.ended = message
            self.on_message(message)

    def _new_driver(self) -> ClaudeDriver:
        settings = claude_settings(self.policy, self.request, **self.ids)
        if self.station.telemetry is not None:
            trace = self.station.telemetry.agent_context(self.ids["run_id"])
            settings = replace(settings, trace=trace)
        return ClaudeDriver(self.sandbox, live_settings(settings) if self.keeps else settings)

    async def _announce(self, tool_use_id: str, name: str, told: CallInput, word: Word) -> None:
        await self.station.egress.request(
            ToolDecided,
            sandbox_id=self.ids["sandbox_id"],
            tool_use_id=tool_use_id,
            name=name,
            input_sha256=told.digest,
            input_place=told.place,
            allowed=word == "allow",
            deferred=word == "defer",
        )
