"""SqliteSessionStore against the Agent SDK's own conformance suite, and requirement H."""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from claude_agent_sdk import list_sessions_from_store, project_key_for_directory
from claude_agent_sdk.testing import run_session_store_conformance

from ringfence.errors import CallerError, DeniedError, UnavailableError
from ringfence.record import leased, sessions
from ringfence.record.sessions import SqliteSessionStore
from ringfence.record.transcript import PROJECT

SID = "11111111-2222-4333-8444-555555555555"
OTHER = "99999999-2222-4333-8444-555555555555"
USER = {"type": "user", "uuid": "u1", "message": {"role": "user", "content": "hello"}}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteSessionStore]:
    store = SqliteSessionStore(tmp_path / "state" / "sessions.sqlite")
    yield store
    store.close()


def test_the_sdks_conformance_suite(tmp_path: Path) -> None:
    made: list[SqliteSessionStore] = []
    numbers = itertools.count()

    def fresh() -> SqliteSessionStore:
        made.append(SqliteSessionStore(tmp_path / f"{next(numbers)}" / "s.sqlite"))
        return made[-1]

    try:
        asyncio.run(run_session_store_conformance(fresh))
    finally:
        for store in made:
            store.close()
    assert len(made) == 15, "a contract was skipped"


def test_an_entry_sent_twice_is_stored_once(store: SqliteSessionStore) -> None:
    key = {"project_key": "p", "session_id": "s"}

    async def twice() -> object:
        await store.append(key, [USER, {"type": "mode"}])
        await store.append(key, [USER, {"type": "mode"}])
        return await store.load(key)

    assert asyncio.run(twice()) == [USER, {"type": "mode"}, {"type": "mode"}]


def test_the_file_is_private(store: SqliteSessionStore, tmp_path: Path) -> None:
    state = tmp_path / "state"
    assert state.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in state.iterdir()} == {0o600}


def append(store: SqliteSessionStore, *entries: object, run: str = "run_1", **key: str) -> None:
    lease = store.lease(SID, run)
    try:
        asyncio.run(
            lease.append({"project_key": "anything", "session_id": SID, **key}, list(entries))
        )  # type: ignore[arg-type]
    finally:
        lease.release()


def test_what_a_lease_wrote_is_found_from_any_directory(store: SqliteSessionStore) -> None:
    append(store, USER)
    assert list(store.transcript(SID)) == [USER]
    assert list(store.materialise(SID)) == [f".claude/projects/{PROJECT}/{SID}.jsonl"]
    (info,) = store.sessions()
    assert (info.session_id, info.entries, info.first_prompt) == (SID, 1, "hello")


def test_the_sdk_lists_it_by_its_summary(store: SqliteSessionStore) -> None:
    key = {"project_key": project_key_for_directory("/anywhere"), "session_id": SID}
    entry = {**USER, "timestamp": "2026-01-01T00:00:00Z", "sessionId": SID}
    asyncio.run(store.append(key, [entry]))
    (found,) = asyncio.run(list_sessions_from_store(store, "/anywhere"))  # type: ignore[arg-type]
    assert (found.session_id, found.first_prompt) == (SID, "hello")


@pytest.mark.parametrize(
    "key",
    [
        {"session_id": OTHER},
        {"session_id": ""},
        {"session_id": f"../{SID}"},
        {"subpath": "../../../.ssh/authorized_keys"},
        {"subpath": "/etc/cron.d/x"},
        {"subpath": "a/./b"},
    ],
)
def test_a_frame_that_names_another_session_or_path_is_refused(
    store: SqliteSessionStore, key: dict[str, str]
) -> None:
    with pytest.raises(DeniedError) as caught:
        append(store, USER, **key)
    assert caught.value.code == "session-frame-refused"
    assert store.sessions() == []
    append(store, USER, subpath="subagents/agent-1")  # its allowed twin


def test_a_leased_store_reads_its_own_session_only(store: SqliteSessionStore) -> None:
    append(store, USER)
    lease = store.lease(OTHER, "run_2")
    assert asyncio.run(lease.load({"project_key": PROJECT, "session_id": SID})) is None
    lease.release()
    own = store.lease(SID, "run_3")
    assert asyncio.run(own.load({"project_key": "x", "session_id": SID})) == [USER]
    own.release()


