"""Sandboxes with `claude` in them that wait for new sessions, started before a prompt is known.

A member has no workspace, no way out, no credential and no session's data before the hand-over;
it is handed to one run and never used again. Two tasks of this worker look after them: one starts
and ends members as `warmplan` says, one a member waits for its end. When this process dies its
members die with it, as any sandbox does.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Never, cast

from claude_agent_sdk import SessionStore

from ringfence.agent.claude import ClaudeDriver
from ringfence.agent.command_line import environment
from ringfence.agent.options import build_options
from ringfence.agent.settings import ClaudeSettings
from ringfence.config import Config
from ringfence.errors import AgentError, RingfenceError
from ringfence.model import RunRequest
from ringfence.policy.compiled import CompiledPolicy
from ringfence.queue.handling import to_the_end
from ringfence.sandbox.protocol import Backend, WaitingBackend, WaitingSandbox, WaitingSpec
from ringfence.worker.egressdir import EgressDirectory
from ringfence.worker.ends import broken_off
from ringfence.worker.ids import new_id
from ringfence.worker.prepare import claude_settings, narrowed, pinned
from ringfence.worker.warmkey import obstacle, warm_key
from ringfence.worker.warmplace import StandIn, has_git, stand_in
from ringfence.worker.warmplan import Waiting, Want, plan

_LATER_SECONDS = 1.0
"""Before a place is filled again: the run that was just served needs the processor more."""
_FAULTS = 3
"""Members of one kind that may fail in a row; then none is started until such a run comes again."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a member is made from, and its key."""

    key: str
    policy: CompiledPolicy
    backend: WaitingBackend
    settings: ClaudeSettings
    stand_in: StandIn


@dataclass(eq=False, kw_only=True)
class Member:
    """One that waits; `watch` waits for its end."""

    recipe: Recipe
    sandbox: WaitingSandbox
    driver: ClaudeDriver
    session_id: str
    egress: EgressDirectory
    since: float
    watch: asyncio.Task[None] | None = None

    def waited_ms(self) -> float:
        """Since it was ready."""
        return round((time.monotonic() - self.since) * 1000, 3)

    async def close(self) -> None:
        """End it, whoever has it now. Idempotent."""
        if self.watch is not None:
            self.watch.cancel()
        await self.driver.close()
        await self.sandbox.close()
        self.egress.remove()


@dataclass(kw_only=True)
class _Kind:
    """A recipe that is wanted."""

    recipe: Recipe
    used_at: float
    faults: int = 0
    fault: RingfenceError | None = None


class _Nobody:
    """Answers for options that start nothing."""

    @property
    def calls(self) -> Never:
        raise AgentError("agent-protocol", "nobody asks")


_NO_STORE = cast("SessionStore", None)


