"""Limits on the model route: egress' protocol on real sockets, a worker's desk, a shared store, and a
simulated provider that counts for itself.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, Self

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from egress_rig import RULES, Recorder, ask, message, until
from egress_rig import _answer as answer_of

from ringfence.channel.messages import (
    DeskMessage,
    ModelCalled,
    ModelTurn,
    ProviderConfig,
    PutOff,
)
from ringfence.config import LimitSettings
from ringfence.egress.address import Resolver
from ringfence.egress.credentials import Credentials
from ringfence.egress.model import RunState
from ringfence.egress.sandboxes import SandboxState, Shared
from ringfence.egress.server import Client
from ringfence.egress.tls import upstream_context
from ringfence.egress.turns import Turns
from ringfence.errors import UnavailableError
from ringfence.limits.sqlite import SqliteLimits
from ringfence.record.events import BudgetAlerted
from ringfence.simulator.script import Scenario
from ringfence.simulator.server import Simulator
from ringfence.testing.upstream import make_chain
from ringfence.worker.desk import Desk


class Told(Recorder):
    """Keeps the worker's records, too."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Any] = []

    async def append(self, event: Any, *, durable: bool = True) -> int:
        self.events.append(event)
        return 0


class Worker:
    """One egress and one desk; its sandboxes by name, as `tenant/number`."""

    def __init__(
        self, place: Path, url: str, settings: LimitSettings, store: Any, name: str
    ) -> None:
        self.recorder, self.notices, self._place = Told(), list[Any](), place
        self.sandboxes: dict[str, SandboxState] = {}
        self.turns = Turns(self._heard)
        self.desk = Desk(
            settings, store, self.recorder, reply=self._reply, post=self.notices.append, name=name
        )
        self.providers = {"anthropic": ProviderConfig(base_url=url, credential=None)}
        self.shared = Shared(
            recorder=self.recorder,  # type: ignore[arg-type]
            credentials=Credentials({}),
            providers=self.providers,
            resolver=Resolver({}, {}),
            authority=None,
            upstream_tls=upstream_context(str(place / "ca.pem")),
            notify=self._heard,
            tell=lambda one: self._heard(ModelCalled(**one)),
            turns=self.turns,
        )
        self.name = name

    def _heard(self, notice: Any) -> None:
        if isinstance(notice, DeskMessage):
            # as over the channel: later, and in order
            asyncio.get_running_loop().call_soon(self.desk.heard, notice)
        else:
            self.notices.append(notice)

    async def _reply(self, kind: type[ModelTurn], **fields: Any) -> None:
        self.turns.told(kind(**fields))

    async def sandbox(self, name: str, **more: Any) -> str:
        """Its socket."""
        state = SandboxState(
            sandbox_id=name,
            run_id=f"run-{name}",
            session_id="",
            rules=RULES,
            shared=self.shared,
            run=RunState(RULES.model),
            credentials=self.shared.credentials,
            tenant=name.partition("/")[0],
            **more,
        )
        path = str(self._place / f"{self.name}-{name.replace('/', '-')}.sock")
        loop = asyncio.get_running_loop()
        state.servers.append(await loop.create_unix_server(lambda: Client(state), path))
        self.sandboxes[name] = state
        return path

    async def close(self) -> None:
        for state in self.sandboxes.values():
            working = state.close()
            if working:
                await asyncio.wait(working, timeout=5)
        await asyncio.sleep(0.01)
        await self.desk.close()


class Fleet:
    """`async with Fleet(settings, limits) as fleet`: workers on one store, before one provider."""

    def __init__(
        self, settings: dict[str, Any], limits: dict[str, Any] | None, workers: int = 1
    ) -> None:
        self.settings, self._count = LimitSettings.model_validate(settings), workers
        scenario = {"default": [{"text": "OK.", "output_tokens": 50}], "limits": limits}
        self.simulator = Simulator(Scenario.model_validate(scenario))
        self.served: list[tuple[float, str, int]] = []

    async def __aenter__(self) -> Self:
        self._directory = tempfile.TemporaryDirectory(prefix="rf-fleet-")
        place = self.place = Path(self._directory.name)
        make_chain(place, ["x.rig-test.com"])
        self.simulator.__enter__()
        self.workers = [self.worker(f"w{number}") for number in range(self._count)]
        return self

    def worker(self, name: str, store: Any = None) -> Worker:
        store = store or SqliteLimits(self.place / "limits" / "limits.sqlite")
        return Worker(self.place, self.simulator.base_url, self.settings, store, name)

    async def __aexit__(self, *_: object) -> None:
        for worker in self.workers:
            await worker.close()
        await asyncio.to_thread(self.simulator.__exit__)
        self._directory.cleanup()

    async def run(self, path: str, tenant: str, requests: int) -> None:
        """An agent: one request after the other."""
        for _ in range(requests):
            head = await self.one(path)
            self.served.append((time.monotonic(), tenant, int(head.split(b" ")[1])))

    async def one(self, path: str, **fields: Any) -> bytes:
        reader, writer = await asyncio.open_unix_connection(path)
        try:
            writer.write(ask(stream=True, **fields) if "model" not in fields else ask(**fields))
            return await asyncio.wait_for(answer_of(reader), 120)
        finally:
            writer.close()