def test_one_live_run_a_session(store: SqliteSessionStore, tmp_path: Path) -> None:
    lease = store.lease(SID, "run_1")
    second = SqliteSessionStore(tmp_path / "state" / "sessions.sqlite")
    with pytest.raises(UnavailableError) as caught:
        second.lease(SID, "run_2")
    assert caught.value.code == "session-busy"
    assert "run_1" in caught.value.message
    second.lease(OTHER, "run_2").release()
    lease.release()
    second.lease(SID, "run_2").release()
    second.close()


def test_a_run_that_lost_its_lease_writes_no_more(
    store: SqliteSessionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "LEASE_SECONDS", -1.0)
    late = store.lease(SID, "run_1")
    monkeypatch.setattr(sessions, "LEASE_SECONDS", 60.0)
    late.renew()
    monkeypatch.setattr(sessions, "LEASE_SECONDS", -1.0)
    late.renew()
    monkeypatch.setattr(sessions, "LEASE_SECONDS", 60.0)
    now = store.lease(SID, "run_1")  # the same run id again: the token tells them apart
    key = {"project_key": PROJECT, "session_id": SID}
    with pytest.raises(UnavailableError):
        asyncio.run(late.append(key, [USER]))
    with pytest.raises(UnavailableError):
        late.renew()
    late.release()  # must not free the other's
    asyncio.run(now.append(key, [USER]))
    with pytest.raises(UnavailableError):
        store.lease(SID, "run_9")
    now.release()
    assert list(store.transcript(SID)) == [USER]


def test_caps_hold(store: SqliteSessionStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "MAX_SESSION_BYTES", 2000)
    append(store, {"type": "x", "text": "a" * 1000})
    with pytest.raises(DeniedError):
        append(store, {"type": "x", "text": "b" * 1500})
    assert len(list(store.transcript(SID))) == 1, "a refused append leaves nothing behind"
    monkeypatch.setattr(sessions, "MAX_SESSION_BYTES", 1 << 30)
    append(store, *({"type": "x"} for _ in range(5000)))
    with pytest.raises(DeniedError):
        append(store, *({"type": "x"} for _ in range(leased.ENTRIES_AT_ONCE + 1)))


def test_fork_and_delete(store: SqliteSessionStore) -> None:
    append(store, {**USER, "sessionId": SID})
    append(store, {"type": "user", "uuid": "u2", "sessionId": SID}, subpath="subagents/agent-1")
    new = store.fork(SID)
    assert next(store.transcript(new))["sessionId"] == new
    assert len(store.materialise(new)) == 2
    assert {info.session_id: info.parent for info in store.sessions()} == {SID: "", new: SID}
    held = store.lease(SID, "run_1")
    with pytest.raises(UnavailableError):
        store.remove(SID)
    held.release()
    store.remove(SID)
    with pytest.raises(CallerError) as caught:
        store.transcript(SID)
    assert caught.value.code == "session-unknown"
    assert len(store.materialise(new)) == 2


def test_a_fork_is_whole_or_not_there_and_is_recorded_first(store: SqliteSessionStore) -> None:
    append(store, {**USER, "sessionId": SID})
    append(store, USER, subpath="subagents/agent-1")

    def refuse(_: str) -> None:
        raise UnavailableError("store-unavailable", "the audit log is full")

    with pytest.raises(UnavailableError, match="full"):
        store.fork(SID, record=refuse)
    assert [info.session_id for info in store.sessions()] == [SID]
    seen: list[str] = []
    assert [store.fork(SID, record=seen.append)] == seen


def test_what_was_deleted_is_not_in_the_files(store: SqliteSessionStore, tmp_path: Path) -> None:
    canary = "CANARY-of-a-deleted-conversation"
    append(store, {**USER, "text": canary * 300})
    append(store, {"type": "x", "text": canary}, subpath="subagents/agent-1")

    def found() -> bool:
        files = [path.read_bytes() for path in (tmp_path / "state").iterdir()]
        return any(canary.encode() in data for data in files)

    assert found()
    store.remove(SID)
    assert not found()


