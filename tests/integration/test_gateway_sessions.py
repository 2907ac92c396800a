"""Sessions through the official client, unmodified; the worker is played by the seam's own acts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from anthropic import Anthropic
from sqlalchemy import update

from gateway_rig import Rig, caller
from ringfence.store.tables import SESSIONS
from session_rig import Worker

TOOLS: Any = [
    {"type": "agent_toolset_20260401"},
    {
        "type": "custom",
        "name": "ticket",
        "description": "Makes a ticket",
        "input_schema": {"type": "object"},
    },
]


@pytest.fixture(scope="module")
def rig(place: Any, tmp_path_factory: pytest.TempPathFactory) -> Rig:
    return Rig(place=place, queue=tmp_path_factory.mktemp("queue") / "queue.sqlite")


@pytest.fixture(scope="module")
def base(rig: Rig) -> Iterator[str]:
    assert rig.queue
    with rig.serving() as url, Worker(rig.place, rig.queue).working():
        yield url


@pytest.fixture
def client(rig: Rig, base: str) -> Iterator[Anthropic]:
    with Anthropic(base_url=base, api_key=rig.key().text, max_retries=0) as made:
        yield made


@pytest.fixture
def agent(client: Anthropic) -> str:
    return client.beta.agents.create(name="a", model="claude-opus-5-5", tools=TOOLS).id


@pytest.fixture
def place_id(client: Anthropic) -> str:
    return client.beta.environments.create(name="e", config={"type": "cloud"}).id


def message(text: str) -> Any:
    return {"type": "user.message", "content": [{"type": "text", "text": text}]}


def until_idle(stream: Any) -> list[Any]:
    events = []
    for event in stream:
        events.append(event)
        if event.type == "session.status_idle":
            break
    return events


def test_the_quickstart(client: Anthropic, agent: str, place_id: str) -> None:
    session = client.beta.sessions.create(agent=agent, environment_id=place_id, title="Quick")
    assert (session.status, session.agent.id, session.agent.version) == ("idle", agent, 1)
    assert session.id.startswith("sesn_")
    assert "metadata" not in (session.agent.model_extra or {})
    with client.beta.sessions.events.stream(session.id) as stream:
        sent = client.beta.sessions.events.send(session.id, events=[message("hello")])
        events = until_idle(stream)
    assert sent.data
    assert sent.data[0].type == "user.message"
    assert sent.data[0].processed_at is None
    assert [event.type for event in events] == [
        "user.message",
        "session.status_running",
        "agent.message",
        "session.status_idle",
    ]
    assert events[2].content[0].text == "did hello"
    assert events[3].stop_reason.type == "end_turn"
    after = client.beta.sessions.retrieve(session.id)
    assert after.status == "idle"
    assert after.usage.input_tokens == 7
    assert after.usage.list_cost
    assert (after.usage.list_cost.amount, after.usage.list_cost.currency) == ("1", "USD")
    assert after.stats.active_seconds
    assert after.stats.duration_seconds
    assert 0 < after.stats.active_seconds <= after.stats.duration_seconds
    listed = list(client.beta.sessions.events.list(session.id, limit=2))
    assert [event.id for event in listed] == [event.id for event in events]
    assert all(event.processed_at for event in listed)


def test_initial_events_begin_the_first_turn(client: Anthropic, agent: str, place_id: str) -> None:
    session = client.beta.sessions.create(
        agent={"type": "agent", "id": agent, "version": 1},
        environment_id=place_id,
        initial_events=[message("one"), message("more")],
        metadata={"a": "b"},
    )
    assert session.status == "running"
    events = _settled(client, session.id)
    assert [event.type for event in events].count("user.message") == 2
    assert events[-2].content[0].text == "did more"


def _settled(client: Anthropic, session: str) -> list[Any]:
    """All events once the session is idle, from the beginning."""
    for _ in range(1000):
        events = list(client.beta.sessions.events.list(session))
        if events and events[-1].type == "session.status_idle":
            return events
    raise AssertionError(events)


def test_a_tool_call_waits_for_its_yes(client: Anthropic, agent: str, place_id: str) -> None:
    session = client.beta.sessions.create(
        agent=agent, environment_id=place_id, initial_events=[message("two")]
    )
    events = _settled(client, session.id)
    reason: Any = events[-1].stop_reason
    assert reason.type == "requires_action"
    first, second = reason.event_ids
    assert [event.id for event in events if event.type == "agent.tool_use"] == [first, second]

    def send(*sent: Any) -> Any:
        return client.beta.sessions.events.send(session.id, events=list(sent))

    def allow(identity: str, **more: Any) -> Any:
        kind = "user.tool_confirmation"
        return {"type": kind, "tool_use_id": identity, "result": "allow", **more}

    before = len(events)
    wrong: list[Any] = [
        allow("sevt_no"),
        {"type": "user.custom_tool_result", "custom_tool_use_id": first},
        allow(first, deny_message="no"),
    ]
    for one in wrong:
        with pytest.raises(anthropic.BadRequestError):
            send(allow(second), one)
    assert len(list(client.beta.sessions.events.list(session.id))) == before

    # a message waits for the answers, and fewer than all tell the rest again
    send(message("meanwhile"))
    send(allow(second))
    rest: Any = list(client.beta.sessions.events.list(session.id))[-1]
    assert (rest.type, rest.stop_reason.event_ids) == ("session.status_idle", [first])
    with pytest.raises(anthropic.BadRequestError) as caught:
        send(allow(second))
    assert caught.value.error_code == "event_unexpected"
    send({**allow(first), "result": "deny", "deny_message": "not that"})
    events = _settled(client, session.id)
    assert "'deny_message': 'not that'" in events[-2].content[0].text
    assert events[-1].stop_reason.type == "end_turn"
    assert all(event.processed_at for event in events)


def test_a_custom_tool_is_executed_by_the_caller(
    client: Anthropic, agent: str, place_id: str
) -> None:
    session = client.beta.sessions.create(
        agent=agent, environment_id=place_id, initial_events=[message("custom")]
    )
    events = _settled(client, session.id)
    (call,) = [event for event in events if event.type == "agent.custom_tool_use"]
    with pytest.raises(anthropic.BadRequestError):
        client.beta.sessions.events.send(
            session.id,
            events=[{"type": "user.tool_confirmation", "tool_use_id": call.id, "result": "allow"}],
        )
    client.beta.sessions.events.send(
        session.id,
        events=[
            {
                "type": "user.custom_tool_result",
                "custom_tool_use_id": call.id,
                "content": [{"type": "text", "text": "T-1"}],
            }
        ],
    )
    assert "T-1" in _settled(client, session.id)[-2].content[0].text


def test_what_may_wait_for_the_next_turn_is_bounded(
    client: Anthropic, agent: str, place_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ringfence.control.sessions.MOST_WAITING", 3)
    started = [message("wait")]
    session = client.beta.sessions.create(
        agent=agent, environment_id=place_id, initial_events=started
    )
    for _ in range(1500):
        (first,) = client.beta.sessions.events.list(session.id, types=["user.message"]).data
        if first.processed_at is not None:
            break
        time.sleep(0.05)
    for _ in range(3):
        client.beta.sessions.events.send(session.id, events=[message("after")])
    with pytest.raises(anthropic.RateLimitError) as caught:
        client.beta.sessions.events.send(session.id, events=[message("after")])
    assert caught.value.error_code == "session_full"
    # what ends the wait is let through
    client.beta.sessions.events.send(session.id, events=[{"type": "user.interrupt"}])
    _settled(client, session.id)


def test_an_interrupt_ends_the_turn_and_what_waits_is_the_next(
    client: Anthropic, agent: str, place_id: str
) -> None:
    session = client.beta.sessions.create(
        agent=agent, environment_id=place_id, initial_events=[message("wait")]
    )
    # taken by the turn, so that what comes now is the next one's
    for _ in range(1500):
        (first,) = client.beta.sessions.events.list(session.id, types=["user.message"]).data
        if first.processed_at is not None:
            break
        time.sleep(0.02)
    client.beta.sessions.events.send(session.id, events=[message("after")])
    with pytest.raises(anthropic.ConflictError) as caught:
        client.beta.sessions.delete(session.id)
    assert caught.value.error_code == "session_running"
    for act in (
        lambda: client.beta.sessions.archive(session.id),
        lambda: client.beta.sessions.update(session.id, agent={"tools": []}),
    ):
        with pytest.raises(anthropic.ConflictError):
            act()
    client.beta.sessions.events.send(session.id, events=[{"type": "user.interrupt"}])
    events = _settled(client, session.id)
    said = [event.content[0].text for event in events if event.type == "agent.message"]
    assert said == ["did wait", "did after"]
    # at rest it stops nothing
    client.beta.sessions.events.send(session.id, events=[{"type": "user.interrupt"}])
    assert client.beta.sessions.retrieve(session.id).status == "idle"


def test_events_are_listed_by_order_type_and_time(
    client: Anthropic, agent: str, place_id: str
) -> None:
    session = client.beta.sessions.create(
        agent=agent, environment_id=place_id, initial_events=[message("x")]
    )
    events = _settled(client, session.id)

    def listed(**query: Any) -> list[str]:
        return [one.id for one in client.beta.sessions.events.list(session.id, **query)]

    everything = [event.id for event in events]
    assert listed(order="desc", limit=1) == everything[::-1]
    only = [event.id for event in events if event.type in {"agent.message", "user.message"}]
    assert listed(types=["agent.message", "user.message"]) == only
    assert listed(types=["workflow_run.error"]) == []
    when = events[2].processed_at
    assert listed(created_at_gte=when) == [e.id for e in events if e.processed_at >= when]
    assert listed(created_at_gt=when) == [e.id for e in events if e.processed_at > when]
    assert listed(created_at_lt=when) == [e.id for e in events if e.processed_at < when]
    assert listed(created_at_lte=when) == [e.id for e in events if e.processed_at <= when]


async def _run(rig: Rig, session: str) -> None:
    """Let a session be running, and stay so: a turn would end while it is looked at."""
    database = rig.place.open()
    async with database.writing() as connection:
        change = update(SESSIONS).where(SESSIONS.c.id == session)
        await connection.execute(change.values(status="running"))
    await database.close()


def test_sessions_are_listed_by_what_they_are(rig: Rig, base: str) -> None:
    key = rig.key("lists").text
    with Anthropic(base_url=base, api_key=key, max_retries=0) as client:
        place = client.beta.environments.create(name="e").id
        agents = [client.beta.agents.create(name=n, model="m").id for n in "ab"]
        client.beta.agents.update(agents[0], name="c")
        made = [
            client.beta.sessions.create(agent=agents[n % 2], environment_id=place) for n in range(5)
        ]
        ids = [one.id for one in made]

        def listed(**query: Any) -> list[str]:
            return [one.id for one in client.beta.sessions.list(**query)]

        assert listed(limit=2) == ids[::-1]
        assert listed(limit=2, order="asc") == ids
        assert listed(agent_id=agents[1]) == [ids[3], ids[1]]
        assert listed(agent_id=agents[0], agent_version=2, limit=1) == ids[::2][::-1]
        assert listed(agent_id=agents[0], agent_version=1) == []
        when = made[2].created_at
        assert listed(created_at_gt=when, order="asc") == ids[3:]
        assert listed(created_at_gte=when, order="asc") == ids[2:]
        assert listed(created_at_lt=when, order="asc") == ids[:2]
        assert listed(created_at_lte=when, order="asc") == ids[:3]
        assert listed(statuses=["idle", "terminated"]) == ids[::-1]
        assert listed(statuses=["running"]) == []
        asyncio.run(_run(rig, ids[2]))
        assert listed(statuses=["running"]) == ids[2:3]
        assert listed(statuses=["rescheduling", "running"]) == ids[2:3]
        both = ["running", "idle", "running"]
        assert listed(statuses=both, limit=2) == ids[::-1]
        assert listed(statuses=both, limit=2, order="asc") == ids
        assert listed(statuses=both, agent_id=agents[0], limit=1) == ids[::2][::-1]
        assert listed(statuses=["running"], agent_id=agents[0], include_archived=True) == ids[2:3]
        assert listed(statuses=["running"], agent_id=agents[1]) == []
        assert listed(deployment_id="d") == listed(memory_store_id="m") == []
        client.beta.sessions.archive(ids[0])
        assert listed(order="asc") == ids[1:]
        assert listed(order="asc", include_archived=True) == ids


def test_a_session_is_changed_and_its_stream_says_so(
    client: Anthropic, agent: str, place_id: str
) -> None:
    session = client.beta.sessions.create(
        agent=agent, environment_id=place_id, metadata={"keep": "1", "drop": "2"}
    )
    with client.beta.sessions.events.stream(session.id) as stream:
        changed = client.beta.sessions.update(
            session.id, title="New", metadata={"drop": None, "add": "3"}, agent={"tools": []}
        )
        event: Any = next(iter(stream))
    assert (changed.title, changed.metadata) == ("New", {"keep": "1", "add": "3"})
    assert changed.agent.tools == []
    assert event.type == "session.updated"
    assert (event.title, event.metadata, event.agent.tools) == ("New", changed.metadata, [])
    assert client.beta.agents.retrieve(agent).tools != []
    # what changes nothing says nothing
    client.beta.sessions.update(session.id, title="New", metadata={"keep": "1"})
    assert len(list(client.beta.sessions.events.list(session.id))) == 1


def test_overrides_are_the_sessions_alone(client: Anthropic, agent: str, place_id: str) -> None:
    session = client.beta.sessions.create(
        agent={
            "type": "agent_with_overrides",
            "id": agent,
            "model": "claude-haiku-4-5",
            "system": "Be brief.",
            "tools": [],
        },
        environment_id=place_id,
    )
    assert session.agent.model.id == "claude-haiku-4-5"
    assert (session.agent.system, session.agent.tools) == ("Be brief.", [])
    assert client.beta.agents.retrieve(agent).system is None


def test_a_budget_is_held_and_only_raised(client: Anthropic, agent: str, place_id: str) -> None:
    def limit(cents: str) -> Any:
        return {"type": "limit", "max_list_cost": {"amount": cents, "currency": "USD"}}

    session = client.beta.sessions.create(
        agent=agent, environment_id=place_id, budget=limit("1"), initial_events=[message("x")]
    )
    _settled(client, session.id)
    client.beta.sessions.events.send(session.id, events=[message("y")])
    events = _settled(client, session.id)
    assert events[-1].stop_reason.type == "budget_reached"
    with pytest.raises(anthropic.BadRequestError) as caught:
        client.beta.sessions.update(session.id, budget=limit("0"))
    assert caught.value.error_code == "budget_not_raised"
    raised = client.beta.sessions.update(session.id, budget=limit("500"))
    assert raised.budget
    assert raised.budget.max_list_cost.amount == "500"
    # the message that waited is answered now
    assert _settled(client, session.id)[-2].content[0].text == "did y"
    assert client.beta.sessions.update(session.id, budget=None).budget is None
    with pytest.raises(anthropic.BadRequestError) as caught:
        client.beta.sessions.update(session.id, budget=limit("500"))
    assert caught.value.error_code == "budget_create_only"
    unknown = client.beta.agents.create(name="x", model="no-such-model").id
    with pytest.raises(anthropic.BadRequestError) as caught:
        client.beta.sessions.create(agent=unknown, environment_id=place_id, budget=limit("1"))
    assert caught.value.error_code == "model_not_budgetable"


def test_what_is_archived_or_gone(client: Anthropic, agent: str, place_id: str) -> None:
    session = client.beta.sessions.create(agent=agent, environment_id=place_id)
    with pytest.raises(anthropic.ConflictError) as caught:
        client.beta.environments.delete(place_id)
    assert caught.value.error_code == "environment_in_use"
    archived = client.beta.sessions.archive(session.id)
    assert client.beta.sessions.archive(session.id).archived_at == archived.archived_at
    for act in (
        lambda: client.beta.sessions.events.send(session.id, events=[message("x")]),
        lambda: client.beta.sessions.update(session.id, title="x"),
    ):
        with pytest.raises(anthropic.BadRequestError) as refused:
            act()
        assert refused.value.error_code == "session_archived"
    gone = client.beta.sessions.delete(session.id)
    assert (gone.id, gone.type) == (session.id, "session_deleted")
    with pytest.raises(anthropic.NotFoundError) as missing:
        client.beta.sessions.retrieve(session.id)
    assert missing.value.error_code == "session_not_found"
    client.beta.environments.delete(place_id)
    # neither starts a session any more
    with pytest.raises(anthropic.NotFoundError):
        client.beta.sessions.create(agent=agent, environment_id=place_id)
    client.beta.agents.archive(agent)
    with pytest.raises(anthropic.BadRequestError) as refused:
        client.beta.sessions.create(agent=agent, environment_id=place_id)
    assert refused.value.error_code == "agent_archived"


@pytest.mark.parametrize(
    ("extra", "name"),
    [
        ({"resources": [{"type": "memory_store", "memory_store_id": "m"}]}, "memory_store"),
        ({"resources": [{"type": "github_repository", "url": "u"}]}, "github_repository"),
        (
            {"initial_events": [{"type": "user.define_outcome", "description": "d"}]},
            "user.define_outcome",
        ),
    ],
)
def test_what_is_not_carried_out_is_refused_by_name(
    client: Anthropic, agent: str, place_id: str, extra: Any, name: str
) -> None:
    with pytest.raises(anthropic.BadRequestError) as caught:
        client.beta.sessions.create(agent=agent, environment_id=place_id, **extra)
    assert name in caught.value.message
    assert caught.value.error_code == "request_invalid"


IMAGE = {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}
PDF = {"type": "base64", "media_type": "application/pdf", "data": "JVBERi0xLjQK"}


def shown(*sources: Any, kind: str = "image") -> Any:
    return {"type": "user.message", "content": [{"type": kind, "source": one} for one in sources]}


@pytest.mark.parametrize(
    ("event", "allowed"),
    [
        (shown(IMAGE), True),
        (shown(PDF, kind="document"), True),
        (shown(*[IMAGE] * 20), True),
        (shown(*[IMAGE] * 21), False),
        # what is called an image and is none would stay in the conversation, refused for good
        (shown({**IMAGE, "media_type": "image/gif"}), False),
        (shown({**IMAGE, "data": "aGVsbG8gd29ybGQ="}), False),
        (shown({**PDF, "data": IMAGE["data"]}, kind="document"), False),
        (shown({"type": "file", "file_id": "../x"}), False),
        ({"type": "user.message", "content": [{"type": "text", "text": "x"}]}, True),
        ({"type": "user.message", "content": []}, False),
        ({"type": "user.message", "content": [{"type": "text", "text": ""}]}, False),
        ({"type": "user.message", "content": [{"type": "text", "text": "x", "more": 1}]}, False),
        ({"type": "user.message", "content": "x"}, False),
        (
            {
                "type": "user.message",
                "content": [{"type": "image", "source": {"type": "url", "url": "https://x/y"}}],
            },
            False,
        ),
        (
            {
                "type": "user.message",
                "content": [{"type": "image", "source": {**IMAGE, "data": "no base64"}}],
            },
            False,
        ),
        ({"type": "user.message", "content": [{"type": "redacted"}]}, False),
        ({"type": "user.interrupt"}, True),
        ({"type": "user.interrupt", "session_thread_id": "t"}, False),
        ({"type": "user.tool_result", "tool_use_id": "x"}, False),
        ({"type": "system.message", "content": []}, False),
        ({"type": "agent.message", "content": []}, False),
        ({"type": "session.status_idle"}, False),
    ],
)
def test_what_may_be_sent(rig: Rig, base: str, event: Any, allowed: bool) -> None:
    with caller(base, rig.key("sender").text) as client:
        agent = client.post("/v1/agents", json={"name": "a", "model": "m"}).json()["id"]
        place = client.post("/v1/environments", json={"name": "e"}).json()["id"]
        made = {"agent": agent, "environment_id": place}
        session = client.post("/v1/sessions", json=made).json()["id"]
        path = f"/v1/sessions/{session}/events"
        answer = client.post(path, json={"events": [event]})
        assert answer.status_code == (200 if allowed else 400), answer.text
        assert bool(client.get(path).json()["data"]) == allowed
        # all or none
        mixed = client.post(path, json={"events": [event, {"type": "nothing"}]})
        assert mixed.status_code == 400


def test_events_that_are_sent_twice_with_one_key_are_there_once(
    rig: Rig, base: str, client: Anthropic, agent: str, place_id: str
) -> None:
    session = client.beta.sessions.create(agent=agent, environment_id=place_id)
    keyed = {"Idempotency-Key": f"send-{session.id}"}
    first = client.beta.sessions.events.send(
        session.id, events=[message("once")], extra_headers=keyed
    )
    _settled(client, session.id)
    again = client.beta.sessions.events.send(
        session.id, events=[message("once")], extra_headers=keyed
    )
    assert first == again
    events = _settled(client, session.id)
    assert [event.type for event in events].count("user.message") == 1


def test_files_and_vaults_are_the_tenants_own(
    rig: Rig, base: str, client: Anthropic, agent: str, place_id: str
) -> None:
    """What a session names is there when it is made; another tenant's is unknown."""
    mine = client.beta.files.upload(file=("a.csv", b"1,2"))
    vault = client.beta.vaults.create(display_name="v")
    ended = client.beta.vaults.create(display_name="w")
    client.beta.vaults.archive(ended.id)
    with Anthropic(base_url=base, api_key=rig.key("rival").text, max_retries=0) as rival:
        foreign = rival.beta.files.upload(file=("b.csv", b"3"))
        theirs = rival.beta.vaults.create(display_name="v")

    def create(*resources: Any, vaults: Any = ()) -> Any:
        return client.beta.sessions.create(
            agent=agent, environment_id=place_id, resources=list(resources), vault_ids=list(vaults)
        )

    def resource(identity: str, path: str | None = None) -> Any:
        return {"type": "file", "file_id": identity} | ({"mount_path": path} if path else {})

    made = create(
        resource(mine.id),
        resource(mine.id, "/mnt/session/data/a.csv"),
        vaults=[vault.id, vault.id],
    )
    first, second = client.beta.sessions.retrieve(made.id).resources
    assert (first.type, second.type) == ("file", "file")
    assert (first.file_id, first.mount_path) == (mine.id, f"/mnt/session/uploads/{mine.id}")
    assert second.mount_path == "/mnt/session/data/a.csv"
    assert first.id != second.id
    assert first.created_at == made.created_at
    assert made.vault_ids == [vault.id]
    unknown: list[tuple[Any, str]] = [
        (lambda: create(resource(foreign.id)), "file_not_found"),
        (lambda: create(resource("file_none")), "file_not_found"),
        (lambda: create(vaults=[vault.id, theirs.id]), "vault_not_found"),
    ]
    refused: list[tuple[Any, str]] = [
        (lambda: create(vaults=[ended.id]), "vault_archived"),
        (lambda: create(resource(mine.id), resource(mine.id)), "request_invalid"),
        (lambda: create(resource(mine.id, "/etc/passwd")), "request_invalid"),
        (lambda: create(resource(mine.id, "/mnt/session/../x")), "request_invalid"),
    ]
    for kind, cases in ((anthropic.NotFoundError, unknown), (anthropic.BadRequestError, refused)):
        for ask, code in cases:
            with pytest.raises(kind) as caught:
                ask()
            assert caught.value.error_code == code
    assert [one.id for one in client.beta.sessions.list(agent_id=agent)] == [made.id]