async def load(fleet: Fleet, runs: dict[str, int], each: int) -> float:
    """So many runs a tenant, spread over the workers; seconds that it took."""
    paths, number = [], 0
    for tenant, count in runs.items():
        for _ in range(count):
            worker = fleet.workers[number % len(fleet.workers)]
            paths.append((await worker.sandbox(f"{tenant}/{number}"), tenant))
            number += 1
    began = time.monotonic()
    await asyncio.gather(*(fleet.run(path, tenant, each) for path, tenant in paths))
    return time.monotonic() - began


async def test_a_fleet_over_its_limit_sees_no_429() -> None:
    """Eight runs of two workers ask for as much as they can; the provider counts for itself."""
    settings = {"rates": {"all": {"requests": 60, "window_seconds": 3}}, "burst": 0.2}
    async with Fleet(settings, {"requests": 60, "window_seconds": 3}, workers=2) as fleet:
        took = await load(fleet, {"a": 6, "b": 2}, 10)
        assert Counter(status for _, _, status in fleet.served) == {200: 80}
        # never more than the limit; that it is used is for the storm, on a host that is not busy
        assert (80 - 12) / took <= 20
        # a had three times as many runs, and no more than its share while both asked
        while_both = [tenant for _, tenant, _ in sorted(fleet.served)][12:36]
        assert 9 <= while_both.count("b") <= 15


@pytest.mark.storm
async def test_a_large_fleet_uses_its_limit() -> None:
    """8 workers x 50 runs that all ask at once: nothing fails, and the limit is used."""
    window, limit = 6.0, 120
    rate = {"requests": limit, "window_seconds": window}
    settings = {"rates": {"all": rate}, "burst": 0.2, "fill": 0.98}
    runs = dict.fromkeys("abcd", 100)
    async with Fleet(settings, rate, workers=8) as fleet:
        took = await load(fleet, runs, 4)
        assert Counter(status for _, _, status in fleet.served) == {200: 1600}
        assert fleet.simulator.refused <= 160
        assert (1600 - 0.2 * limit) / took >= 0.95 * limit / window
        half = [tenant for _, tenant, _ in sorted(fleet.served)][:800]
        for tenant in runs:
            assert half.count(tenant) == pytest.approx(200, rel=0.1)


async def test_a_limit_that_nobody_told_us_is_learned() -> None:
    """The provider's own 429 is waited out, and its headers are the limit from then on."""
    settings = {"rates": {"all": {"window_seconds": 1}}}
    async with Fleet(settings, {"requests": 8, "window_seconds": 1.0}) as fleet:
        (worker,) = fleet.workers
        path = await worker.sandbox("a/0")
        heads = await asyncio.gather(*(fleet.one(path) for _ in range(16)))
        assert {head.split(b" ")[1] for head in heads} == {b"200"}
        assert fleet.simulator.refused > 0
        answered = [each["status"] for each in worker.recorder.of("model.answered")]
        assert Counter(answered)[200] == 16
        assert Counter(answered)[429] == fleet.simulator.refused
        lane, _ = await SqliteLimits(fleet.place / "limits" / "limits.sqlite").look(
            "default/anthropic/all"
        )
        assert lane.learned.requests == 8