def test_a_lease_of_a_clock_that_was_set_back_does_not_last_for_ever(
    store: SqliteSessionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "LEASE_SECONDS", 60 + 365 * 86400.0)
    store.lease(SID, "run_of_next_year")
    monkeypatch.undo()
    lease = store.lease(SID, "run_1")
    with pytest.raises(UnavailableError):
        store.lease(SID, "run_2")
    lease.release()


def test_what_is_sent_twice_is_counted_once(
    store: SqliteSessionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "MAX_SESSION_BYTES", 2000)
    big = {**USER, "text": "a" * 1000}
    for _ in range(5):
        append(store, big)
    (info,) = store.sessions()
    assert (info.entries, 1000 < info.bytes < 2000) == (1, True)


def test_a_lease_knows_what_could_not_be_kept(store: SqliteSessionStore) -> None:
    lease = store.lease(SID, "run_1")
    key = {"project_key": "x", "session_id": SID}
    asyncio.run(lease.append(key, [USER]))
    assert not lease.failed
    with pytest.raises(DeniedError):
        asyncio.run(lease.append({**key, "session_id": OTHER}, [USER]))
    assert lease.failed
    asyncio.run(lease.append(key, [USER]))  # the SDK tries again
    assert not lease.failed
    store._db.execute("DROP TABLE entry")
    with pytest.raises(UnavailableError) as caught:
        asyncio.run(lease.append(key, [{"type": "x"}]))
    assert (caught.value.code, lease.failed) == ("store-unavailable", True)


def test_pages(store: SqliteSessionStore) -> None:
    ids = [f"11111111-2222-4333-8444-55555555555{n}" for n in range(5)]
    for number, name in enumerate(ids):
        store.add({"project_key": PROJECT, "session_id": name}, [USER, {"n": number}])
    pages = [store.sessions(limit=2, skip=skip) for skip in (0, 2, 4, 6)]
    assert [len(page) for page in pages] == [2, 2, 1, 0]
    assert sorted(info.session_id for page in pages for info in page) == ids
    assert list(store.transcript(ids[3], last=1)) == [{"n": 3}]


def test_a_damaged_store_is_one_clear_error(store: SqliteSessionStore) -> None:
    append(store, USER)
    for body in ("{", "7", "[" * 50_000):
        store._db.execute("UPDATE entry SET body = ?", (body,))
        for ask in (lambda: list(store.transcript(SID)), store.sessions, lambda: store.fork(SID)):
            with pytest.raises(UnavailableError) as caught:
                ask()
            assert caught.value.code == "store-unavailable"
    store._db.execute("DROP TABLE entry")
    for ask in (store.sessions, lambda: store.transcript(SID), lambda: store.materialise(SID)):
        with pytest.raises(UnavailableError) as caught:
            ask()
        assert caught.value.code == "store-unavailable"


def test_tool_uses_of_subagents_too(store: SqliteSessionStore) -> None:
    def use(name: str) -> dict[str, object]:
        return {"type": "assistant", "message": {"content": [{"type": "tool_use", "id": name}]}}

    append(store, use("toolu_1"), use("toolu_2"), use("toolu_1"))
    append(store, use("toolu_3"), subpath="subagents/agent-1")
    assert store.tool_use_ids(SID) == ["toolu_1", "toolu_2", "toolu_3"]


@pytest.mark.parametrize(
    "name",
    ["", "x", "../x", SID.replace("-", ""), SID + "\n", "A" * 36, SID.upper().replace("1", "A")],
)
def test_what_is_no_session_id(store: SqliteSessionStore, name: str) -> None:
    for ask in (store.transcript, store.materialise, store.fork, store.remove, store.tool_use_ids):
        with pytest.raises(CallerError):
            ask(name)
    with pytest.raises(CallerError):
        store.lease(name, "run_1")


def test_unknown_sessions(store: SqliteSessionStore) -> None:
    for ask in (store.transcript, store.materialise, store.fork, store.remove, store.tool_use_ids):
        with pytest.raises(CallerError):
            ask(str(uuid.uuid4()))
    assert store.sessions() == []
