"""Alerts on error budgets: fired once and resolved once, whoever looks and whoever dies."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from anthropic import Anthropic
from sqlalchemy import delete, select, text
from sqlalchemy.exc import DBAPIError

from ringfence.config import LatencySettings, SloSettings
from ringfence.config.slo import AlertmanagerSettings
from ringfence.control.courier import Courier
from ringfence.control.slo_watch import Watch, _LostError
from ringfence.control.webhooks import Target, signing_key
from ringfence.errors import CallerError, UnavailableError
from ringfence.store import environments, slo
from ringfence.store.database import Database
from ringfence.store.tables import SLO_ALERTS, SLO_COUNTS, SLO_WATCH, WEBHOOK_DELIVERIES
from ringfence.telemetry.hub import Telemetry
from ringfence.telemetry.labels import Labels
from ringfence.telemetry.prometheus import PrometheusMeters
from slo_rig import Alertmanager, Clock, an_environment, ended

SECRET = "whsec_" + "MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE="
ALL = {"fast", "slow", "ticket", "budget"}


@pytest.fixture
async def database(place: Any) -> Any:
    found = place.open()
    await found.migrate()
    async with found.writing() as connection:
        for table in (SLO_ALERTS, SLO_WATCH, SLO_COUNTS, WEBHOOK_DELIVERIES):
            await connection.execute(delete(table))
    yield found
    await found.close()


def promised(*servers: Alertmanager, **more: Any) -> SloSettings:
    managers = {
        f"am{count}": AlertmanagerSettings(url=one.url, within=True)
        for count, one in enumerate(servers)
    }
    return SloSettings(**{"success": 0.99, "alertmanagers": managers} | more)


async def states(database: Database) -> dict[str, str]:
    async with database.reading() as connection:
        return {row.rule: row.state for row in await slo.alerts(connection)}


async def deliveries_of(database: Database) -> list[tuple[str, str]]:
    async with database.reading() as connection:
        rows = await connection.execute(
            select(WEBHOOK_DELIVERIES.c.kind, WEBHOOK_DELIVERIES.c.body)
        )
        return sorted((kind, body["ringfence"]["rule"]) for kind, body in rows)


async def test_several_look_and_each_alert_is_told_once(database: Database) -> None:
    clock = Clock()
    ops = Target(
        name="ops",
        url="https://hooks.example.com/",
        keys=(signing_key(SECRET),),
        kinds=("slo.alert_fired", "slo.alert_resolved"),
    )
    await Courier(database, [ops], clock=clock).look()
    place = await an_environment(database)
    async with Alertmanager(clock) as server:
        settings = promised(server, window_days=1)
        watches = [Watch(database, settings, clock=clock) for _ in range(4)]
        await ended(database, place, clock.at, good=40)
        looked = await asyncio.gather(*(one.look() for one in watches))
        assert (sum(looked), server.told) == (1, [])
        await ended(database, place, clock.at, bad=20)
        for _ in range(3):
            clock.forward(20)
            await asyncio.gather(*(one.look() for one in watches))
        assert await states(database) == dict.fromkeys(ALL, "firing")
        # whoever had the watch is gone; after some looks another takes it
        (holder,) = [one for one, had in zip(watches, looked, strict=True) if had]
        others = [one for one in watches if one is not holder]
        took = []
        for _ in range(6):
            clock.forward(20)
            took += await asyncio.gather(*(one.look() for one in others))
            assert server.firing() >= {"budget", "ticket"}, "it stands there while nobody looks"
        assert took[:3] == [False] * 3
        assert any(took)
        # the hours in which it was bad are over one after the other
        for _ in range(40):
            clock.forward(3600)
            await ended(database, place, clock.at, good=1)
            if any(await asyncio.gather(*(one.look() for one in others))) and not server.firing():
                break
        server.tell()
        assert await states(database) == dict.fromkeys(ALL, "quiet")
        told = sorted(server.told)
        assert told == sorted((rule, state) for rule in ALL for state in ("firing", "resolved"))
        assert server.faults == []
    assert await deliveries_of(database) == sorted(
        (f"slo.alert_{what}", rule) for rule in ALL for what in ("fired", "resolved")
    )


async def test_one_that_lost_the_watch_writes_nothing(database: Database) -> None:
    clock, settings = Clock(), SloSettings(success=0.9)
    first, second = (Watch(database, settings, clock=clock) for _ in range(2))
    place = await an_environment(database)
    assert await first.look()
    await ended(database, place, clock.at, bad=20)
    clock.forward(61)
    assert await second.look()
    assert await states(database) == dict.fromkeys(ALL, "firing")
    async with database.writing() as connection:
        await connection.execute(delete(SLO_ALERTS))
    with pytest.raises(_LostError):
        await first._environment(place, clock.at)
    assert await states(database) == {}
    # its twin, who holds it
    assert await second._environment(place, clock.at)
    assert await states(database) == dict.fromkeys(ALL, "firing")
    assert not await first.look()


async def test_who_looks_says_how_all_stand_and_nobody_else(database: Database) -> None:
    clock, settings = Clock(), SloSettings(success=0.9)
    pages = [PrometheusMeters(frozenset({"worker"})) for _ in range(2)]
    hubs = [Telemetry(labels=Labels(tenants=10), meters=page) for page in pages]
    first, second = (Watch(database, settings, clock=clock, tell=hub.promises) for hub in hubs)
    place, well = await an_environment(database), await an_environment(database)
    await ended(database, place, clock.at, bad=20)
    await ended(database, well, clock.at, good=20)

    def left(page: PrometheusMeters, where: slo.Environment) -> float | None:
        labels = {"environment": where[1], "slo": "success"}
        return page.registry.get_sample_value("ringfence_slo_budget_left", labels)

    def fires(page: PrometheusMeters, where: slo.Environment, rule: str) -> float | None:
        severity = "page" if rule in {"fast", "slow"} else "ticket"
        labels = {"environment": where[1], "slo": "success", "rule": rule, "severity": severity}
        return page.registry.get_sample_value("ringfence_slo_firing", labels)

    def said(page: PrometheusMeters) -> list[float | None]:
        return [left(page, place), left(page, well)]

    assert await first.look()
    assert not await second.look()
    assert said(pages[0]) == pytest.approx([-9.0, 1.0])
    assert [fires(pages[0], place, rule) for rule in sorted(ALL)] == [1, 1, 1, 1]
    assert [fires(pages[0], well, rule) for rule in sorted(ALL)] == [0, 0, 0, 0]
    burn = {"environment": place[1], "slo": "success", "rule": "fast"}
    assert pages[0].registry.get_sample_value("ringfence_slo_burn", burn) == pytest.approx(10)
    assert said(pages[1]) == [None, None]
    # a look at few does not forget the others
    clock.forward(900)
    assert await first.look()
    assert said(pages[0]) == pytest.approx([-9.0, 1.0])
    # another looks, and what the first knew is not said beside it
    clock.forward(61)
    assert await second.look()
    assert not await first.look()
    assert said(pages[0]) == [None, None]
    assert said(pages[1]) == pytest.approx([-9.0, 1.0])
    assert fires(pages[1], place, "budget") == 1
    # and back: all of it at once
    clock.forward(61)
    assert await first.look()
    assert said(pages[0]) == pytest.approx([-9.0, 1.0])
    # a look that fails: what is not known is not said
    async with database.writing() as connection:
        await connection.execute(text("ALTER TABLE slo_counts RENAME TO away"))
    try:
        with pytest.raises((UnavailableError, DBAPIError)):
            await first.look()
        assert said(pages[0]) == [None, None]
    finally:
        async with database.writing() as connection:
            await connection.execute(text("ALTER TABLE away RENAME TO slo_counts"))
    assert await first.look()
    assert said(pages[0]) == pytest.approx([-9.0, 1.0])
    for page in pages:
        assert page.registry.get_sample_value("ringfence_telemetry_faults_total") == 0


async def test_a_slow_environment_is_told_of_by_its_own_promise(database: Database) -> None:
    clock = Clock()
    late = LatencySettings(share=0.9, seconds=600)
    modest = await an_environment(database, slo={"latency": {"share": 0.5, "seconds": 86_400}})
    strict = await an_environment(database)
    for place in (modest, strict):
        await ended(database, place, clock.at, good=14, late=6)
    watch = Watch(database, SloSettings(success=0.99, latency=late), clock=clock)
    await watch.look()
    async with database.reading() as connection:
        found = await slo.alerts(connection)
    # three times the budget of one, and 0.6 of the other's
    assert {(row.environment_id, row.sli) for row in found} == {(strict[1], "latency")}
    assert {row.rule for row in found} == {"ticket", "budget"}
    (spent,) = [row for row in found if row.rule == "budget"]
    assert spent.relief_at == slo.start_of(clock.at, slo.HOUR) + (30 * 24 + 1) * 3_600_000_000
    assert "0.9 of interactive runs end within 600 s in 30 days" in spent.told["description"]


async def test_few_runs_tell_nobody_and_what_is_gone_is_called_off(database: Database) -> None:
    clock = Clock()
    few, many = await an_environment(database), await an_environment(database)
    await ended(database, few, clock.at, bad=9)
    await ended(database, many, clock.at, bad=10)
    watch = Watch(database, SloSettings(success=0.9), clock=clock)
    await watch.look()
    async with database.reading() as connection:
        assert {row.environment_id for row in await slo.alerts(connection)} == {many[1]}
    async with database.writing() as connection:
        await environments.remove(connection, *many)
    clock.forward(20)
    await watch.look()
    assert await states(database) == dict.fromkeys(ALL, "quiet")


async def test_an_alertmanager_that_was_away_is_told_and_holds_up_no_other(
    database: Database, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    place = await an_environment(database)
    token = tmp_path / "token"
    token.write_text("s3cret\n")
    async with Alertmanager(clock) as well, Alertmanager(clock) as ill:
        ill.away = 2
        settings = promised(well, ill, runbook="https://runbooks.example.com/slo")
        managers = dict(settings.alertmanagers)
        managers["am0"] = managers["am0"].model_copy(update={"token_file": token})
        watch = Watch(
            database, settings.model_copy(update={"alertmanagers": managers}), clock=clock
        )
        await ended(database, place, clock.at, bad=20)
        for _ in range(3):
            await watch.look()
            clock.forward(15)
        assert (well.firing(), ill.firing(), ill.faults) == (ALL, ALL, [])
        # one is told once in a minute, the other until it has heard it
        assert (len(well.posts), len(ill.posts)) == (1, 3)
        assert [one.get("authorization") for one in well.posts] == ["Bearer s3cret"]
        assert ill.posts[0].get("authorization") is None
        (page, *_) = [one for one in well.alerts.values() if one["labels"]["rule"] == "fast"]
        assert page["labels"]["severity"] == "page"
        assert page["labels"]["environment"] == place[1]
        assert page["annotations"]["runbook_url"] == "https://runbooks.example.com/slo"
        token.write_text("s3cret\r\nx-other: 1")
        clock.forward(60)
        await watch.look()
        assert (len(well.posts), len(ill.posts)) == (1, 4), "what is no token is not sent"
    assert "s3cret" not in capsys.readouterr().out


async def test_an_alert_is_signed_as_every_webhook_is(database: Database) -> None:
    clock, seen = Clock(), []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")[1:-2]
        headers = dict(line.split(": ", 1) for line in head)
        body = await reader.readexactly(int(headers["content-length"]))
        seen.append((headers, body.decode()))
        writer.write(b"HTTP/1.1 204 x\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        there = Target(
            name="ops",
            url=f"http://127.0.0.1:{port}/",
            keys=(signing_key(SECRET),),
            kinds=("slo.alert_fired",),
            within=True,
        )
        courier = Courier(database, [there], clock=clock)
        await courier.look()
        place = await an_environment(database)
        await ended(database, place, clock.at, bad=20)
        await Watch(database, SloSettings(success=0.99), clock=clock).look()
        await courier.look()
        await courier.idle()
    client = Anthropic(api_key="k", webhook_key=SECRET)
    assert len(seen) == len(ALL)
    for headers, body in seen:
        client.beta.webhooks.unwrap(body, headers=headers)
        data = json.loads(body)["data"]
        assert (data["type"], data["id"], data["organization_id"]) == (
            "slo.alert_fired",
            place[1],
            place[0],
        )
        assert data["ringfence"]["rule"] in ALL
    with pytest.raises(Exception, match="signature"):
        client.beta.webhooks.unwrap(seen[0][1] + " ", headers=seen[0][0])


def test_what_the_settings_may_say() -> None:
    for wrong in (
        {"success": 1.0},
        {"success": 0.4},
        {"latency": {"share": 0.9, "seconds": 61}},
        {"window_days": 91},
        {"alertmanagers": {"am": {"url": "https://a.example.com/?x=1"}}},
    ):
        with pytest.raises(ValueError):
            SloSettings.model_validate(wrong)
    assert not SloSettings().on
    assert SloSettings(latency=LatencySettings(share=0.9, seconds=60)).on


async def test_an_alertmanager_within_is_the_operators_word(database: Database) -> None:
    clock = Clock()
    async with Alertmanager(clock) as server:
        plain = {"am": AlertmanagerSettings(url=server.url)}
        with pytest.raises(CallerError) as error:
            Watch(database, SloSettings(success=0.9, alertmanagers=plain), clock=clock)
        assert error.value.code == "settings-invalid"
        assert server.posts == []
