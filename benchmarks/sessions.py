"""Sessions in the store: pages of the list and a whole turn with 1k, 100k, 1M sessions stored.

`python -m benchmarks.sessions [most sessions] [rounds]`

Half of the sessions are archived, the newest of them too, and twenty are running: what a filter
leaves out is what a page must not pay for. A turn is what a gateway and a worker do with the
database for it, without an agent: a message is said, an attempt claims, tells and settles. A lease
is the claim alone, and a place what an attempt takes and gives back where the engine does not count a
tenant's runs: of a tenant with a limit, that has so many runs waiting for places. Sizes alternate in one process, so that a ratio is of the same minute.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from sqlalchemy import text

from benchmarks.gateway import SIZES, opened, postgresql
from ringfence.control import turns
from ringfence.control.journal import Journal
from ringfence.control.tenancy import Quota
from ringfence.control.turns import NewEvent, Turn, TurnEnd
from ringfence.model import RunStatus, SessionStatus
from ringfence.store import run_places, sessions
from ringfence.store.database import Database
from ringfence.store.paging import Page
from ringfence.store.run_places import Asked
from ringfence.store.sessions import SessionPage

RUNNING = 20
_AT_ONCE = 50_000
_FILL = """
INSERT INTO sessions (tenant_id, id, agent_id, agent_version, agent, environment_id, title,
    metadata, resources, vault_ids, budget, status, turn, attempt, unqueued_at, position, pending,
    transcript, transcript_begun, workspace, usage, active_us, running_since, created_at,
    updated_at, archived_at)
WITH RECURSIVE n(i) AS (SELECT {first} UNION ALL SELECT i + 1 FROM n WHERE i < {last})
SELECT '{tenant}', 'sesn_{tenant}_' || i, 'agent_' || (i % 100), 1, '{agent}', 'env', NULL,
    '{{}}', '[]', '[]', NULL,
    CASE WHEN i % ({rows} / {running}) = 1 THEN 'running' ELSE 'idle' END,
    0, 0, NULL, 0, '[]', 'x' || i, {false}, NULL, '{usage}', 0, NULL, i, i,
    CASE WHEN i % 2 = 0 OR (i > {rows} - {rows} / 3 AND i % 50 <> 1) THEN i END
FROM n
"""
_AGENT = '{"id":"agent_1","model":{"id":"m"},"name":"a","tools":[],"type":"agent","version":1}'


async def filled(database: Database, name: str, rows: int) -> str:
    """A tenant with so many sessions; its id."""
    tenant = f"t{rows}"
    usage = (
        '{"cache_creation_input_tokens":0,"cache_read_input_tokens":0,"cost_usd":0.0,'
        '"input_tokens":0,"output_tokens":0,"requests":0}'
    )
    values = {
        "rows": rows,
        "tenant": tenant,
        "agent": _AGENT,
        "usage": usage,
        "running": RUNNING,
        "false": "false" if name == "postgresql" else "0",
        "true": "true" if name == "postgresql" else "1",
    }
    statements = [
        f"INSERT INTO tenants VALUES ('{tenant}', '{tenant}', 1)",
        "INSERT INTO environments (tenant_id, id, body, created_at, updated_at) "
        f"VALUES ('{tenant}', 'env', '{{}}', 1, 1)",
        f"INSERT INTO tenant_limits (tenant_id, runs) VALUES ('{tenant}', 1)",
    ]
    # no statement may take as long as all of them
    for first in range(1, rows + 1, _AT_ONCE):
        some = {**values, "first": first, "last": min(rows, first + _AT_ONCE - 1)}
        statements += [_FILL.format(**some), _WAITS.format(**some)]
    for statement in statements:
        async with database.writing() as connection:
            # a colon in JSON is no parameter
            await connection.exec_driver_sql(statement)
    return tenant


def pages(tenant: str, rows: int) -> dict[str, SessionPage]:
    """What is asked for."""
    middle = (rows // 2, f"sesn_{tenant}_{rows // 2}")
    return {
        "first page": SessionPage(page=Page(limit=20)),
        "middle page": SessionPage(page=Page(limit=20, after=middle)),
        "running": SessionPage(page=Page(limit=20), statuses=(SessionStatus.RUNNING,)),
        "idle": SessionPage(page=Page(limit=20), statuses=(SessionStatus.IDLE,)),
        "one agent's": SessionPage(page=Page(limit=20), agent_id="agent_53"),
        "with archived": SessionPage(page=Page(limit=20, archived=True, after=middle)),
        "two statuses": SessionPage(
            page=Page(limit=20), statuses=(SessionStatus.RUNNING, SessionStatus.RESCHEDULING)
        ),
        "most statuses": SessionPage(
            page=Page(limit=20), statuses=(SessionStatus.RUNNING, SessionStatus.IDLE)
        ),
        "running, all": SessionPage(
            page=Page(limit=20, archived=True), statuses=(SessionStatus.RUNNING,)
        ),
        "agent's run.": SessionPage(
            page=Page(limit=20), agent_id="agent_21", statuses=(SessionStatus.RUNNING,)
        ),
        "a version": SessionPage(page=Page(limit=20), agent_id="agent_53", agent_version=2),
    }


async def turn(database: Database, session: str) -> float:
    """One turn's transactions; seconds of the claim."""
    async with database.writing() as connection:
        row = await sessions.find(connection, session)
        assert row
        journal = Journal(connection, row)
        journal.say("user.message", {"content": [{"type": "text", "text": "x"}]}, waits=True)
        await journal.go_on()
        await journal.write()
        run_id = turns.run_id_of(session, row.turn + 1)
    async with database.writing() as connection:
        await turns.queued(connection, run_id)
    began = time.perf_counter()
    async with database.writing() as connection:
        claimed = await turns.claim(connection, run_id, 1)
    leased = time.perf_counter() - began
    assert isinstance(claimed, Turn)
    said = NewEvent(type="agent.message", body={"content": [{"type": "text", "text": "y"}]})
    async with database.writing() as connection:
        await turns.append(connection, claimed, [said])
    async with database.writing() as connection:
        await turns.settle(connection, claimed, TurnEnd(status=RunStatus.SUCCEEDED))
    return leased


