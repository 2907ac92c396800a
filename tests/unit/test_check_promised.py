"""What the checklist says of error budgets, rates and queues: what is set, and never more."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ringfence import wiring
from ringfence.check import promised
from ringfence.check.finding import Line, Outcome
from ringfence.config import Config, SloSettings, load_config
from ringfence.policy.compiled import ModelRules
from ringfence.store.database import now, open_sqlite
from slo_rig import an_environment, ended

SECRET = "whsec_" + "MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE="
WAITS = ModelRules(exhausted="queue")
Find = Callable[..., dict[str, Any]]


@pytest.fixture
def find(tmp_path: Path) -> Find:
    def found(
        installed: Callable[[str], bool] = lambda _: True,
        rules: ModelRules = WAITS,
        **settings: str,
    ) -> dict[str, Any]:
        values = {f"RINGFENCE_{name.upper()}": value for name, value in settings.items()}
        values["RINGFENCE_STATE_DIR"] = str(tmp_path)
        config = load_config(values, settings_file=tmp_path / "none.toml")
        return {
            one.check.id: (one.outcome, one.evidence)
            for one in promised.findings(config, rules, installed=installed)
        }

    return found


def test_what_is_not_set_is_not_available(find: Find) -> None:
    outcomes = {name: outcome for name, (outcome, _) in find().items()}
    assert outcomes == {
        "RATE-02": Outcome.NOT_AVAILABLE,
        "EBG-01": Outcome.NOT_AVAILABLE,
        "DEG-03": Outcome.PASS,
        "DEG-04": Outcome.NOT_AVAILABLE,
    }
    lines = {check.line for check in promised.checks()}
    assert lines == {Line.RATE, Line.ERROR_BUDGET, Line.DEGRADATION}


def test_a_budget_is_one_when_somebody_is_told(find: Find) -> None:
    outcome, why = find(slo__success="0.99")["EBG-01"]
    assert (outcome, "log alone" in why) == (Outcome.NOT_AVAILABLE, True)
    told = find(slo__success="0.99", slo__alertmanagers__am__url="https://am.example.com")
    assert told["EBG-01"] == (Outcome.PASS, "success 0.99 in 30 days; told: am")
    assert told["DEG-04"][0] is Outcome.PASS
    hook = {"webhooks__ops__url": "https://h.example.com/", "webhooks__ops__secret": SECRET}
    assert find(slo__success="0.99", **hook)["EBG-01"][0] is Outcome.PASS
    deaf = hook | {"webhooks__ops__kinds": '["session.requires_action"]'}
    assert find(slo__success="0.99", **deaf)["EBG-01"][0] is Outcome.NOT_AVAILABLE
    off = find(slo__success="0.99", slo__hold_back="false")
    assert off["DEG-04"][0] is Outcome.NOT_AVAILABLE


def test_a_promise_that_the_settings_break_fails(find: Find) -> None:
    late = {"slo__latency": '{"share": 0.9, "seconds": 120}'}
    told = late | {"slo__alertmanagers__am__url": "https://am.example.com"}
    assert find(**told)["EBG-01"][0] is Outcome.PASS
    limits = {"limits__rates__all": '{"requests": 10}'}
    outcome, why = find(**told, **limits)["EBG-01"]
    assert (outcome, "cannot be held" in why) == (Outcome.FAIL, True)
    assert find(**told, **limits, limits__hold_seconds="60")["EBG-01"][0] is Outcome.PASS


def test_rates_need_a_store_that_hosts_share(find: Find) -> None:
    limits = {"limits__rates__all": '{"requests": 10}'}
    assert find(**limits)["RATE-02"][0] is Outcome.PASS
    hosts = limits | {"database": "postgresql://u@h/d"}
    assert find(**hosts)["RATE-02"][0] is Outcome.FAIL
    assert find(**hosts, limits__store="redis://h/0")["RATE-02"][0] is Outcome.PASS


def test_a_queue_is_one_that_can_be_opened(find: Find) -> None:
    temporal = {"queue__engine": "temporal"}
    assert find(**temporal)["DEG-03"][0] is Outcome.PASS
    assert find(lambda name: name != "temporalio", **temporal)["DEG-03"][0] is Outcome.FAIL
    assert find(lambda name: name != "temporalio")["DEG-03"][0] is Outcome.PASS
    assert find(lambda name: name != "sqlalchemy")["DEG-03"][0] is Outcome.NOT_AVAILABLE
    ends = find(rules=ModelRules(exhausted="unavailable"))["DEG-03"]
    assert ends[0] is Outcome.NOT_AVAILABLE
    assert "exhausted is unavailable" in ends[1]
    assert promised.is_installed("json")
    assert not promised.is_installed("no_such_library")
    assert "json" in sys.modules


def test_how_environments_stand_is_read_and_nothing_is_made(tmp_path: Path) -> None:
    config = Config(state_dir=tmp_path / "state", slo=SloSettings(success=0.9))
    file = config.state_dir / "platform" / "platform.sqlite"

    def ask(config: Config = config) -> tuple[Outcome, str]:
        found = asyncio.run(promised.standing(config, lambda: wiring.platform(config)))
        return found.outcome, found.evidence

    assert ask()[0] is Outcome.NOT_AVAILABLE
    assert not file.exists()

    async def more(**kinds: int) -> str:
        database = open_sqlite(file)
        await database.migrate()
        place = await an_environment(database)
        await ended(database, place, now(), **kinds)
        await database.close()
        return place[1]

    asyncio.run(more(good=3))
    assert ask() == (Outcome.NOT_AVAILABLE, "no environment has had enough runs to say")
    asyncio.run(more(good=20))
    assert ask() == (Outcome.PASS, "1 environments within their budgets")
    bad = asyncio.run(more(good=10, bad=10))
    outcome, why = ask()
    assert (outcome, f"{bad} success (10 of 20)" in why) == (Outcome.FAIL, True)
    nothing = Config(state_dir=config.state_dir)
    assert ask(nothing)[0] is Outcome.NOT_AVAILABLE
    file.write_bytes(b"")
    outcome, why = ask()
    assert (outcome, why.startswith("nobody could look")) == (Outcome.NOT_AVAILABLE, True)