class WarmPool:
    """Members by key. One worker's; `take` does not wait for anything."""

    def __init__(
        self, config: Config, *, claude: Path | None, ca_certificate: bytes | None
    ) -> None:
        self._config, self._claude, self._ca = config, claude, ca_certificate
        self._kinds: dict[str, _Kind] = {}
        self._policies: dict[str, str] = {}
        self._members: list[Member] = []
        self._changed, self._settled = asyncio.Event(), asyncio.Event()
        self._timers: set[asyncio.TimerHandle] = set()
        self._tending: asyncio.Task[None] | None = None
        self._closed = False

    def recipe(
        self, policy: CompiledPolicy, request: RunRequest, backend: Backend
    ) -> Recipe | None:
        """What would serve a request in this technology; None when nothing that waits can.

        Raises:
            CallerError: `image-unknown`.
            UnavailableError: `image-damaged`.
        """
        policy, claude = narrowed(policy, request), self._claude
        policy = pinned(policy, self._config.state_dir)
        if self._config.warm.size == 0 or claude is None or obstacle(policy, request):
            return None
        if not isinstance(backend, WaitingBackend):
            return None
        git = has_git(policy.sandbox.image, self._config.state_dir)
        place = stand_in(Path(request.workspace), git=git)
        if place is None:
            return None
        settings = claude_settings(policy, request, session_id="", run_id="", sandbox_id="")
        recipe = Recipe(key="", policy=policy, backend=backend, settings=settings, stand_in=place)
        try:
            return replace(
                recipe, key=self._key(recipe, build_options(settings, _Nobody(), _NO_STORE), claude)
            )
        except (TypeError, OSError):
            return None

    def why_none(self, policy: CompiledPolicy, request: RunRequest, backend: Backend) -> str:
        """Words for a person to whom `recipe` gave none."""
        found = obstacle(narrowed(policy, request), request)
        if found is not None:
            return found
        if not isinstance(backend, WaitingBackend):
            return f"isolation {backend.name} cannot take a workspace into a sandbox that runs"
        return (
            "the workspace's branch cannot be read, or it is a git tree without git inside, or "
            "an option has no form to compare it by"
        )

    def take(self, recipe: Recipe) -> Member | None:
        """The one that waited longest of those fit to serve, which is the caller's from now on."""
        self.want(recipe, later=True)
        young = time.monotonic() - self._config.warm.max_age_seconds
        for member in self._members:
            if member.recipe.key == recipe.key and member.since > young and member.driver.usable:
                self._members.remove(member)
                if member.watch is not None:
                    member.watch.cancel()
                return member
        return None

    def want(self, recipe: Recipe, *, later: bool = False) -> None:
        """Runs of this kind come: keep members for them."""
        kind = self._kinds.setdefault(recipe.key, _Kind(recipe=recipe, used_at=0.0))
        kind.used_at, kind.faults = time.monotonic(), 0
        self._settled.clear()
        self._tend_soon(_LATER_SECONDS if later else 0.0)

    def policy_is(self, source: str, digest: str) -> None:
        """A source of policies (a file, a preset) now says this: what waits under its former word
        is ended. Nobody would be served by it: the digest is part of the key.
        """
        former = self._policies.get(source)
        self._policies[source] = digest
        if former is None or former == digest or former in self._policies.values():
            return
        for key, kind in list(self._kinds.items()):
            if kind.recipe.policy.digest == former:
                del self._kinds[key]
        self._tend_soon(0.0)

    async def ready(self, recipe: Recipe) -> int:
        """Wait until what is wanted waits; returns how many do for this recipe.

        Raises:
            RingfenceError: why none of them can be started.
        """
        await self._settled.wait()
        waiting = sum(member.recipe.key == recipe.key for member in self._members)
        kind = self._kinds.get(recipe.key)
        if not waiting and kind is not None and kind.fault is not None:
            raise kind.fault
        return waiting

    @property
    def members(self) -> tuple[Member, ...]:
        """Those that wait, the oldest first."""
        return tuple(self._members)

    async def close(self) -> None:
        """End everyone. Idempotent."""
        self._closed = True
        for timer in self._timers:
            timer.cancel()
        if self._tending is not None:
            self._tending.cancel()
            await asyncio.wait({self._tending})
        members, self._members = self._members, []
        await to_the_end(asyncio.gather(*(member.close() for member in members)))

    # looking after them

    def _tend_soon(self, seconds: float) -> None:
        if self._closed:
            return
        loop = asyncio.get_running_loop()
        if self._tending is None:
            self._tending = loop.create_task(self._tend())

        def now() -> None:
            self._timers.discard(timer)
            self._changed.set()

        timer = loop.call_later(seconds, now)
        self._timers.add(timer)

    async def _tend(self) -> None:
        seconds: float | None = None
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._changed.wait()
            self._changed.clear()
            seconds = await self._tend_once()
            # a wish that was spoken meanwhile may still be on its timer
            if not self._changed.is_set() and not self._timers:
                self._settled.set()

    async def _tend_once(self) -> float | None:
        """Do what the plan says until it says nothing; seconds until it may say something.

        One after another: a start takes half a second of a processor, and runs are going on.
        """
        while True:
            self._forget()
            wants = [Want(key=key, used_at=kind.used_at) for key, kind in self._kinds.items()]
            waiting = [
                Waiting(identity=member.session_id, key=member.recipe.key, since=member.since)
                for member in self._members
            ]
            todo = plan(self._config.warm, wants, waiting, time.monotonic())
            for member in [one for one in self._members if one.session_id in todo.end]:
                if member in self._members:  # not handed over while another was ended
                    self._members.remove(member)
                    await to_the_end(member.close())
            kinds = [self._kinds[key] for key in todo.start if key in self._kinds]
            kind = next((kind for kind in kinds if kind.faults < _FAULTS), None)
            if kind is None:
                return todo.again_in
            await self._fill(kind)

    def _forget(self) -> None:
        """Kinds of run past those that are kept in mind."""
        latest = sorted(self._kinds.values(), key=lambda kind: kind.used_at, reverse=True)
        for kind in latest[self._config.warm.keys :]:
            del self._kinds[kind.recipe.key]

    async def _fill(self, kind: _Kind) -> None:
        try:
            member = await self._start(kind.recipe)
        except RingfenceError as error:
            kind.faults, kind.fault = kind.faults + 1, error
        except Exception as error:  # noqa: BLE001  a pool that ends by itself would fail silently
            kind.faults, kind.fault = kind.faults + 1, broken_off(error)
        else:
            kind.fault = None
            self._members.append(member)
            loop = asyncio.get_running_loop()
            member.watch = loop.create_task(self._watch(member))

    async def _start(self, recipe: Recipe) -> Member:
        backend, claude = recipe.backend, self._claude
        if claude is None:
            raise AgentError("agent-start-failed", "nothing can wait here")
        sandbox_id, session_id = new_id("sb"), str(uuid.uuid4())
        egress = EgressDirectory(self._config.state_dir, sandbox_id)
        async with contextlib.AsyncExitStack() as undo:
            undo.callback(egress.remove)
            backend.warm()  # the hand-over, too, begins with a launcher
            sandbox = await backend.start_waiting(
                WaitingSpec(
                    sandbox_id=sandbox_id,
                    profile=recipe.policy.sandbox,
                    state_dir=self._config.state_dir,
                    egress_dir=egress.path,
                    claude=claude,
                    ca_certificate=self._ca,
                    placeholders=recipe.stand_in.placeholders,
                    programs=recipe.stand_in.programs,
                )
            )
            undo.push_async_callback(sandbox.close)
            settings = replace(recipe.settings, session_id=session_id, sandbox_id=sandbox_id)
            driver = ClaudeDriver(sandbox, settings)
            if self._key(recipe, driver.options, claude) != recipe.key:
                # an upgrade under our feet: the next run asks with the new key
                raise AgentError("agent-start-failed", "claude is no longer the one asked for")
            undo.push_async_callback(driver.close)
            await driver.start()
            undo.pop_all()
        return Member(
            recipe=recipe,
            sandbox=sandbox,
            driver=driver,
            session_id=session_id,
            egress=egress,
            since=time.monotonic(),
        )

    async def _watch(self, member: Member) -> None:
        """A member that ends while it waits makes room; one that was handed over is its run's."""
        await member.driver.ended()
        if member not in self._members:
            return
        self._members.remove(member)
        member.watch = None  # closing it must not cancel who closes it
        kind = self._kinds.get(member.recipe.key)
        if kind is not None:
            kind.faults += 1
            kind.fault = member.driver.failure or AgentError(
                "agent-start-failed", "claude ended while it waited for a run"
            )
        await to_the_end(member.close())
        self._tend_soon(_LATER_SECONDS)

    def _key(self, recipe: Recipe, options: object, claude: Path) -> str:
        status = claude.stat()
        return warm_key(
            options,
            environment=environment(recipe.settings.grants),
            policy=recipe.policy,
            isolation=recipe.backend.name,
            claude=f"{claude}:{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}",
            ca_certificate=self._ca,
            workspace=recipe.stand_in.kind,
        )
