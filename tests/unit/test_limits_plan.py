"""Which lane and budgets a request counts for, what people see, and the simulator's own count."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from typer.testing import CliRunner, Result

from ringfence.cli.context import AppContext
from ringfence.cli.main import app
from ringfence.config import Config, LimitSettings
from ringfence.errors import CallerError
from ringfence.limits.budget import Charge, Hold, Money
from ringfence.limits.lane import Amount, Caps, Lane, Seen, Want
from ringfence.limits.plan import Date, budgets_of, lane_of, lanes, share_of
from ringfence.limits.sqlite import SqliteLimits
from ringfence.limits.store import LimitStore, MemoryLimits
from ringfence.simulator.meter import Meter
from ringfence.simulator.script import Limits
from ringfence.wiring import limits

SETTINGS = LimitSettings.model_validate(
    {
        "rates": {
            "all": {"requests": 50},
            "opus": {"models": ["claude-opus-"], "input_tokens": 1000, "tenant_requests": 5},
            "newest": {"models": ["claude-opus-5"], "requests": 9},
            "elsewhere": {"provider": "other", "models": ["claude-sonnet-"]},
        },
        "budgets": {
            "each": {"usd": 5},
            "together": {"tenant": None, "period": "month", "tokens": 1000},
            "acme": {"tenant": "acme", "usd": 1},
        },
    }
)
TODAY = Date(2026, 3, 7)
T = 1000.0


@pytest.mark.parametrize(
    ("provider", "model", "name"),
    [
        ("anthropic", "claude-opus-4-8", "opus"),
        ("anthropic", "claude-opus-5", "newest"),
        ("anthropic", "claude-sonnet-5", "all"),
        ("other", "claude-sonnet-5", "elsewhere"),
        ("other", "claude-opus-5", ".opus"),
        ("other", "anything at all", ".other"),
    ],
)
def test_the_longest_name_decides(provider: str, model: str, name: str) -> None:
    spec, _ = lane_of(SETTINGS, provider, model)
    assert spec.name == f"default/{provider}/{name}"


def test_a_rate_has_limits_of_its_tenants() -> None:
    spec, own = lane_of(SETTINGS, "anthropic", "claude-opus-4-8")
    assert (spec.caps, own) == (Caps(None, 1000, None), Caps(5, None, None))
    assert lane_of(SETTINGS, "other", "x")[1] == Caps()
    assert len(list(lanes(SETTINGS))) == 4
    names = {spec.name for spec in lanes(SETTINGS, ["other"])}
    assert lane_of(SETTINGS, "other", "claude-opus-5")[0].name in names


def test_a_share_is_of_the_limit_that_is_taken_most_of() -> None:
    spec, _ = lane_of(SETTINGS, "anthropic", "claude-opus-4-8")
    assert share_of(spec, Amount(1, 100, 5)) == pytest.approx(0.1)
    free, _ = lane_of(SETTINGS, "other", "x")
    assert share_of(free, Amount(1, 100, 5)) == 1


def test_budgets_have_their_period_and_their_owner() -> None:
    keys = {due.charge.key for due in budgets_of(SETTINGS, "acme", TODAY)}
    assert keys == {"each/acme/2026-03-07", "together/*/2026-03", "acme/acme/2026-03-07"}
    assert {due.name for due in budgets_of(SETTINGS, "b", TODAY)} == {"each", "together"}


@pytest.mark.parametrize(
    "value",
    [
        {"store": "http://host"},
        {"rates": {"No": {}}},
        {"rates": {"a": {"requests": 0}}},
        {"budgets": {"a": {}}},
        {"hold_seconds": 300},
        {"batch_share": 1},
        {"weights": {"a": 0}},
    ],
)
def test_settings_that_limit_nothing_sensible(value: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        LimitSettings.model_validate(value)


def test_nothing_is_limited_until_something_is_set(tmp_path: Path) -> None:
    assert limits(Config(state_dir=tmp_path)) is None
    store = limits(Config(state_dir=tmp_path, limits=SETTINGS))
    assert isinstance(store, SqliteLimits)
    asyncio.run(store.close())


@pytest.mark.parametrize("store", [None, "postgresql://u:p@h/limits", "rediss://h/0"])
def test_hosts_of_one_database_share_their_limits(tmp_path: Path, store: str | None) -> None:
    given = {"limits": {"rates": {"all": {}}, "store": store}, "state_dir": tmp_path}
    config = Config.model_validate({**given, "database": "postgresql://u:p@h/d"})
    if store is None:
        with pytest.raises(CallerError) as caught:
            limits(config)
        assert caught.value.code == "settings-invalid"
        assert "limits.store" in caught.value.hint
        config = Config.model_validate(given)  # on one host its file is what all share
    found = limits(config)
    assert found is not None
    asyncio.run(found.close())
    unlimited = Config.model_validate({"state_dir": tmp_path, "database": "postgresql://u:p@h/d"})
    assert limits(unlimited) is None


@pytest.fixture
def config(tmp_path: Path) -> Config:
    given = {"rates": {"all": {"requests": 60}}, "budgets": {"daily": {"usd": 2}}}
    return Config(state_dir=tmp_path / "state", limits=LimitSettings.model_validate(given))


class Still(MemoryLimits):
    """A store in which no time passes."""

    async def look(self, name: str) -> tuple[Lane, float]:
        return (await super().look(name))[0], T


@pytest.fixture
def store() -> Still:
    return Still()


@pytest.fixture
def run(config: Config, store: Still) -> Callable[..., Result]:
    def invoke(*arguments: str, settings: Config = config) -> Result:
        made = store if settings.limits.on else None
        context = AppContext(config=settings, launcher=None, run=None, limits=lambda: made)  # type: ignore[arg-type]
        return CliRunner().invoke(app, ["limits", *arguments], obj=context)

    return invoke


async def _busy(store: LimitStore, config: Config) -> None:
    (spec,) = lanes(config.limits)

    def want(number: int) -> Want:
        return Want(id=f"s/{number}", tenant="acme", amount=Amount(1), share=1, batch=number > 2)

    await store.take(spec, [want(number) for number in range(4)], T)
    await store.leave(spec, ["s/3"], park=60.0, now=T)
    await store.correct(spec, Seen(blocked=9.0), T)
    learned, _ = lane_of(config.limits, "other", "claude-opus-5")
    await store.correct(learned, Seen(caps=Caps(requests=7)), T)
    charge = Charge("daily/acme/2026-03-07", 2.0)
    await store.hold(Hold(id="h", charges=(charge,), worst=Money(1.5, 10), likely=Money(1, 1)), T)


def test_the_status_shows_buckets_places_and_budgets(
    config: Config, run: Callable[..., Result], store: Still
) -> None:
    asyncio.run(_busy(store, config))
    found = json.loads(run("status", "--json").stdout)
    (lane,) = found["lanes"]
    assert lane["name"] == "default/anthropic/all"
    (bucket,) = lane["buckets"]
    assert (bucket["metric"], bucket["limit"]) == ("requests", 60)
    assert (bucket["level"], bucket["capacity"]) == (pytest.approx(0.4), pytest.approx(2.4))
    (waiting,) = lane["waiting"]
    assert (waiting["position"], waiting["id"], waiting["tenant"]) == (1, "s/2", "acme")
    assert waiting["expected_seconds"] == 9.0
    assert lane["parked"] == 1
    (budget,) = found["budgets"]
    assert budget["budget"] == "daily/acme/2026-03-07"
    assert budget["held"] == {"usd": 1.5, "tokens": 10}
    text = run("status").stdout
    assert "1 wait, 1 released, closed for 9.0 s" in text
    assert "acme interactive" in text


def test_lanes_that_nobody_named_are_shown_when_they_are_used(
    config: Config, run: Callable[..., Result], store: Still
) -> None:
    asyncio.run(_busy(store, config))
    more = {"limits": config.limits, "providers": {"other": {}}}
    settings = Config.model_validate({"state_dir": config.state_dir, **more})
    found = json.loads(run("status", "--json", settings=settings).stdout)
    names = [lane["name"] for lane in found["lanes"]]
    assert names == ["default/anthropic/all", "default/other/.opus"]


def test_a_status_without_limits_says_what_to_set(
    tmp_path: Path, run: Callable[..., Result]
) -> None:
    result = run("status", settings=Config(state_dir=tmp_path))
    assert result.exit_code == 2
    assert "limits.rates" in result.stderr


@given(
    asks=st.lists(st.tuples(st.floats(0, 5), st.integers(1, 80), st.integers(1, 40)), max_size=40)
)
def test_the_simulator_grants_what_its_limit_says(asks: list[tuple[float, int, int]]) -> None:
    meter, now = Meter(Limits(requests=5, input_tokens=100, window_seconds=10), 0.0), 0.0
    taken: list[tuple[float, int]] = []
    refused = 0
    for seconds, into, out in asks:
        now += seconds
        wait = meter.take({"input_tokens": into, "output_tokens": out}, now)
        refused += wait > 0
        if wait == 0:
            taken.append((now, into))
        since = now - 10
        assert sum(at > since for at, _ in taken) <= 10
        assert sum(size for at, size in taken if at > since) <= 200 + 80
    assert meter.refused == refused
    said = meter.headers(now)
    assert 0 <= int(said["anthropic-ratelimit-requests-remaining"]) <= 5


def test_the_simulator_says_when_it_passes() -> None:
    meter = Meter(Limits(requests=2, window_seconds=10), 0.0)
    usage = {"input_tokens": 1, "output_tokens": 1}
    assert [meter.take(usage, 0.0) for _ in range(2)] == [0.0, 0.0]
    wait = meter.take(usage, 0.0)
    assert wait == pytest.approx(5.0)
    assert meter.take(usage, wait - 0.01) > 0
    assert meter.take(usage, wait + 0.001) == 0.0
