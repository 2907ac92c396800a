"""The contract of a session store, one test a clause; every store passes it unchanged.

Subclass `SessionStoreContract` and give it an `opened` fixture: a function that opens the place
under test, as another process would each time. Each clause takes a tenant of its own, so that the
place need not be empty. The SDK's own suite is one of the clauses.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ringfence.errors import CallerError, DeniedError, UnavailableError
from ringfence.record.session_base import Claim, SessionLimits, SessionStore
from ringfence.record.transcript import PROJECT, Entry

__all__ = ["Opener", "SessionStoreContract"]

Opener = Callable[..., SessionStore]
"""Called with nothing, or with `SessionLimits`."""

SID = "11111111-2222-4333-8444-555555555555"
OTHER = "99999999-2222-4333-8444-555555555555"
KEY = {"project_key": PROJECT, "session_id": SID}


def entry(number: int, **more: Any) -> Entry:
    """An entry with a key."""
    return {"type": "user", "uuid": f"u-{number}", "n": number, **more}


class _Clauses:
    @pytest.fixture
    def opened(self) -> Iterator[Opener]:
        """Opens the place; closes what was opened."""
        raise NotImplementedError("a subclass names the store")

    @pytest.fixture
    def tenant(self) -> str:
        """One that no other clause has."""
        return f"tenant_{uuid.uuid4().hex}"

    @pytest.fixture
    def store(self, opened: Opener, tenant: str) -> SessionStore:
        """The store under test, this clause's part of it."""
        return opened().for_tenant(tenant)

    @staticmethod
    def load(store: SessionStore, session: str = SID, subpath: str = "") -> list[Any]:
        """What is stored, empty when there is nothing."""
        key = {"project_key": PROJECT, "session_id": session, "subpath": subpath}
        return asyncio.run(store.load(key)) or []


