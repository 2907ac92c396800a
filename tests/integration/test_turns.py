"""Turns on both databases: one attempt or two, in any order, leave what one would have left."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import func, select

from gateway_rig import Place
from ringfence.control import turns
from ringfence.control.journal import Journal
from ringfence.control.turns import Action, ActionKind, NewEvent, Settled, Superseded, Turn, TurnEnd
from ringfence.errors import CallerError
from ringfence.model import RunStatus, SessionStatus, Usage
from ringfence.queue.protocol import BATCH, NORMAL
from ringfence.store import sessions
from ringfence.store.database import Database, now
from ringfence.store.tables import EVENTS, TURNS
from session_rig import a_session, a_tenant, rows_of, say


@pytest.fixture
async def database(place: Place) -> Any:
    found = place.open()
    await found.migrate()
    yield found
    await found.close()


@pytest.fixture
async def session(database: Database) -> str:
    return await a_session(database, await a_tenant(database))


async def claimed(database: Database, run: str, attempt: int) -> Turn:
    async with database.writing() as connection:
        turn = await turns.claim(connection, run, attempt)
    assert isinstance(turn, Turn)
    return turn


async def did(database: Database, act: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    async with database.writing() as connection:
        return await act(connection, *arguments, **options)


def texts(turn: Turn) -> list[str]:
    return [message.content[0]["text"] for message in turn.messages]


def message(text: str) -> NewEvent:
    return NewEvent(type="agent.message", body={"content": [{"type": "text", "text": text}]})


DONE = TurnEnd(status=RunStatus.SUCCEEDED)


async def test_a_turn_is_claimed_carried_out_and_settled(database: Database, session: str) -> None:
    await say(database, session, "one", "two")
    turn = await claimed(database, f"{session}.1", 1)
    assert texts(turn) == ["one", "two"]
    assert turn.run_id == f"{session}.1"
    assert not turn.transcript_begun
    (said,) = await did(database, turns.append, turn, [message("hello")], usage=Usage(requests=1))
    end = replace(DONE, events=[message("bye")], usage=Usage(requests=2), workspace="w1")
    settled = await did(database, turns.settle, turn, end)
    assert settled == Settled(status=RunStatus.SUCCEEDED, tenant=turn.tenant)
    row, events = await rows_of(database, session)
    assert [event.type for event in events] == [
        "user.message",
        "user.message",
        "session.status_running",
        "agent.message",
        "agent.message",
        "session.status_idle",
    ]
    assert [event.position for event in events] == [1, 2, 3, 4, 5, 6]
    assert events[3].id == said
    assert all(event.processed_at for event in events)
    assert {event.turn for event in events} == {1}
    assert events[-1].body == {"stop_reason": {"type": "end_turn"}}
    assert (row.status, row.workspace, row.transcript_begun) == (SessionStatus.IDLE, "w1", True)
    assert (row.usage["requests"], row.unqueued_at, row.running_since) == (3, None, None)
    assert row.active_us > 0
    # over is over, for whoever asks again
    again = await did(database, turns.claim, f"{session}.1", 2)
    assert again == Settled(status=RunStatus.SUCCEEDED, tenant=turn.tenant)
    for act in (turns.append, turns.settle):
        with pytest.raises(Superseded):
            await did(database, act, turn, [] if act is turns.append else DONE)
    assert (await rows_of(database, session))[1] == events


async def test_a_later_attempt_gets_the_same_and_fences_the_one_before(
    database: Database, session: str
) -> None:
    await say(database, session, "one")
    first = await claimed(database, f"{session}.1", 1)
    await say(database, session, "late", "later")
    taken = await did(database, turns.inbox, first, take=True)
    assert [one.content[0]["text"] for one in taken.messages] == ["late", "later"]
    await say(database, session, "last")
    second = await claimed(database, f"{session}.1", 3)
    assert texts(second) == ["one", "late", "later"]
    before = await rows_of(database, session)
    with pytest.raises(Superseded) as caught:
        await did(database, turns.append, first, [message("ghost")])
    assert caught.value.code == "attempt-superseded"
    for act, what in (
        (turns.settle, DONE),
        (turns.inbox, 0),
        (turns.put_off, None),
    ):
        arguments = () if what is None else (what,)
        options = {"take": True} if act is turns.inbox else {}
        with pytest.raises(Superseded):
            await did(database, act, first, *arguments, **options)
    for number in (1, 2, 3):
        with pytest.raises(Superseded):
            await did(database, turns.claim, f"{session}.1", number)
    assert await rows_of(database, session) == before
    assert (await did(database, turns.inbox, first)).terminated
    look = await did(database, turns.inbox, second)
    assert (look.terminated, len(look.messages)) == (False, 1)
    kinds = [event.type for event in before[1]]
    assert kinds[-3:] == ["user.message", "session.status_rescheduled", "session.status_running"]
    settled = await did(database, turns.settle, second, DONE)
    assert settled.next_run == f"{session}.2"
    third = await claimed(database, settled.next_run, 1)
    assert texts(third) == ["last"]


async def test_what_waits_for_the_queue_is_found_until_the_queue_has_it(
    database: Database, session: str
) -> None:
    async def waits() -> list[tuple[str, str, int]]:
        async with database.reading() as connection:
            return [
                one
                for one in await turns.unqueued(connection, now() + 1)
                if one[0].startswith(session)
            ]

    assert await waits() == []
    await say(database, session, "one")
    ((run, tenant, priority),) = await waits()
    assert (run, priority) == (f"{session}.1", NORMAL)
    async with database.reading() as connection:
        assert await turns.unqueued(connection, 1) == []
    await did(database, turns.queued, run)
    assert await waits() == []
    turn = await claimed(database, run, 1)
    assert turn.tenant == tenant
    await say(database, session, "two")
    settled = await did(database, turns.settle, turn, DONE)
    # the word about the turn before says nothing about this one
    await did(database, turns.queued, run)
    assert await waits() == [(settled.next_run, tenant, NORMAL)]


async def test_turns_that_nobody_waits_for_come_after_the_others(
    database: Database, session: str
) -> None:
    """From the next turn on, whoever hands it over: the outbox, the turn before, or the sweep."""
    row = (await rows_of(database, session))[0]
    await did(database, sessions.change, row, {"priority": BATCH})
    await say(database, session, "one")
    async with database.reading() as connection:
        found = await turns.unqueued(connection, now() + 1)
        assert (f"{session}.1", row.tenant_id, BATCH) in found
    turn = await claimed(database, f"{session}.1", 1)
    await say(database, session, "two")
    settled = await did(database, turns.settle, turn, DONE)
    assert (settled.next_run, settled.priority) == (f"{session}.2", BATCH)
    await did(database, turns.queued, settled.next_run)
    async with database.reading() as connection:
        at_work = await sessions.at_work(connection, now() + 1, "", 1000)
    assert [one.priority for one in at_work if one.session == session] == [BATCH]


async def test_an_interrupt_reaches_every_attempt_and_not_the_next_turn(
    database: Database, session: str
) -> None:
    await say(database, session, "one")
    first = await claimed(database, f"{session}.1", 1)
    look = await did(database, turns.inbox, first)
    assert not look.interrupt
    await say(database, session, "", kind="user.interrupt")
    look = await did(database, turns.inbox, first, look.last_position)
    assert look.interrupt
    assert not (await did(database, turns.inbox, first, look.last_position)).interrupt
    second = await claimed(database, f"{session}.1", 2)
    assert (await did(database, turns.inbox, second, take=True)).interrupt
    third = await claimed(database, f"{session}.1", 3)
    assert (await did(database, turns.inbox, third)).interrupt
    await say(database, session, "", kind="user.interrupt")
    await say(database, session, "two")
    settled = await did(database, turns.settle, third, replace(DONE, status=RunStatus.CANCELLED))
    fourth = await claimed(database, settled.next_run, 1)
    assert texts(fourth) == ["two"]
    assert not (await did(database, turns.inbox, fourth)).interrupt


async def test_a_turn_that_needs_an_answer_stops_and_messages_wait(
    database: Database, session: str
) -> None:
    await say(database, session, "one")
    turn = await claimed(database, f"{session}.1", 1)
    identity = turns.new_event_id()
    call = NewEvent(type="agent.tool_use", body={"name": "bash", "input": {}}, id=identity)
    action = pending(identity, expires=time.time() + 600)
    await say(database, session, "more")
    settled = await did(
        database, turns.settle, turn, replace(DONE, events=[call], pending=[action])
    )
    assert settled.next_run is None
    row, events = await rows_of(database, session)
    assert row.status is SessionStatus.IDLE
    reason = {"type": "requires_action", "event_ids": [identity]}
    assert events[-1].body == {"stop_reason": reason}
    await say(database, session, "still more")
    assert (await rows_of(database, session))[0].status is SessionStatus.IDLE


def pending(identity: str, *, expires: float) -> Action:
    return Action(
        event_id=identity,
        tool_use_id="toolu_1",
        name="Bash",
        kind=ActionKind.CONFIRMATION,
        input={"command": "ls"},
        expires=expires,
    )


async def test_what_nobody_answered_in_time_waits_no_longer(
    database: Database, session: str
) -> None:
    """The next message begins a turn, which knows the call and no answer to it."""
    identity = turns.new_event_id()
    action = pending(identity, expires=time.time() - 1)
    await say(database, session, "one")
    turn = await claimed(database, f"{session}.1", 1)
    await did(database, turns.settle, turn, replace(DONE, pending=[action]))
    assert (await rows_of(database, session))[0].status is SessionStatus.IDLE
    await say(database, session, "two")
    late = await claimed(database, f"{session}.2", 1)
    assert (texts(late), late.pending, late.answers) == (["two"], (action,), {})


async def test_messages_that_the_agent_was_not_told_are_the_next_turns(
    database: Database, session: str
) -> None:
    identity = turns.new_event_id()
    action = pending(identity, expires=time.time() + 600)
    await say(database, session, "one")
    turn = await claimed(database, f"{session}.1", 1)
    await did(database, turns.settle, turn, replace(DONE, pending=[action], unsaid=True))
    row, events = await rows_of(database, session)
    assert row.status is SessionStatus.IDLE
    assert [event.processed_at for event in events if event.type == "user.message"] == [None]
    async with database.writing() as connection:
        row = await sessions.find(connection, session)
        assert row
        journal = Journal(connection, row)
        body = {"tool_use_id": identity, "result": "allow"}
        said = journal.say("user.tool_confirmation", body, waits=True)
        journal.set(pending=[{**row.pending[0], "answer": said.id}])
        await journal.go_on()
        await journal.write()
    second = await claimed(database, f"{session}.2", 1)
    assert texts(second) == ["one"]
    assert second.answers[identity]["result"] == "allow"
    assert abs(second.answered[identity] - time.time()) < 60


async def test_a_run_that_the_queue_gave_up_leaves_an_idle_session(
    database: Database, session: str
) -> None:
    await say(database, session, "one")
    turn = await claimed(database, f"{session}.1", 5)
    await say(database, session, "waits")
    await did(database, turns.abandon, turn.run_id, "the worker died five times")
    row, events = await rows_of(database, session)
    assert row.status is SessionStatus.IDLE
    assert events[-2].body["error"]["message"] == "the worker died five times"
    assert events[-1].body == {"stop_reason": {"type": "retries_exhausted"}}
    assert all(event.processed_at for event in events)
    with pytest.raises(Superseded):
        await did(database, turns.append, turn, [message("ghost")])
    # twice is once
    await did(database, turns.abandon, turn.run_id, "again")
    assert (await rows_of(database, session))[1] == events
    await say(database, session, "two")
    assert texts(await claimed(database, f"{session}.2", 1)) == ["two"]


async def test_what_is_put_off_is_rescheduled_and_resumed(database: Database, session: str) -> None:
    await say(database, session, "one")
    turn = await claimed(database, f"{session}.1", 1)
    await did(database, turns.put_off, turn)
    assert (await rows_of(database, session))[0].status is SessionStatus.RESCHEDULING
    with pytest.raises(Superseded):
        await did(database, turns.append, turn, [message("ghost")])
    again = await claimed(database, f"{session}.1", 2)
    assert texts(again) == ["one"]
    row, events = await rows_of(database, session)
    assert row.status is SessionStatus.RUNNING
    kinds = [event.type for event in events if event.type.startswith("session.")]
    assert kinds == [f"session.status_{one}" for one in ("running", "rescheduled", "running")]


async def test_a_budget_that_is_spent_begins_no_turn(database: Database) -> None:
    limit = {"type": "limit", "max_list_cost": {"amount": "100", "currency": "USD"}}
    session = await a_session(database, await a_tenant(database), budget=limit)
    await say(database, session, "one")
    turn = await claimed(database, f"{session}.1", 1)
    assert turn.budget_left == 1.0
    await did(database, turns.append, turn, [], usage=Usage(cost_usd=0.25))
    again = await claimed(database, f"{session}.1", 2)
    assert again.budget_left == 0.75
    await say(database, session, "two")
    spent = replace(DONE, usage=Usage(cost_usd=0.75))
    assert (await did(database, turns.settle, again, spent)).next_run is None
    row, events = await rows_of(database, session)
    assert row.status is SessionStatus.IDLE
    await say(database, session, "three")
    row, events = await rows_of(database, session)
    assert row.status is SessionStatus.IDLE
    assert events[-1].body == {"stop_reason": {"type": "budget_reached"}}


async def test_what_is_no_turn_is_refused(database: Database, session: str) -> None:
    for run in (f"{session}.1", f"{session}.0", session, f"{session}.1.1", f"{session}.x", "", "."):
        with pytest.raises(CallerError) as caught:
            await did(database, turns.claim, run, 1)
        assert caught.value.code == "run-unknown"
    gone = await did(database, turns.claim, "sesn_gone.1", 1)
    assert gone.status is RunStatus.CANCELLED
    await say(database, session, "one")
    turn = await claimed(database, f"{session}.1", 1)
    with pytest.raises(ValueError):
        await did(database, turns.settle, turn, replace(DONE, status=RunStatus.RUNNING))
    with pytest.raises(ValueError):
        await did(database, turns.settle, turn, replace(DONE, stop_reason={"type": "tired"}))
    for kind in ("user.message", "session.status_idle", "nothing"):
        with pytest.raises(ValueError):
            await did(database, turns.append, turn, [NewEvent(type=kind)])
        with pytest.raises(ValueError):
            await did(database, turns.settle, turn, replace(DONE, events=[NewEvent(type=kind)]))
    # another tenant's hand on it is no hand
    with pytest.raises(Superseded):
        await did(database, turns.append, replace(turn, tenant="other"), [message("x")])


async def test_a_session_that_terminates_takes_nothing_more(
    database: Database, session: str
) -> None:
    await say(database, session, "one")
    turn = await claimed(database, f"{session}.1", 1)
    await say(database, session, "two")
    end = replace(DONE, status=RunStatus.FAILED, terminate=True)
    assert (await did(database, turns.settle, turn, end)).next_run is None
    row, events = await rows_of(database, session)
    assert row.status is SessionStatus.TERMINATED
    assert events[-1].type == "session.status_terminated"


ACTS = st.lists(
    st.tuples(st.sampled_from([1, 2]), st.sampled_from(["claim", "append", "settle", "message"])),
    max_size=14,
)


@settings(max_examples=25)
@given(acts=ACTS)
def test_any_order_of_two_attempts_leaves_what_one_would_have(place: Place, acts: Any) -> None:
    asyncio.run(_interleaved(place, acts))


async def _interleaved(place: Place, acts: list[tuple[int, str]]) -> None:
    database = place.open()
    await database.migrate()
    session = await a_session(database, await a_tenant(database))
    await say(database, session, "m0")
    model = _Model(messages=["m0"])
    held: dict[int, Turn] = {}
    for number, act in acts:
        before = await rows_of(database, session)
        expected = model.step(number, act)
        try:
            if act == "message":
                await say(database, session, f"m{len(model.messages) - 1}")
            elif act == "claim":
                got = await did(database, turns.claim, f"{session}.1", number)
                if isinstance(got, Turn):
                    held[number] = got
                    assert texts(got) == model.given
                assert isinstance(got, Turn) == (expected == "turn")
            elif number in held:
                what: Any = [message(f"a{number}")] if act == "append" else DONE
                await did(database, getattr(turns, act), held[number], what)
            else:
                continue
            assert expected != "refused"
        except Superseded:
            assert expected == "refused"
            assert await rows_of(database, session) == before
    row, events = await rows_of(database, session)
    assert [event.position for event in events] == list(range(1, row.position + 1))
    assert len({event.id for event in events}) == len(events)
    assert [event.type for event in events if event.type == "agent.message"] == [
        "agent.message"
    ] * model.appended
    idle = sum(event.type == "session.status_idle" for event in events)
    assert idle == model.idle
    assert row.turn == model.turn
    said = [event.body["content"][0]["text"] for event in events if event.type == "user.message"]
    assert said == model.messages
    await database.close()


class _Model:
    """The rule in a few lines: one attempt holds turn 1, the highest that claimed it."""

    def __init__(self, messages: list[str]) -> None:
        self.messages, self.waiting, self.given = messages, 1, [""]
        self.holder, self.over, self.turn = 0, False, 1
        self.appended = self.idle = 0
        self.seen: set[int] = set()

    def step(self, number: int, act: str) -> str:
        if act == "message":
            self.messages.append(f"m{len(self.messages)}")
            if self.over and self.turn == 1:
                self.turn = 2
            elif not self.over:
                self.waiting += 1
            return "done"
        if act == "claim":
            if self.over:
                return "settled"
            if number <= self.holder:
                return "refused"
            if not self.holder:
                self.waiting, self.given = 0, list(self.messages)
            self.holder = number
            self.seen.add(number)
            return "turn"
        if number not in self.seen:
            return "nothing"
        if self.over or number != self.holder:
            return "refused"
        if act == "append":
            self.appended += 1
        else:
            self.over = True
            if self.waiting:
                self.turn = 2
            else:
                self.idle += 1
        return "done"


async def test_two_attempts_at_once_are_one_after_the_other(
    database: Database, session: str
) -> None:
    await say(database, session, "one")
    first, begun = await claimed(database, f"{session}.1", 1), asyncio.Event()

    async def attempt(turn: Turn, name: str, times: int) -> int:
        for count in range(times):
            try:
                await did(database, turns.append, turn, [message(name), message(name)])
            except Superseded:
                return count
            begun.set()
        return times

    async def take_over() -> int:
        await begun.wait()
        return await attempt(await claimed(database, f"{session}.1", 2), "second", 20)

    # the one that was taken over from is cut off, and not merely first
    older, newer = await asyncio.gather(attempt(first, "first", 450), take_over())
    assert newer == 20
    assert 0 < older < 450
    row, events = await rows_of(database, session)
    assert [event.position for event in events] == list(range(1, row.position + 1))
    said = [e.body["content"][0]["text"] for e in events if e.type == "agent.message"]
    assert said == ["first"] * 2 * older + ["second"] * 40


async def test_a_session_that_is_removed_leaves_nothing(database: Database, session: str) -> None:
    await say(database, session, "one")
    turn = await claimed(database, f"{session}.1", 1)
    await did(database, turns.settle, turn, DONE)
    async with database.writing() as connection:
        row = await sessions.find(connection, session)
        assert row
        await sessions.remove(connection, row)
    for table in (EVENTS, TURNS):
        async with database.reading() as connection:
            query = select(func.count()).where(table.c.session_id == session)
            assert (await connection.execute(query)).scalar_one() == 0
    with pytest.raises(Superseded):
        await did(database, turns.append, turn, [message("ghost")])
    assert (await did(database, turns.inbox, turn)).terminated
