"""SqliteSessionStore against the contract of session stores, and requirement H."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from claude_agent_sdk import list_sessions_from_store, project_key_for_directory

from ringfence.errors import CallerError, DeniedError, UnavailableError
from ringfence.record import leased
from ringfence.record.sessions import SqliteSessionStore
from ringfence.record.transcript import PROJECT
from ringfence.testing.session_store_contract import SessionStoreContract
from session_places import opening

SID = "11111111-2222-4333-8444-555555555555"
OTHER = "99999999-2222-4333-8444-555555555555"
USER = {"type": "user", "uuid": "u1", "message": {"role": "user", "content": "hello"}}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteSessionStore]:
    store = SqliteSessionStore(tmp_path / "state" / "sessions.sqlite")
    yield store
    store.close()


class TestSqliteSessionStore(SessionStoreContract):
    @pytest.fixture
    def opened(self, tmp_path: Path) -> Iterator[Any]:
        path = tmp_path / "state" / "sessions.sqlite"
        with opening(lambda limits: SqliteSessionStore(path, limits)) as opened:
            yield opened


def test_a_tenants_sessions_are_not_those_of_the_host(store: SqliteSessionStore) -> None:
    append(store, USER)
    view = store.for_tenant("ringfence")
    assert view.sessions() == []
    view.lease(SID, "run_2").release()
    asyncio.run(view.append({"project_key": PROJECT, "session_id": SID}, [{"type": "theirs"}]))
    assert list(store.transcript(SID)) == [USER]
    assert [info.entries for info in store.sessions()] == [1]
    held = store.lease(SID, "run_3")
    assert [info.held_by for info in (*view.sessions(), *store.sessions())] == ["", "run_3"]
    held.release()


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


def test_frames_come_no_faster_than_an_agent_writes(store: SqliteSessionStore) -> None:
    append(store, *({"type": "x"} for _ in range(5000)))
    with pytest.raises(DeniedError):
        append(store, *({"type": "x"} for _ in range(leased.ENTRIES_AT_ONCE + 1)))


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
