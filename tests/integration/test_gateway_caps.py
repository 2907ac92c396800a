"""What one tenant may keep, and what one page may weigh, on both databases."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from sqlalchemy import select, text

from gateway_rig import Place, Rig, caller
from ringfence.config import GatewaySettings
from ringfence.control import keys
from ringfence.errors import DeniedError
from ringfence.store.tables import TENANT_COUNTS

SETTINGS = GatewaySettings(
    agents=4,
    agent_versions=3,
    environments=2,
    sessions=4,
    vaults=2,
    files=2,
    definition_kb=16,
    page_kb=32,
)


@pytest.fixture(scope="module")
def rig(place: Any) -> Rig:
    return Rig(place=place, settings=SETTINGS)


@pytest.fixture(scope="module")
def base(rig: Rig) -> Iterator[str]:
    with rig.serving() as url:
        yield url


def refused(answer: httpx2.Response, status: int, code: str) -> None:
    found = answer.json()["error"]["details"]["error_code"]
    assert (answer.status_code, found) == (status, code), answer.text


def test_a_tenant_keeps_so_many_agents_and_another_as_many(rig: Rig, base: str) -> None:
    body = {"name": "x", "model": "m"}
    with caller(base, rig.key("many").text) as client:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: client.post("/v1/agents", json=body), range(8)))
        assert sorted(one.status_code for one in answers) == [200] * 4 + [403] * 4
        refused(client.post("/v1/agents", json=body), 403, "tenant_full")
        # an archived one is kept, and counts
        first = client.get("/v1/agents").json()["data"][0]["id"]
        client.post(f"/v1/agents/{first}/archive")
        refused(client.post("/v1/agents", json=body), 403, "tenant_full")
    with caller(base, rig.key("modest").text) as client:
        assert client.post("/v1/agents", json=body).status_code == 200


def test_an_agent_has_so_many_versions(rig: Rig, base: str) -> None:
    with caller(base, rig.key("versions").text) as client:
        made = client.post("/v1/agents", json={"name": "x", "model": "m"}).json()["id"]
        for number in range(2):
            assert client.post(f"/v1/agents/{made}", json={"name": f"{number}"}).status_code == 200
        refused(client.post(f"/v1/agents/{made}", json={"name": "more"}), 403, "tenant_full")
        # what changes nothing makes no version
        assert client.post(f"/v1/agents/{made}", json={"name": "1"}).json()["version"] == 3


def test_an_environment_that_is_deleted_makes_room(rig: Rig, base: str) -> None:
    with caller(base, rig.key("places").text) as client:
        made = [client.post("/v1/environments", json={"name": f"{n}"}).json() for n in range(2)]
        refused(client.post("/v1/environments", json={"name": "x"}), 403, "tenant_full")
        assert client.delete(f"/v1/environments/{made[0]['id']}").status_code == 200
        assert client.delete(f"/v1/environments/{made[0]['id']}").status_code == 404
        assert client.post("/v1/environments", json={"name": "x"}).status_code == 200
        refused(client.post("/v1/environments", json={"name": "x"}), 403, "tenant_full")


def test_a_definition_is_so_large_at_most(rig: Rig, base: str) -> None:
    with caller(base, rig.key("large").text) as client:
        small = {"name": "x", "model": "m", "system": "s" * 12_000}
        made = client.post("/v1/agents", json=small).json()["id"]
        large = {"system": "s" * 17_000}
        refused(client.post("/v1/agents", json={**small, **large}), 413, "request_too_large")
        # nor in small steps
        refused(client.post(f"/v1/agents/{made}", json=large), 413, "request_too_large")
        hosts = [f"{n:060}.build.example.com" for n in range(180)]
        wide = {"type": "cloud", "networking": {"type": "limited", "allowed_hosts": hosts}}
        described = {"name": "x", "config": wide, "description": "d" * 2000}
        refused(client.post("/v1/environments", json=described), 413, "request_too_large")
        assert client.get("/v1/environments").json()["data"] == []
        wide["networking"] = {"type": "limited", "allowed_hosts": hosts[:50]}
        assert client.post("/v1/environments", json=described).status_code == 200


def test_a_page_ends_early_and_the_next_goes_on(rig: Rig, base: str) -> None:
    with caller(base, rig.key("pages").text) as client:
        system = "s" * 15_000
        made = [
            client.post("/v1/agents", json={"name": f"{n}", "model": "m", "system": system})
            for n in range(4)
        ]
        wanted = [one.json()["id"] for one in reversed(made)]
        found, page, sizes = [], None, []
        while page or not found:
            query = {"limit": 100, **({"page": page} if page else {})}
            answer = client.get("/v1/agents", params=query)
            assert len(answer.content) < 64 * 1024
            found += [one["id"] for one in answer.json()["data"]]
            sizes.append(len(answer.json()["data"]))
            page = answer.json()["next_page"]
        assert (found, sizes) == (wanted, [3, 1])
        # a limit that is smaller holds, too
        small = client.get("/v1/agents", params={"limit": 2}).json()
        assert ([one["id"] for one in small["data"]], bool(small["next_page"])) == (
            wanted[:2],
            True,
        )
        agent = wanted[0]
        for name in ("a", "b"):
            client.post(f"/v1/agents/{agent}", json={"name": name})
        versions = client.get(f"/v1/agents/{agent}/versions", params={"limit": 100}).json()
        assert [one["version"] for one in versions["data"]] == [3, 2, 1]
        assert versions["next_page"] is None


def walked(client: httpx2.Client, path: str, **query: Any) -> tuple[list[str], list[int]]:
    """Ids of a whole list, page by page, and how many each page had; none is a large answer."""
    found: list[str] = []
    sizes: list[int] = []
    page = None
    while page or not sizes:
        answer = client.get(path, params={**query, **({"page": page} if page else {})})
        assert answer.status_code == 200, answer.text
        assert len(answer.content) < 64 * 1024
        found += [one["id"] for one in answer.json()["data"]]
        sizes.append(len(answer.json()["data"]))
        page = answer.json()["next_page"]
    return found, sizes


def test_sessions_are_so_many_and_their_pages_end_early(rig: Rig, base: str) -> None:
    with caller(base, rig.key("talks").text) as client:
        body = {"name": "x", "model": "m", "system": "s" * 15_000}
        agent = client.post("/v1/agents", json=body).json()["id"]
        place = client.post("/v1/environments", json={"name": "e"}).json()["id"]
        wanted = {"agent": agent, "environment_id": place}
        made = [client.post("/v1/sessions", json=wanted).json()["id"] for _ in range(4)]
        refused(client.post("/v1/sessions", json=wanted), 403, "tenant_full")
        assert walked(client, "/v1/sessions", limit=100) == (made[::-1], [3, 1])
        assert walked(client, "/v1/sessions", limit=100, order="asc") == (made, [3, 1])
        assert walked(client, "/v1/sessions", limit=2) == (made[::-1], [2, 2])
        assert client.delete(f"/v1/sessions/{made[0]}").status_code == 200
        # an agent that is changed for one session alone is no larger than another
        large = {**wanted, "agent": {"type": "agent_with_overrides", "id": agent}}
        large["agent"]["system"] = "s" * 17_000
        refused(client.post("/v1/sessions", json=large), 413, "request_too_large")
        large["agent"]["system"] = "s" * 1_000
        assert client.post("/v1/sessions", json=large).status_code == 200
        refused(client.post("/v1/sessions", json=wanted), 403, "tenant_full")


def test_a_page_of_events_ends_early_in_both_directions(rig: Rig, base: str) -> None:
    with caller(base, rig.key("events").text) as client:
        agent = client.post("/v1/agents", json={"name": "x", "model": "m"}).json()["id"]
        place = client.post("/v1/environments", json={"name": "e"}).json()["id"]
        wanted = {"agent": agent, "environment_id": place}
        path = f"/v1/sessions/{client.post('/v1/sessions', json=wanted).json()['id']}/events"
        for number in range(4):
            content = [{"type": "text", "text": str(number) * 15_000}]
            event = {"type": "user.message", "content": content}
            assert client.post(path, json={"events": [event]}).status_code == 200
        order, sizes = walked(client, path, limit=1000)
        assert len(order) == 5  # four messages, and that it runs
        assert sizes == [4, 1]
        assert walked(client, path, limit=1000, order="desc") == (order[::-1], [3, 2])
        assert walked(client, path, limit=2) == (order, [2, 2, 1])
        messages = [name for name in order if name != order[1]]
        assert walked(client, path, limit=1000, **{"types[]": "user.message"}) == (messages, [3, 1])


def test_vaults_and_files_that_are_deleted_make_room(rig: Rig, base: str) -> None:
    with caller(base, rig.key("keeps").text) as client:

        def vault() -> httpx2.Response:
            return client.post("/v1/vaults", json={"display_name": "v"})

        def file() -> httpx2.Response:
            return client.post("/v1/files", files={"file": ("a.txt", b"", "text/plain")})

        for path, make in (("/v1/vaults", vault), ("/v1/files", file)):
            made = [make().json()["id"] for _ in range(2)]
            refused(make(), 403, "tenant_full")
            assert client.delete(f"{path}/{made[0]}").status_code == 200
            assert client.delete(f"{path}/{made[0]}").status_code == 404
            assert make().status_code == 200
            refused(make(), 403, "tenant_full")


async def test_keys_that_are_good_are_so_many(place: Place) -> None:
    database = place.open()
    await database.migrate()
    try:
        async with database.writing() as connection:
            made = [
                await keys.create(connection, tenant="keys", name="k", most=2) for _ in range(2)
            ]
            with pytest.raises(DeniedError, match="as many as there may be"):
                await keys.create(connection, tenant="keys", name="k", most=2)
            await keys.create(connection, tenant="other", name="k", most=2)
            await keys.revoke(connection, made[0].row.id)
            await keys.create(connection, tenant="keys", name="k", most=2)
    finally:
        await database.close()


def test_counts_are_what_is_there(rig: Rig, base: str) -> None:
    async def counted() -> None:
        database = rig.place.open()
        async with database.reading() as connection:
            for kind in ("agents", "environments", "sessions", "vaults", "files"):
                rows = await connection.execute(
                    text(f"SELECT tenant_id, count(*) FROM {kind} GROUP BY tenant_id")
                )
                held = select(TENANT_COUNTS.c.tenant_id, TENANT_COUNTS.c.held)
                known = await connection.execute(held.where(TENANT_COUNTS.c.kind == kind))
                assert {one[0]: one[1] for one in known if one[1]} == {
                    one[0]: one[1] for one in rows
                }
        await database.close()

    asyncio.run(counted())


async def test_what_was_there_before_is_counted(place: Place) -> None:
    from alembic.operations import Operations
    from alembic.runtime.migration import MigrationContext

    from ringfence.store.migrations.versions import v0027_counts

    def again(sync: Any) -> None:
        with Operations.context(MigrationContext.configure(sync)):
            v0027_counts.upgrade()

    database = place.open()
    await database.migrate()
    try:
        async with database.writing() as connection:
            await keys.create(connection, tenant="before", name="k")
            (owner,) = (
                await connection.execute(text("SELECT id FROM tenants WHERE name = 'before'"))
            ).one()
            await connection.execute(
                text(
                    "INSERT INTO environments (tenant_id, id, body, created_at, updated_at)"
                    " VALUES (:owner, 'env_before', '{}', 1, 1)"
                ),
                {"owner": owner},
            )
            await connection.execute(text("DROP INDEX ix_agents_live"))
            await connection.execute(text("DROP INDEX ix_environments_live"))
            await connection.execute(text("DROP TABLE tenant_counts"))
            await connection.run_sync(again)
        async with database.reading() as connection:
            query = text("SELECT held FROM tenant_counts WHERE tenant_id = :o AND kind = :k")
            held = await connection.execute(query, {"o": owner, "k": "environments"})
            assert held.scalar_one() == 1
    finally:
        await database.close()


async def test_vaults_and_files_that_were_there_before_are_counted(place: Place) -> None:
    from alembic.operations import Operations
    from alembic.runtime.migration import MigrationContext

    from ringfence.store.migrations.versions import v0029_mended

    def again(sync: Any) -> None:
        with Operations.context(MigrationContext.configure(sync)):
            v0029_mended.upgrade()

    database = place.open()
    await database.migrate()
    try:
        async with database.writing() as connection:
            made = await keys.create(connection, tenant="earlier", name="k")
            owner = made.row.tenant_id
            await connection.execute(
                text(
                    "INSERT INTO vaults (tenant_id, id, body, created_at, updated_at)"
                    " VALUES (:owner, 'vlt_before', '{}', 1, 1)"
                ),
                {"owner": owner},
            )
            for index in ("ix_sessions_wakes_at", "ix_sessions_at_work"):
                await connection.execute(text(f"DROP INDEX {index}"))
            await connection.execute(text("ALTER TABLE sessions DROP COLUMN wakes_at"))
            later = "('sessions', 'vaults', 'files')"
            await connection.execute(text(f"DELETE FROM tenant_counts WHERE kind IN {later}"))
            await connection.run_sync(again)
        async with database.reading() as connection:
            held = select(TENANT_COUNTS.c.kind, TENANT_COUNTS.c.held)
            found = await connection.execute(held.where(TENANT_COUNTS.c.tenant_id == owner))
            assert {row.kind: row.held for row in found} == {"vaults": 1}
    finally:
        await database.close()