def test_files_are_added_and_taken_away(
    rig: Rig, base: str, client: Anthropic, agent: str, place_id: str
) -> None:
    first, second = (client.beta.files.upload(file=(f"{n}.csv", b"1")) for n in "ab")
    with Anthropic(base_url=base, api_key=rig.key("rival").text, max_retries=0) as rival:
        foreign = rival.beta.files.upload(file=("b.csv", b"3"))
    session = client.beta.sessions.create(agent=agent, environment_id=place_id).id
    other = client.beta.sessions.create(agent=agent, environment_id=place_id).id
    held = client.beta.sessions.resources
    one = held.add(session, file_id=first.id, type="file")
    two = held.add(session, file_id=second.id, type="file", mount_path="/mnt/session/b.csv")
    assert (one.type, one.mount_path) == ("file", f"/mnt/session/uploads/{first.id}")
    assert [item.mount_path for item in held.list(session)] == [one.mount_path, two.mount_path]
    pages = held.list(session, limit=1)
    assert (len(pages.data), [item.mount_path for item in pages][1:]) == (1, [two.mount_path])
    assert held.retrieve(two.id, session_id=session) == two
    assert client.beta.sessions.retrieve(session).resources == [one, two]
    refused: list[tuple[Any, Any, str]] = [
        (404, lambda: held.add(session, file_id=foreign.id, type="file"), "file_not_found"),
        (404, lambda: held.retrieve(one.id, session_id=other), "resource_not_found"),
        (404, lambda: held.delete(one.id, session_id=other), "resource_not_found"),
        (400, lambda: held.add(session, file_id=first.id, type="file"), "request_invalid"),
        (400, lambda: held.update(one.id, session_id=session, authorization_token="t"), "request_invalid"),
        (400, lambda: held.add(session, file_id=first.id, type="memory_store"), "request_invalid"),  # type: ignore[arg-type]
    ]  # fmt: skip
    for status, ask, code in refused:
        with pytest.raises(anthropic.APIStatusError) as caught:
            ask()
        assert (caught.value.status_code, caught.value.error_code) == (status, code)
    assert held.delete(one.id, session_id=session).type == "session_resource_deleted"
    assert [item.mount_path for item in held.list(session)] == [two.mount_path]
    # its place is free again, and the file was not deleted with it
    held.add(session, file_id=first.id, type="file")
    client.beta.sessions.archive(session)
    with pytest.raises(anthropic.BadRequestError) as archived:
        held.delete(two.id, session_id=session)
    assert archived.value.error_code == "session_archived"