async def test_one_that_would_wait_too_long_gives_its_place_up_and_keeps_it() -> None:
    settings = {
        "rates": {"all": {"requests": 2, "window_seconds": 6}},
        "hold_seconds": 0.3,
    }
    async with Fleet(settings, None) as fleet:
        (worker,) = fleet.workers
        first, second = [await worker.sandbox(f"a/{n}") for n in range(2)]
        assert b" 200 " in await fleet.one(first)
        refused = await fleet.one(second)
        assert refused.startswith(b"HTTP/1.1 403")
        assert b"x-ringfence-reason: model-put-off" in refused
        assert b"x-should-retry: false" in refused
        told = [each for each in worker.notices if isinstance(each, PutOff)]
        assert [each.sandbox_id for each in told] == ["a/1"]
        assert 1 <= told[0].seconds <= 4
        # while it is away nobody is held up by it, and when it is back it comes before later ones
        store = SqliteLimits(fleet.place / "limits" / "limits.sqlite")
        lane, _ = await store.look("default/anthropic/all")
        assert [(key, each.parked) for key, each in lane.tickets.items()] == [("run-a/1/0", True)]
        fleet.settings = LimitSettings.model_validate({**settings, "hold_seconds": 60})
        patient = fleet.worker("patient")
        fleet.workers.append(patient)
        order: list[str] = []

        async def asks(name: str) -> None:
            assert b" 200 " in await fleet.one(await patient.sandbox(name))
            order.append(name)

        later = asyncio.ensure_future(asks("a/2"))
        await until_waiting(store, 2)
        await asyncio.gather(later, asks("a/1"))
        assert order == ["a/1", "a/2"]
        lane, _ = await store.look("default/anthropic/all")
        assert lane.tickets == {}
        await store.close()


async def test_what_is_left_is_believed_when_an_answer_begins() -> None:
    """A stream takes minutes; others of the organisation have used the limit up now."""
    settings = {"rates": {"all": {"requests": 1000, "window_seconds": 1000}}}
    async with Fleet(settings, None) as fleet:
        (worker,) = fleet.workers
        path = await worker.sandbox("a/0")
        left = b"anthropic-ratelimit-requests-remaining: 3\r\n"
        head, _, body = message().partition(b"\r\n\r\n")
        ends, store = asyncio.Event(), SqliteLimits(fleet.place / "limits" / "limits.sqlite")
        async with replaced(fleet, worker, head + b"\r\n" + left + b"\r\n", body, ends):
            asking = asyncio.ensure_future(fleet.one(path, model="claude-sonnet-5"))
            async with asyncio.timeout(10):
                while (await store.look("default/anthropic/all"))[0].levels[0] != 3.0:
                    await asyncio.sleep(0.01)
            assert not asking.done()
            ends.set()
            assert b" 200 " in await asking
        await store.close()


async def test_a_client_that_goes_away_leaves_the_queue() -> None:
    settings = {"rates": {"all": {"requests": 10, "window_seconds": 100}}}
    async with Fleet(settings, None) as fleet:
        (worker,) = fleet.workers
        path = await worker.sandbox("a/0")
        assert b" 200 " in await fleet.one(path)
        _, writer = await asyncio.open_unix_connection(path)
        writer.write(ask(stream=True))
        store = SqliteLimits(fleet.place / "limits" / "limits.sqlite")
        await until_waiting(store, 1)
        writer.close()
        await until_waiting(store, 0)
        assert worker.desk._open == {}
        assert worker.turns._held == {}
        assert len(fleet.simulator.requests) == 1
        await store.close()


async def until_waiting(store: SqliteLimits, count: int) -> None:
    async with asyncio.timeout(10):
        while len((await store.look("default/anthropic/all"))[0].tickets) != count:
            await asyncio.sleep(0.01)


async def test_a_refusal_that_time_does_not_mend_is_passed_on() -> None:
    """Spend limits say `x-should-retry: false`: held open they would be asked for ever."""
    async with Fleet({"rates": {"all": {}}}, None) as fleet:
        headers = {"x-should-retry": "false"}
        step = {"error": 429, "headers": headers, "times": 1}
        fleet.simulator.__exit__()
        fleet.simulator = Simulator(Scenario.model_validate({"default": [step, {"text": "OK."}]}))
        fleet.simulator.__enter__()
        worker = fleet.worker("late")
        fleet.workers.append(worker)
        path = await worker.sandbox("a/0")
        assert (await fleet.one(path)).startswith(b"HTTP/1.1 429")
        assert b" 200 " in await fleet.one(path)


BUDGET = {"budgets": {"daily": {"tenant": "*", "period": "day", "usd": 1.0, "alert": 0.5}}}