class _EntryClauses(_Clauses):
    def test_the_sdks_conformance_suite(self, opened: Opener, tenant: str) -> None:
        """All of its contracts, none left out."""
        from claude_agent_sdk.testing import run_session_store_conformance

        store, numbers = opened(), itertools.count()

        def fresh() -> Any:
            return store.for_tenant(f"{tenant}-{next(numbers)}")

        asyncio.run(run_session_store_conformance(fresh))
        assert next(numbers) == 15, "a contract was skipped"

    def test_an_entry_sent_twice_is_stored_once(self, store: SessionStore) -> None:
        """By its uuid; one without is stored as often as it comes."""
        for _ in range(2):
            store.add(KEY, [entry(1), {"type": "mode"}, entry(1)])
        store.add({**KEY, "subpath": "subagents/a"}, [entry(1)])
        assert self.load(store) == [entry(1), {"type": "mode"}, {"type": "mode"}]
        assert self.load(store, subpath="subagents/a") == [entry(1)]

    def test_hostile_content_comes_back_as_it_was(self, store: SessionStore) -> None:
        """What no text column, no line and no key of a store would hold by itself."""
        entries: list[Entry] = [
            {"type": "x", "uuid": name, "text": "\0\ud800\u2028\r\n\x7f\uffff💥", "n": 2**63}
            for name in ("\0", "\ud800", "a\nb", "é", "'; DROP TABLE entry; --")
        ]
        store.add(KEY, entries)
        assert self.load(store) == entries

    def test_much_at_once_and_little_by_little(self, store: SessionStore) -> None:
        """Order holds over pieces of whatever size a store cuts."""
        wanted = [entry(number, text=uuid.uuid4().hex * (number % 90)) for number in range(1200)]
        store.add(KEY, wanted[:1000])
        for at in range(1000, 1200, 20):
            store.add(KEY, wanted[at : at + 20])
        assert self.load(store) == wanted
        tenant_view = list(store.transcript(SID, last=7))
        assert tenant_view == wanted[-7:]

    @pytest.mark.parametrize(
        "key",
        [
            {"session_id": "../x"},
            {"session_id": "a/b"},
            {"project_key": ".."},
            {"project_key": "a/b"},
            {"subpath": "../x"},
            {"subpath": "/x"},
            {"subpath": "a//b"},
        ],
    )
    def test_what_is_no_key_is_refused(self, store: SessionStore, key: dict[str, str]) -> None:
        """With nothing stored; the twin is every other clause."""
        with pytest.raises(DeniedError) as caught:
            store.add({**KEY, **key}, [entry(1)])
        assert caught.value.code == "session-frame-refused"
        assert self.load(store) == []

    def test_a_session_grows_so_far_and_no_further(self, opened: Opener, tenant: str) -> None:
        """A refused append leaves nothing; what is sent again is counted once."""
        store = opened(SessionLimits(max_bytes=2000)).for_tenant(tenant)
        big = entry(1, text="a" * 1000)
        for _ in range(5):
            store.add(KEY, [big])
        with pytest.raises(DeniedError):
            store.add(KEY, [entry(2), entry(3, text="b" * 1500)])
        store.add(KEY, [entry(4)])
        assert self.load(store) == [big, entry(4)]
        (info,) = store.sessions()
        assert (info.entries, 1000 < info.bytes < 2000) == (2, True)

    def test_appends_at_once_are_all_there(self, opened: Opener, tenant: str) -> None:
        """From two processes' stores; each writer's own order holds, a shared uuid comes once."""
        stores = [opened().for_tenant(tenant) for _ in range(2)]
        failed: list[BaseException] = []

        def write(writer: int) -> None:
            try:
                for number in range(6):
                    mine = {"type": "x", "uuid": f"{writer}-{number}", "by": writer, "n": number}
                    stores[writer % 2].add(KEY, [mine, entry(number)])
            except BaseException as error:  # noqa: BLE001  told below
                failed.append(error)

        threads = [threading.Thread(target=write, args=(writer,)) for writer in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed
        found = self.load(stores[0])
        assert sorted(e["n"] for e in found if "by" not in e) == list(range(6))
        for writer in range(4):
            assert [e["n"] for e in found if e.get("by") == writer] == list(range(6))
        assert self.load(stores[1]) == found


class _LeaseClauses(_Clauses):
    def test_one_live_run_a_session(self, opened: Opener, tenant: str) -> None:
        """Whoever comes second is told who holds it."""
        first, second = (opened().for_tenant(tenant) for _ in range(2))
        lease = first.lease(SID, "run_1")
        with pytest.raises(UnavailableError) as caught:
            second.lease(SID, "run_2")
        assert caught.value.code == "session-busy"
        assert "run_1" in caught.value.message
        second.lease(OTHER, "run_2").release()
        lease.renew()
        lease.release()
        second.lease(SID, "run_2").release()

    def test_the_next_attempt_of_a_run_waits_for_no_dead_one(
        self, opened: Opener, tenant: str
    ) -> None:
        """It takes over at once, and what the earlier one still writes is refused; an attempt of
        another run, the same one, an earlier one, and no attempt at all wait as ever.
        """
        first, second = (opened().for_tenant(tenant) for _ in range(2))
        late = first.lease(SID, "run_1", claim=Claim("sesn_1.1", 9))
        asyncio.run(late.append(KEY, [entry(1)]))
        others: list[Claim | None] = [
            *(None, Claim("sesn_1.1", 9), Claim("sesn_1.1", 8), Claim("sesn_1.1", 0)),
            *(Claim("sesn_1.10", 10), Claim("sesn_1", 10), Claim("sesn_0.1", 99)),
        ]
        for claim in others:
            with pytest.raises(UnavailableError) as caught:
                second.lease(SID, "sesn_1.1", claim=claim)
            assert caught.value.code == "session-busy"
            assert "run sesn_1.1 holds" in caught.value.message
        asyncio.run(late.append(KEY, [entry(2)]))
        now = second.lease(SID, "run_2", claim=Claim("sesn_1.1", 10))
        acts: list[Callable[[], object]] = [
            lambda: asyncio.run(late.append(KEY, [entry(3)])),
            late.renew,
            lambda: first.lease(SID, "run_1", claim=Claim("sesn_1.1", 9)),
        ]
        for act in acts:
            with pytest.raises(UnavailableError) as caught:
                act()
            assert caught.value.code == "session-busy"
        late.release()
        asyncio.run(now.append(KEY, [entry(4)]))
        now.renew()
        assert [info.held_by for info in first.sessions()] == ["sesn_1.1"]
        assert self.load(first) == [entry(1), entry(2), entry(4)]
        now.release()
        # given back by the one it was taken by, it is free for anybody
        first.lease(SID, "run_3").release()

    def test_of_many_who_want_it_one_gets_it(self, opened: Opener, tenant: str) -> None:
        """At the same moment."""
        stores, codes = [opened().for_tenant(tenant) for _ in range(2)], []
        barrier = threading.Barrier(6)

        def want(number: int) -> None:
            barrier.wait()
            try:
                stores[number % 2].lease(SID, f"run_{number}")
                codes.append("")
            except UnavailableError as error:
                codes.append(error.code)

        threads = [threading.Thread(target=want, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(codes) == ["", *["session-busy"] * 5]

    def test_a_run_that_lost_its_lease_writes_no_more(self, opened: Opener, tenant: str) -> None:
        """Not by append, not by heartbeat; nor does it free what is another's."""
        brief = opened(SessionLimits(lease_seconds=0.3)).for_tenant(tenant)
        late = brief.lease(SID, "run_1")
        asyncio.run(late.append(KEY, [entry(1)]))
        time.sleep(0.4)
        now = opened().for_tenant(tenant).lease(SID, "run_1")  # the token tells them apart
        acts: list[Callable[[], object]] = [
            lambda: asyncio.run(late.append(KEY, [entry(2)])),
            late.renew,
        ]
        for act in acts:
            with pytest.raises(UnavailableError) as caught:
                act()
            assert caught.value.code == "session-busy"
        late.release()
        asyncio.run(now.append(KEY, [entry(3)]))
        now.renew()
        assert self.load(brief) == [entry(1), entry(3)]
        with pytest.raises(UnavailableError):
            opened().for_tenant(tenant).lease(SID, "run_9")
        now.release()

    def test_a_takeover_cuts_a_stream_of_appends_once(self, opened: Opener, tenant: str) -> None:
        """After it has returned nothing of before comes any more, however fast it was written."""
        brief = opened(SessionLimits(lease_seconds=0.2)).for_tenant(tenant)
        late, ended = brief.lease(SID, "run_1"), []

        def stream() -> None:
            for number in range(1_000_000):
                try:
                    brief.add(KEY, [entry(number)], token=("run_1", 1))
                except UnavailableError as error:
                    ended.append((number, error.code))
                    return
                time.sleep(0.001)

        writer = threading.Thread(target=stream)
        writer.start()
        time.sleep(0.5)
        second = opened().for_tenant(tenant)
        lease = second.lease(SID, "run_2")
        seen = self.load(second)
        asyncio.run(lease.append(KEY, [{"type": "x", "mine": True}]))
        writer.join(30)
        assert not writer.is_alive()
        assert ended == [(len(seen), "session-busy")]
        assert [e["n"] for e in seen] == list(range(len(seen)))
        assert self.load(second) == [*seen, {"type": "x", "mine": True}]
        late.release()
        lease.release()

    def test_a_deletion_does_not_begin_the_tokens_anew(self, opened: Opener, tenant: str) -> None:
        """Who held the session before it was deleted does not write it back."""
        brief = opened(SessionLimits(lease_seconds=0.3)).for_tenant(tenant)
        late = brief.lease(SID, "run_1")
        asyncio.run(late.append(KEY, [entry(1)]))
        time.sleep(0.4)
        opened().for_tenant(tenant).remove(SID)
        with pytest.raises(UnavailableError):
            asyncio.run(late.append(KEY, [entry(2)]))
        assert self.load(brief) == []
        again = brief.lease(SID, "run_1")
        asyncio.run(again.append(KEY, [entry(3)]))
        with pytest.raises(UnavailableError):
            asyncio.run(late.append(KEY, [entry(4)]))
        again.release()
        assert self.load(brief) == [entry(3)]

    def test_a_lease_further_off_than_any_runs_is_of_a_wrong_clock(
        self, opened: Opener, tenant: str
    ) -> None:
        """And does not lock a session for a year."""
        opened(SessionLimits(lease_seconds=365 * 86_400)).for_tenant(tenant).lease(SID, "run_1")
        store = opened().for_tenant(tenant)
        lease = store.lease(SID, "run_2")
        with pytest.raises(UnavailableError):
            store.lease(SID, "run_3")
        lease.release()


class SessionStoreContract(_EntryClauses, _LeaseClauses):
    """Every clause. Override `opened`."""

    def test_tenants_know_nothing_of_each_other(self, opened: Opener, tenant: str) -> None:
        """The same session id is two sessions, and two leases."""
        store = opened()
        mine, others = store.for_tenant(tenant), store.for_tenant(f"{tenant}x")
        mine.add(KEY, [entry(1)])
        mine.add({**KEY, "subpath": "subagents/a"}, [entry(2)])
        asks: list[Callable[[str], object]] = [
            *(others.require, others.transcript, others.materialise, others.tool_use_ids),
            *(others.fork, others.remove),
        ]
        for ask in asks:
            with pytest.raises(CallerError) as caught:
                ask(SID)
            assert caught.value.code == "session-unknown"
        assert others.sessions() == []
        assert asyncio.run(others.list_sessions(PROJECT)) == []
        assert asyncio.run(others.list_subkeys(KEY)) == []
        held = mine.lease(SID, "run_1")
        others.lease(SID, "run_2").release()
        with pytest.raises(UnavailableError):
            others.add(KEY, [entry(3)], token=("run_1", 1))
        asyncio.run(others.delete(KEY))
        held.renew()
        held.release()
        assert self.load(mine) == [entry(1)]
        assert mine.require(SID) == SID
        for name in ("", "-", "a/b", "../a", "{x}", "a b"):
            with pytest.raises(CallerError):
                store.for_tenant(name)

    def test_fork_and_remove(self, store: SessionStore) -> None:
        """A fork is whole and its own; a removal takes all, and not during a run."""
        store.add(KEY, [entry(1, sessionId=SID)])
        store.add({**KEY, "subpath": "subagents/agent-1"}, [entry(2, sessionId=SID)])
        recorded: list[str] = []

        def refuse(_: str) -> None:
            raise UnavailableError("store-unavailable", "the audit log is full")

        with pytest.raises(UnavailableError, match="full"):
            store.fork(SID, record=refuse)
        assert [info.session_id for info in store.sessions()] == [SID]
        new = store.fork(SID, record=recorded.append)
        assert recorded == [new]
        assert next(store.transcript(new))["sessionId"] == new
        assert set(store.materialise(new)) == {
            f".claude/projects/{PROJECT}/{new}.jsonl",
            f".claude/projects/{PROJECT}/{new}/subagents/agent-1.jsonl",
        }
        assert {info.session_id: info.parent for info in store.sessions()} == {SID: "", new: SID}
        held = store.lease(SID, "run_1")
        assert {info.session_id: info.held_by for info in store.sessions()}[SID] == "run_1"
        with pytest.raises(UnavailableError):
            store.remove(SID)
        held.release()
        store.remove(SID)
        with pytest.raises(CallerError):
            store.require(SID)
        assert len(store.materialise(new)) == 2

    def test_pages_the_latest_first(self, store: SessionStore) -> None:
        """Each once, and with its first prompt."""
        ids = [f"11111111-2222-4333-8444-55555555555{n}" for n in range(5)]
        for number, name in enumerate(ids):
            message = {"role": "user", "content": f"prompt {number}"}
            store.add({**KEY, "session_id": name}, [entry(1, message=message)])
            time.sleep(0.003)
        pages = [store.sessions(limit=2, skip=skip) for skip in (0, 2, 4, 6)]
        assert [len(page) for page in pages] == [2, 2, 1, 0]
        found = [info for page in pages for info in page]
        assert [info.session_id for info in found] == ids[::-1]
        assert [info.first_prompt for info in found] == [f"prompt {n}" for n in range(5)][::-1]
        assert all(0 <= time.time() - info.created < 3600 for info in found)

    def test_summaries_go_on_from_where_they_were(self, store: SessionStore) -> None:
        """Folded in pieces they say what one fold says; nothing of a deleted session is left."""
        stamp = "2026-01-01T00:00:0{}.000Z"
        for number in range(3):
            store.add(
                KEY, [entry(number, timestamp=stamp.format(number), customTitle=f"t{number}")]
            )
            (summary,) = asyncio.run(store.list_session_summaries(PROJECT))
        whole = store.for_tenant("whole" + uuid.uuid4().hex)
        whole.add(
            KEY,
            [entry(n, timestamp=stamp.format(n), customTitle=f"t{n}") for n in range(3)],
        )
        (once,) = asyncio.run(whole.list_session_summaries(PROJECT))
        assert summary["data"] == once["data"]
        asyncio.run(store.delete(KEY))
        store.add(KEY, [entry(9, timestamp=stamp.format(9))])
        (anew,) = asyncio.run(store.list_session_summaries(PROJECT))
        assert "t2" not in str(anew)

    def test_tool_uses_of_subagents_too(self, store: SessionStore) -> None:
        """For the witness ledger, each once."""

        def use(name: str) -> Entry:
            return {"type": "assistant", "message": {"content": [{"type": "tool_use", "id": name}]}}

        store.add(KEY, [use("toolu_1"), use("toolu_2"), use("toolu_1")])
        store.add({**KEY, "subpath": "subagents/agent-1"}, [use("toolu_3")])
        assert store.tool_use_ids(SID) == ["toolu_1", "toolu_2", "toolu_3"]