def test_an_image_may_be_a_file_of_the_tenants(
    rig: Rig, base: str, client: Anthropic, agent: str, place_id: str
) -> None:
    png = b"\x89PNG\r\n\x1a\n" + b"\0" * 64
    image = client.beta.files.upload(file=("a.png", png, "image/png"))
    table = client.beta.files.upload(file=("a.csv", b"1,2", "text/csv"))
    large = client.beta.files.upload(file=("b.png", png + b"\0" * (3 << 20), "image/png"))
    with Anthropic(base_url=base, api_key=rig.key("rival").text, max_retries=0) as rival:
        foreign = rival.beta.files.upload(file=("c.png", png, "image/png"))
    session = client.beta.sessions.create(agent=agent, environment_id=place_id).id

    def send(kind: str, *files: str) -> Any:
        sources = [{"type": "file", "file_id": one} for one in files]
        return client.beta.sessions.events.send(session, events=[shown(*sources, kind=kind)])

    for allowed in (("image", image.id), ("document", table.id), ("image", image.id, large.id)):
        assert send(*allowed).data[0].content[0].source.file_id == allowed[1]
    refused = [
        (("image", foreign.id), "file_not_found"),
        (("image", image.id, "file_none"), "file_not_found"),
        (("image", table.id), "request_invalid"),
        (("document", image.id), "request_invalid"),
        (("image", large.id, large.id), "request_invalid"),
    ]
    for wrong, code in refused:
        with pytest.raises(anthropic.APIStatusError) as caught:
            send(*wrong)
        assert caught.value.error_code == code
    kept = client.beta.sessions.events.list(session, types=["user.message"])
    assert len(list(kept)) == 3