async def test_a_budget_stops_before_the_request_that_would_exceed_it() -> None:
    """Hard, for each tenant by itself, with an event at its alert."""
    async with Fleet(BUDGET, None) as fleet:
        (worker,) = fleet.workers
        a, b = await worker.sandbox("a/0"), await worker.sandbox("b/0")
        # claude-sonnet-5: $15 a million tokens of output; 20 000 are 30 cents at worst
        asked = {"model": "claude-sonnet-5", "max_tokens": 20_000}
        text = message(usage={"input_tokens": 0, "output_tokens": 18_000})
        statuses = []
        async with replaced(fleet, worker, text):
            for _ in range(4):
                head = await fleet.one(a, **asked)
                statuses.append(int(head.split(b" ")[1]))
            assert statuses == [200, 200, 200, 403]
            assert b"budget-exhausted-daily" in head
            assert b"x-should-retry: false" in head
            assert b" 200 " in await fleet.one(b, **asked)
        await until(lambda: worker.desk._open == {} and not worker.desk._tasks)
        alerts = [each for each in worker.recorder.events if isinstance(each, BudgetAlerted)]
        assert [each.budget.rsplit("/", 1)[0] for each in alerts] == ["daily/a"]
        assert alerts[0].spent_usd == pytest.approx(0.54)
        store = SqliteLimits(fleet.place / "limits" / "limits.sqlite")
        spent = {each.key.split("/")[1]: each for each in await store.budgets()}
        assert spent["a"].spent.usd == pytest.approx(3 * 0.27)
        assert spent["a"].spent.usd == pytest.approx(worker.sandboxes["a/0"].run.spent.cost_usd)
        assert spent["a"].held == (0.0, 0.0)
        await store.close()


class replaced:
    """Another provider, which says the same to everybody."""

    def __init__(
        self,
        fleet: Fleet,
        worker: Worker,
        answer: bytes,
        rest: bytes = b"",
        when: asyncio.Event | None = None,
    ) -> None:
        self._worker, self._answer, self._rest, self._when = worker, answer, rest, when

    async def __aenter__(self) -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(
                line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")
            )
            await reader.readexactly(int(length.split(b":")[1]))
            writer.write(self._answer)
            await writer.drain()
            if self._when is not None:
                await self._when.wait()
            writer.write(self._rest)
            await writer.drain()
            writer.close()

        self._server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        self._worker.providers["anthropic"] = ProviderConfig(
            base_url=f"http://127.0.0.1:{port}", credential=None
        )

    async def __aexit__(self, *_: object) -> None:
        self._server.close()


async def test_a_model_without_a_price_is_refused_under_a_budget() -> None:
    async with Fleet(BUDGET, None) as fleet:
        (worker,) = fleet.workers
        path = await worker.sandbox("a/0")
        refused = await fleet.one(path, model="gpt-unknown")
        assert b"budget-exhausted-model-not-priced" in refused
        assert fleet.simulator.requests == []
        assert b" 200 " in await fleet.one(path, model="claude-sonnet-5")


class Away:
    """A store that does not answer, or answers what nobody expects."""

    def __init__(self, error: Exception) -> None:
        self.asked, self._error = 0, error

    def __getattr__(self, name: str) -> Any:
        async def act(*_: Any, **__: Any) -> Any:
            self.asked += 1
            raise self._error

        async def close() -> None:
            return None

        def at_once(*_: Any) -> Any:
            self.asked += 1
            raise self._error

        return {"close": close, "take_now": at_once}.get(name, act)


@pytest.mark.parametrize("error", [UnavailableError("store-unavailable", "away"), KeyError("at")])
@pytest.mark.parametrize("more", [{}, BUDGET])
async def test_without_its_store_nothing_passes(error: Exception, more: dict[str, Any]) -> None:
    """Nothing leaves that was not counted: the run goes back to the queue."""
    settings = {"rates": {"all": {"requests": 60}}, "hold_seconds": 0.2, **more}
    async with Fleet(settings, None) as fleet:
        store = Away(error)
        worker = fleet.worker("away", store)
        fleet.workers.append(worker)
        path = await worker.sandbox("a/0")
        assert b"model-put-off" in await fleet.one(path)
        assert store.asked > 0
        assert fleet.simulator.requests == []
        allowed = await fleet.workers[0].sandbox("a/1")
        assert b" 200 " in await fleet.one(allowed)


async def test_counting_tokens_waits_for_nothing() -> None:
    settings = {"rates": {"all": {"requests": 1, "window_seconds": 60}}, "hold_seconds": 0}
    async with Fleet(settings, None) as fleet:
        (worker,) = fleet.workers
        path = await worker.sandbox("a/0")
        assert b" 200 " in await fleet.one(path)
        body = {"messages": [{"role": "user", "content": "hi"}]}
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(ask("/v1/messages/count_tokens", **body))
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
        writer.close()
        assert head.startswith(b"HTTP/1.1 200")
        assert b" 403 " in await fleet.one(path)
