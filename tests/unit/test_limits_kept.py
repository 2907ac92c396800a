"""What a process keeps in mind of the limits' file is what the file says, whoever writes it."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringfence.errors import UnavailableError
from ringfence.limits import kept
from ringfence.limits.breaker import Breaker, BreakerSpec
from ringfence.limits.lane import Amount, Caps, Seen, Spec, Want
from ringfence.limits.sqlite import SqliteLimits
from ringfence.limits.store import LimitStore, MemoryLimits

T = 1e9
SPEC = Spec(name="l", caps=Caps(input_tokens=3000.0))
BREAKERS = [BreakerSpec(key=f"model/{name}", failures=2) for name in "ab"]
KINDS = ("take", "settle", "settle", "leave", "park", "correct", "note", "admit", "fails", "late")
Act = tuple[int, str, float, str, bool, float, float]
ACTS = st.lists(
    st.tuples(
        st.integers(0, 1),
        st.sampled_from(KINDS),
        # a clock that was far ahead sets all of a lane back
        st.floats(0, 30) | st.sampled_from([-500.0, 3700.0]),
        st.sampled_from("abc"),
        st.booleans(),
        st.floats(0, 400),
        st.floats(-300, 300),
    ),
    min_size=1,
    max_size=40,
)


class Fault(Exception):
    """Of an act, when all before it in its transaction is done."""


async def done(store: LimitStore, number: int, act: Act, now: float) -> Any:
    """One act of a kind."""
    _, kind, _, tenant, batch, tokens, off = act
    breaker = BREAKERS[batch]
    if kind in {"take", "late"}:
        caps = Caps(requests=60) if batch else Caps()
        amount = Amount(1, tokens)
        wants = [
            Want(id=f"t{each}", tenant=tenant, amount=amount, share=1.0, batch=batch, caps=caps)
            for each in (number, number // 2)
        ]
        return await store.take(SPEC, wants, now)
    if kind == "settle":
        return await store.settle(SPEC, tenant, Amount(0, off), now)
    if kind in {"leave", "park"}:
        park = tokens if kind == "park" else 0.0
        return await store.leave(SPEC, [f"t{number // 2}", f"t{number - 1}"], park=park, now=now)
    if kind == "correct":
        return await store.correct(SPEC, Seen(left=Caps(input_tokens=tokens)), now)
    if kind == "note":
        return await store.note(breaker, f"x/{number}", ok=off > 0, now=now)
    return await store.admit(breaker, f"x/{number}", now=now)


async def fails(store: SqliteLimits, number: int, act: Act, now: float) -> None:
    """A transaction in which something was changed, and that is not committed."""

    def work(db: sqlite3.Connection) -> None:
        rows = store._kept.lane(SPEC.name, now, SPEC.window, tenants=act[3], tickets=True)
        rows.lane.seq, rows.lane.served = number + 1000, 1e6
        store._kept.noted(BREAKERS[0].key, Breaker(state="open", until=now + 1e9))
        store._kept.write()
        raise Fault

    with pytest.raises(Fault):
        await store._turns.act(work)


async def compared(stores: Sequence[SqliteLimits], acts: list[Act]) -> None:
    truth, now, late = MemoryLimits(), T, []
    for number, act in enumerate(acts):
        now += act[2]
        store = stores[act[0]]
        if act[1] == "fails":
            await fails(store, number, act, now)
            continue
        expected = await done(truth, number, act, now)
        if act[1] == "settle" and act[4]:
            # it waits in its line for the next act of its process, which takes it along
            late.append((store, asyncio.ensure_future(done(store, number, act, now))))
            await asyncio.sleep(0)
            if number + 1 < len(acts) and acts[number + 1][:2] == (act[0], "take"):
                continue
        else:
            assert await done(store, number, act, now) == expected
        for _, each in late:
            await each
        late.clear()
        await same(truth, stores)


async def same(truth: MemoryLimits, stores: Sequence[SqliteLimits]) -> None:
    """Through either connection, and in what a third one reads."""
    for store in stores:
        assert (await store.look(SPEC.name))[0] == (await truth.look(SPEC.name))[0]
        assert (await store.breakers())[0] == (await truth.breakers())[0]


@settings(max_examples=60, deadline=None)
@given(acts=ACTS)
def test_two_processes_see_what_one_would(acts: list[Act]) -> None:
    """Acts of both, several in one transaction, and transactions that fail in between."""

    async def run(place: str) -> None:
        stores = [SqliteLimits(Path(place) / "limits.sqlite") for _ in range(2)]
        try:
            await compared(stores, acts)
        finally:
            for store in stores:
                await store.close()

    with TemporaryDirectory() as place:
        asyncio.run(run(place))


async def test_what_was_not_committed_was_not_taken(tmp_path: Path) -> None:
    """A full disk at the commit: the next act finds what the file says. Its twin is committed."""
    store, spec = SqliteLimits(tmp_path / "limits.sqlite"), Spec(name="x", caps=Caps(requests=25))
    want = Want(id="1", tenant="a", amount=Amount(1), share=1.0)
    assert (await store.take(spec, [want], T)).granted == ("1",)
    store._db.execute("PRAGMA max_page_count=1")
    many = [Want(id=f"w{n}" * 200, tenant=f"t{n}", amount=Amount(1), share=1.0) for n in range(400)]
    with pytest.raises(UnavailableError):
        await store.take(spec, many, T)
    assert (await store.look("x"))[0].seq == 1
    store._db.execute("PRAGMA max_page_count=100000")
    taken = await store.take(spec, [want], T)
    assert (taken.granted, taken.waiting[0].position) == ((), 1)
    assert (await store.look("x"))[0].seq == 2
    await store.close()


async def test_no_more_is_kept_than_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "_MOST_LANES", 3)
    store = SqliteLimits(tmp_path / "limits.sqlite")
    want = Want(id="1", tenant="a", amount=Amount(1), share=1.0)
    for number in range(20):
        await store.take(Spec(name=f"lane{number}"), [want], T)
        assert len(store._kept._lanes) <= 4
    assert (await store.look("lane0"))[0].seq == 1
    await store.close()


async def test_at_once_where_the_file_is_free_and_else_not_at_all(tmp_path: Path) -> None:
    """It takes along what waits for company; behind another's lock nothing of it is done."""
    store = SqliteLimits(tmp_path / "limits.sqlite")
    other = sqlite3.connect(tmp_path / "limits.sqlite", isolation_level=None)
    spec = Spec(name="x", caps=Caps(requests=25))
    want = Want(id="1", tenant="a", amount=Amount(1), share=1.0)
    taken = store.take_now(spec, [want])
    assert taken is not None
    assert taken.granted == ("1",)
    back = asyncio.ensure_future(store.settle(spec, "a", Amount(1)))
    await asyncio.sleep(0)
    again = store.take_now(spec, [want])
    assert again is not None
    assert again.granted == ("1",), "what came back is there"
    await back
    other.execute("BEGIN IMMEDIATE")
    assert store.take_now(spec, [want]) is None
    other.execute("COMMIT")
    assert (await store.look("x"))[0].seq == 2
    assert not store._turns._line
    other.close()
    await store.close()