def test_a_session_that_nobody_waits_for(client: Anthropic, agent: str, place_id: str) -> None:
    """Ours, beside the public fields: others' sessions say that they are none."""

    def made(block: Any) -> Any:
        return client.beta.sessions.create(
            agent=agent, environment_id=place_id, extra_body={"ringfence": block}
        )

    def block_of(session: Any) -> Any:
        return (session.model_extra or {})["ringfence"]

    batch = made({"batch": True})
    assert block_of(batch) == {"batch": True}
    plain = client.beta.sessions.create(agent=agent, environment_id=place_id)
    assert block_of(plain) == block_of(made(None)) == {"batch": False}
    for wrong in ({"batch": "yes"}, {"batch": True, "priority": 1}, True):
        with pytest.raises(anthropic.BadRequestError):
            made(wrong)
    back = client.beta.sessions.update(batch.id, extra_body={"ringfence": {"batch": False}})
    assert block_of(back) == {"batch": False}
    changed = client.beta.sessions.update(plain.id, extra_body={"ringfence": {"batch": True}})
    assert block_of(changed) == {"batch": True}
    titled = client.beta.sessions.update(plain.id, title="Tidy up")
    assert block_of(titled) == {"batch": True}, "what is left out stays"
    assert block_of(client.beta.sessions.retrieve(plain.id)) == {"batch": True}