_WAITS = """
INSERT INTO run_places (tenant_id, run_id, attempt, priority, worker, asked_at, expires_at, woken)
WITH RECURSIVE n(i) AS (SELECT {first} UNION ALL SELECT i + 1 FROM n WHERE i < {last})
SELECT '{tenant}', 'waits_{tenant}_' || i, 1, 3, NULL, i, 4000000000000000, {true} FROM n
"""


async def place(database: Database, tenant: str) -> None:
    """Taken before all that wait, and given back: what a lease costs beside them. Then one that
    finds none.
    """
    mine = Asked(
        tenant=tenant,
        run_id="mine",
        attempt=1,
        priority=1,
        worker="w",
        lease=60_000_000,
        patience=60_000_000,
    )
    async with database.writing() as connection:
        assert (await run_places.take(connection, mine)).taken
    async with database.writing() as connection:
        await run_places.release(connection, mine)
    async with database.writing() as connection:
        last = replace(mine, run_id="last", priority=4)
        assert not (await run_places.take(connection, last)).taken


def idle(tenant: str, number: int) -> str:
    """The id of one that is not running, however few there are."""
    return f"sesn_{tenant}_{50 * (number // 49) + 2 + number % 49}"


async def timed(act: Callable[[], Awaitable[Any]]) -> float:
    """Seconds of an act, or those that it says itself."""
    began = time.perf_counter()
    told = await act()
    return told if isinstance(told, float) else time.perf_counter() - began


async def measure(url: str, name: str, most: int, rounds: int) -> None:
    """Print each act's time at each size, and the ratio to the smallest."""
    database = opened(url)
    await database.migrate()
    tenants = {size: await filled(database, name, size) for size in SIZES if size <= most}
    if name == "postgresql":
        async with database.reading() as connection:
            await connection.execute(text("ANALYZE sessions, run_places"))

    async def listed(tenant: str, wanted: SessionPage) -> None:
        async with database.reading() as connection:
            await sessions.page(connection, tenant, wanted, Quota().page_bytes)

    async def swept() -> None:
        async with database.reading() as connection:
            await turns.unqueued(connection, 10**18, 100)

    async def whole(tenant: str, number: int) -> None:
        await turn(database, idle(tenant, number))

    acts: dict[str, dict[int, Callable[[int], Awaitable[Any]]]] = {}
    for size, tenant in tenants.items():
        for act, wanted in pages(tenant, size).items():
            acts.setdefault(act, {})[size] = lambda _, t=tenant, w=wanted: listed(t, w)
        acts.setdefault("a turn", {})[size] = lambda n, t=tenant: whole(t, n)
        acts.setdefault("a lease", {})[size] = lambda n, t=tenant: turn(database, idle(t, n))
        acts.setdefault("a place", {})[size] = lambda _, t=tenant: place(database, t)
        acts.setdefault("sweep", {})[size] = lambda _: swept()
    for act, sizes in acts.items():
        times: dict[int, list[float]] = {size: [] for size in sizes}
        for number in range(rounds):
            for size, do in sizes.items():
                spent = await timed(lambda do=do, n=number: do(n))
                if number >= rounds // 10:
                    times[size].append(spent)
        least = statistics.median(times[min(times)])
        for size, spent_ in times.items():
            ordered = sorted(spent_)
            p50, p99 = statistics.median(ordered), ordered[int(len(ordered) * 0.99)]
            print(
                f"{act:13} {name:10} {size:>9,} sessions   p50 {p50 * 1e3:7.2f} ms   "
                f"p99 {p99 * 1e3:7.2f} ms   {p50 / least:.2f}x",
                flush=True,
            )
    await database.close()


def main(arguments: list[str]) -> None:
    """Entry."""
    most = int(arguments[0]) if arguments else SIZES[-1]
    rounds = int(arguments[1]) if len(arguments) > 1 else 150
    with tempfile.TemporaryDirectory(prefix="ringfence-bench-") as place, postgresql() as make:
        asyncio.run(measure(str(Path(place) / "s" / "platform.sqlite"), "sqlite", most, rounds))
        if make is not None:
            asyncio.run(measure(make("many"), "postgresql", most, rounds))


if __name__ == "__main__":
    main(sys.argv[1:])
