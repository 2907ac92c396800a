"""A spent error budget keeps work of low priority waiting, on both engines, until it is back."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anthropic
import pytest
from anthropic import Anthropic
from sqlalchemy import delete
from typer.testing import CliRunner

from gateway_rig import Rig
from ringfence import wiring
from ringfence.cli.context import AppContext
from ringfence.cli.main import app
from ringfence.config import Config, LatencySettings, SloSettings
from ringfence.control.holding import WORDS, hold_back
from ringfence.control.outbox import Outbox
from ringfence.control.slo_watch import Watch
from ringfence.control.turns import Settled, Superseded
from ringfence.model import RunStatus, SessionStatus
from ringfence.queue.embedded import EmbeddedQueue
from ringfence.queue.protocol import Lease, Queue, QueueSettings, RetryAfter
from ringfence.slo.budget import BUDGET, Seen
from ringfence.store import sessions, slo
from ringfence.store.database import Database, now, open_sqlite
from ringfence.store.slo import AlertRow
from ringfence.store.tables import SLO_WATCH
from ringfence.wiring import queue_on_temporal
from ringfence.worker import holding
from ringfence.worker.holding import held_back, pause
from session_rig import a_session, handled, rows_of, say
from slo_rig import an_environment, ended
from worker_rig import handler

SETTINGS = SloSettings(success=0.9)
MONTH = 32 * 86_400 * 1_000_000


@pytest.fixture
async def database(place: Any) -> Any:
    found = place.open()
    await found.migrate()
    yield found
    await found.close()


async def spent(database: Database, place: slo.Environment, state: str = "firing") -> None:
    """Its budget, as whoever looks would write it down."""
    row = AlertRow(
        tenant_id=place[0],
        environment_id=place[1],
        sli="success",
        rule=BUDGET,
        state=state,
        since=now(),
        relief_at=now() + 3_600_000_000,
        told={},
    )
    async with database.writing() as connection:
        await slo.put(connection, row)


async def a_turn(database: Database, place: slo.Environment, priority: int) -> str:
    session = await a_session(database, place[0], environment_id=place[1], priority=priority)
    await say(database, session, "hello")
    return session


def lease(session: str, priority: int, attempt: int = 1) -> Lease:
    return Lease(run_id=f"{session}.1", tenant="t", priority=priority, attempt=attempt, failures=0)


async def types(database: Database, session: str) -> list[str]:
    _, found = await rows_of(database, session)
    return [event.type for event in found]


async def test_who_looks_says_how_many_wait(database: Database) -> None:
    told: list[Sequence[Seen]] = []
    place = await an_environment(database)
    await ended(database, place, now(), bad=20)
    async with database.writing() as connection:
        await connection.execute(delete(SLO_WATCH))
    watch = Watch(database, SETTINGS, tell=told.append)
    assert await watch.look()
    for _ in range(3):
        turn = await a_turn(database, place, 4)
        with pytest.raises(RetryAfter):
            await held_back(database, SETTINGS, lease(turn, 4))
    assert await watch.look()
    before, after = ({one.environment: one.held_back for one in each}[place[1]] for each in told)
    assert (before, after) == (0, 3)


async def test_only_low_priority_of_that_environment_waits(database: Database) -> None:
    place, other = await an_environment(database), await an_environment(database)
    batch = await a_turn(database, place, 4)
    await spent(database, place)
    await spent(database, other, "quiet")
    with pytest.raises(RetryAfter) as later:
        await held_back(database, SETTINGS, lease(batch, 4))
    assert holding.SOONEST <= later.value.seconds <= 1.25 * holding.LATEST
    assert later.value.reason == WORDS
    # the twins: interactive work of it, low priority elsewhere, an operator who does not want it
    interactive = await a_turn(database, place, 3)
    assert await held_back(database, SETTINGS, lease(interactive, 3)) is None
    elsewhere = await a_turn(database, other, 5)
    assert await held_back(database, SETTINGS, lease(elsewhere, 5)) is None
    for mild in (SloSettings(), SloSettings(success=0.9, hold_back=False)):
        assert await held_back(database, mild, lease(batch, 4, 2)) is None
    async with database.reading() as connection:
        held = await slo.held(connection)
    assert (held[place], other in held) == (1, False)


async def test_a_session_says_once_that_it_waits_and_is_told_its_messages_later(
    database: Database,
) -> None:
    place = await an_environment(database)
    session = await a_turn(database, place, 4)
    await spent(database, place)
    for attempt in (1, 2, 5):
        with pytest.raises(RetryAfter):
            await held_back(database, SETTINGS, lease(session, 4, attempt))
    row, said = await rows_of(database, session)
    assert (row.status, row.attempt) == (SessionStatus.RESCHEDULING, 5)
    assert [event.type for event in said][-2:] == ["session.error", "session.status_rescheduled"]
    assert [event.type for event in said].count("session.error") == 1
    (error,) = [event.body["error"] for event in said if event.type == "session.error"]
    assert (error["retry_status"]["type"], error["message"]) == ("retrying", WORDS)
    with pytest.raises(Superseded):
        await held_back(database, SETTINGS, lease(session, 4, 5))
    await spent(database, place, "quiet")
    assert await held_back(database, SETTINGS, lease(session, 4, 6)) is None
    assert await handled(database, lease(session, 4, 6)) is RunStatus.SUCCEEDED
    row, said = await rows_of(database, session)
    assert (row.status, row.held_at) == (SessionStatus.IDLE, None)
    (answer,) = [event for event in said if event.type == "agent.message"]
    assert answer.body["content"][0]["text"] == "did hello"


async def test_who_interrupts_is_not_kept_waiting_and_what_is_over_is_over(
    database: Database,
) -> None:
    place = await an_environment(database)
    session = await a_turn(database, place, 4)
    await spent(database, place)
    with pytest.raises(RetryAfter):
        await held_back(database, SETTINGS, lease(session, 4))
    await say(database, session, "", kind="user.interrupt")
    assert await held_back(database, SETTINGS, lease(session, 4, 2)) is None
    assert await handled(database, lease(session, 4, 2)) is RunStatus.SUCCEEDED
    over = await held_back(database, SETTINGS, lease(session, 4, 3))
    assert over == Settled(status=RunStatus.SUCCEEDED, tenant=place[0])
    async with database.writing() as connection:
        assert await hold_back(connection, "sesn_gone.1", 1) == Settled(status=RunStatus.CANCELLED)


async def test_the_worker_asks_before_it_does_anything(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = await an_environment(database)
    batch, interactive = await a_turn(database, place, 4), await a_turn(database, place, 3)
    await spent(database, place)
    queue = EmbeddedQueue(tmp_path / "queue.sqlite")
    worker = handler(database, queue, tmp_path, slo=SETTINGS)
    monkeypatch.setattr(type(worker), "_handle", lambda self, lease: handled(database, lease))
    with pytest.raises(RetryAfter):
        await worker(lease(batch, 4))
    assert await worker(lease(interactive, 3)) is RunStatus.SUCCEEDED
    await queue.close()


def test_those_that_wait_do_not_come_back_together() -> None:
    waits = {pause(f"sesn_{number}.1", 10_000.0) for number in range(500)}
    assert len(waits) > 490
    assert min(waits) >= 0.75 * holding.LATEST
    assert max(waits) <= 1.25 * holding.LATEST
    assert pause("r", -5.0) >= 0.75 * holding.SOONEST


@asynccontextmanager
async def engine(address: str, place: Path) -> AsyncIterator[Queue]:
    settings = QueueSettings(lease_seconds=5.0, drain_seconds=5.0)
    queue: Queue
    if not address:
        queue = EmbeddedQueue(place / "queue.sqlite", settings)
    else:
        access = {"engine": "temporal", "address": address, "name": secrets.token_hex(6)}
        queue = queue_on_temporal(access, settings=settings, file=place / "platform.sqlite")
    try:
        yield queue
    finally:
        await queue.close()


async def until(true: Callable[[], Any], seconds: float = 120.0) -> None:
    async with asyncio.timeout(seconds):
        while not await true():
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("kind", ["embedded", "temporal"])
async def test_it_waits_in_the_queue_and_comes_back_by_itself(
    kind: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(holding, "SOONEST", 0.2)
    monkeypatch.setattr(holding, "LATEST", 0.3)
    address = request.getfixturevalue("temporal_server") if kind == "temporal" else ""
    database = open_sqlite(tmp_path / "platform.sqlite")
    await database.migrate()
    place, other = await an_environment(database), await an_environment(database)
    at = [now()]
    await ended(database, place, at[0], bad=20)
    watch = Watch(database, SETTINGS, clock=lambda: at[0])
    assert await watch.look()
    batch, interactive, elsewhere = (
        await a_turn(database, place, 4),
        await a_turn(database, place, 3),
        await a_turn(database, other, 4),
    )
    attempts: list[str] = []

    async def work(lease: Lease) -> RunStatus:
        attempts.append(lease.run_id)
        over = await held_back(database, SETTINGS, lease)
        return over.status if over is not None else await handled(database, lease)

    async def is_idle(session: str) -> bool:
        row, _ = await rows_of(database, session)
        return row.status is SessionStatus.IDLE

    async def tried(session: str, times: int) -> bool:
        return attempts.count(f"{session}.1") >= times

    async with engine(address, tmp_path) as queue:
        await Outbox(database, queue).sweep()
        stop = asyncio.Event()
        working = asyncio.get_running_loop().create_task(queue.run_worker(work, slots=2, stop=stop))
        try:
            for session in (interactive, elsewhere):
                await until(lambda session=session: is_idle(session))
            await until(lambda: tried(batch, 3))
            row, _ = await rows_of(database, batch)
            assert row.status is SessionStatus.RESCHEDULING
            assert await queue.outcome(f"{batch}.1") is None
            assert (await types(database, batch)).count("session.error") == 1
            if kind == "embedded":
                stats = await queue.stats()
                assert stats.depth + stats.running == 1
            # a month later the bad runs are out of the window
            at[0] += MONTH
            await watch.look()
            await until(lambda: is_idle(batch))

            async def known() -> bool:
                return await queue.outcome(f"{batch}.1") is RunStatus.SUCCEEDED

            await until(known)
        finally:
            stop.set()
            await working
        assert await queue.dead_letters() == ()
    assert (await types(database, batch)).count("agent.message") == 1
    await database.close()


def command(config: Config, *arguments: str) -> Any:
    context = AppContext(
        config=config,
        launcher=None,  # type: ignore[arg-type]
        run=None,  # type: ignore[arg-type]
        platform=lambda: wiring.platform(config),
        queue=lambda drain: wiring.queue(config, drain),
    )
    return CliRunner().invoke(app, [*arguments], obj=context)


def test_the_operator_sees_it(tmp_path: Path) -> None:
    config = Config(state_dir=tmp_path / "state", slo=SETTINGS)

    async def prepare() -> tuple[slo.Environment, str]:
        database = open_sqlite(config.state_dir / "platform" / "platform.sqlite")
        await database.migrate()
        place = await an_environment(database, slo={"success": 0.8})
        await ended(database, place, now(), good=5, bad=15)
        await Watch(database, SETTINGS).look()
        session = await a_turn(database, place, 4)
        with pytest.raises(RetryAfter):
            await held_back(database, SETTINGS, lease(session, 4))
        await database.close()
        return place, session

    place, _ = asyncio.run(prepare())
    stats = json.loads(command(config, "queue", "stats", "--json").stdout)
    assert stats["held_back"] == 1
    asked = ("slo", "status", "--environment", place[1])
    (told,) = json.loads(command(config, *asked, "--json").stdout)
    assert (told["environment_id"], told["held_back"]) == (place[1], 1)
    (objective,) = told["objectives"]
    assert (objective["bad"], objective["total"], objective["exhausted"]) == (15, 20, True)
    assert objective["left"] == -2.75
    assert {one["rule"] for one in objective["firing"]} == {BUDGET, "ticket"}
    assert objective["relief_at"] is not None
    shown = command(config, *asked).stdout
    assert "success 0.8 in 30 days: -275.0% left, 15 of 20 bad" in shown
    assert "FIRING" in shown
    every = json.loads(command(config, "slo", "list", "--json").stdout)
    shares = {one["environment_id"]: one["objectives"][0]["share"] for one in every}
    # its own, and the operator's of one that says nothing
    assert (shares.pop(place[1]), *shares.values()) == (0.8, 0.9)
    assert "success 0.8 in 30 days" in command(config, "slo", "list").stdout
    assert "agent-denied" in command(config, "slo", "list", "--counts").stdout
    unknown = command(config, "slo", "status", "--environment", "env_x", "--json")
    assert (unknown.exit_code, json.loads(unknown.stdout)["error"]["code"]) == (
        2,
        "environment-not-found",
    )
    nothing = command(Config(state_dir=tmp_path / "state"), "slo", "status")
    assert nothing.exit_code == 2


@pytest.fixture(scope="module")
def rig(place: Any, tmp_path_factory: pytest.TempPathFactory) -> Rig:
    promised = SloSettings(success=0.9, latency=LatencySettings(share=0.9, seconds=60))
    return Rig(place=place, slo=promised, queue=tmp_path_factory.mktemp("q") / "q.sqlite")


@pytest.fixture(scope="module")
def client(rig: Rig) -> Any:
    with (
        rig.serving() as url,
        Anthropic(base_url=url, api_key=rig.key().text, max_retries=0) as made,
    ):
        yield made


def test_a_session_says_that_nobody_waits_for_it(rig: Rig, client: Anthropic) -> None:
    agent = client.beta.agents.create(name="a", model="claude-opus-5-5").id
    usual = client.beta.environments.create(name="u", config={"type": "cloud"}).id
    batch = client.beta.environments.create(
        name="b", config={"type": "cloud"}, extra_body={"ringfence": {"priority": "batch"}}
    ).id

    def made(environment: str, **block: object) -> str:
        found = client.beta.sessions.create(
            agent=agent, environment_id=environment, extra_body={"ringfence": block}
        )
        return found.id

    ids = [made(usual), made(usual, batch=True), made(batch), made(batch, batch=False)]
    changed = made(usual)
    client.beta.sessions.update(changed, extra_body={"ringfence": {"batch": True}})
    back = made(batch, batch=False)
    client.beta.sessions.update(back, extra_body={"ringfence": {"batch": None}})
    with pytest.raises(anthropic.BadRequestError, match="batch"):
        made(usual, batch="urgent")

    async def priorities() -> list[int]:
        database = rig.place.open()
        found = []
        async with database.writing() as connection:
            for one in (*ids, changed, back):
                row = await sessions.find(connection, one)
                assert row
                found.append(row.priority)
        await database.close()
        return found

    assert asyncio.run(priorities()) == [3, 4, 4, 3, 4, 4]


def test_a_session_that_is_held_back_says_so(rig: Rig, client: Anthropic) -> None:
    agent = client.beta.agents.create(name="a", model="claude-opus-5-5").id
    place = client.beta.environments.create(name="h", config={"type": "cloud"}).id
    session = client.beta.sessions.create(
        agent=agent, environment_id=place, extra_body={"ringfence": {"batch": True}}
    ).id
    message = {"type": "user.message", "content": [{"type": "text", "text": "hello"}]}
    client.beta.sessions.events.send(session, events=[message])  # type: ignore[list-item]
    assert client.beta.sessions.retrieve(session).status == "running"

    async def held() -> None:
        database = rig.place.open()
        async with database.writing() as connection:
            await hold_back(connection, f"{session}.1", 1)
        await database.close()

    asyncio.run(held())
    assert client.beta.sessions.retrieve(session).status == "rescheduling"
    (error,) = [
        one for one in client.beta.sessions.events.list(session) if one.type == "session.error"
    ]
    assert error.error.message.startswith("error-budget-spent")
    assert error.error.retry_status.type == "retrying"


@pytest.mark.parametrize(
    ("block", "allowed"),
    [
        ({"success": 0.9}, True),
        ({"success": 0.7}, True),
        ({"success": 0.95}, False),
        ({"latency": {"share": 0.9, "seconds": 60}}, True),
        ({"latency": {"share": 0.5, "seconds": 600}}, True),
        ({"latency": {"share": 0.9, "seconds": 30}}, False),
        ({"latency": {"share": 0.99, "seconds": 60}}, False),
    ],
)
def test_an_environment_promises_no_more_than_the_operator(
    client: Anthropic, block: Any, allowed: bool
) -> None:
    def make() -> Any:
        return client.beta.environments.create(
            name="s", config={"type": "cloud"}, extra_body={"ringfence": {"slo": block}}
        )

    if allowed:
        assert make().ringfence["slo"] == block
    else:
        with pytest.raises(anthropic.PermissionDeniedError, match=r"ringfence\.slo"):
            make()


def test_what_is_no_promise_is_refused(client: Anthropic) -> None:
    for block in ({"success": 1.0}, {"latency": {"share": 0.9, "seconds": 61}}):
        with pytest.raises(anthropic.BadRequestError):
            client.beta.environments.create(
                name="s", config={"type": "cloud"}, extra_body={"ringfence": {"slo": block}}
            )
