"""`ringfence queue` on a real file, and what names us to a Temporal server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from ringfence.cli.context import AppContext
from ringfence.cli.main import app
from ringfence.config import Config, QueueEngine, load_config
from ringfence.errors import CallerError
from ringfence.model import RunStatus
from ringfence.queue.embedded import EmbeddedQueue
from ringfence.queue.protocol import Lease, QueueSettings
from ringfence.wiring import platform, queue

Run = Callable[..., Result]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(state_dir=tmp_path / "state")


@pytest.fixture
def run(config: Config) -> Run:
    def invoke(*arguments: str) -> Result:
        context = AppContext(
            config=config, launcher=None, run=None, queue=lambda drain: queue(config, drain)
        )  # type: ignore[arg-type]
        return CliRunner().invoke(app, ["queue", *arguments], obj=context)

    return invoke


async def worked(config: Config, *runs: str) -> None:
    """A worker that has no luck with runs whose id says so."""
    settings = QueueSettings(max_attempts=1)
    found = EmbeddedQueue(config.state_dir / "queue" / "queue.sqlite", settings)
    left = set(runs)
    stop = asyncio.Event()

    async def handler(lease: Lease) -> RunStatus:
        left.discard(lease.run_id)
        if not left:
            stop.set()
        if lease.run_id.startswith("bad"):
            raise RuntimeError("a\x1b[31mred\nline")
        return RunStatus.SUCCEEDED

    for one in runs:
        await found.submit(one, tenant="acme")
    await found.run_worker(handler, slots=2, stop=stop)
    await found.close()


def test_what_died_is_listed_replayed_and_cancelled(config: Config, run: Run) -> None:
    asyncio.run(worked(config, "bad-1", "bad-2", "good"))
    stats = json.loads(run("stats", "--json").stdout)
    assert (stats["depth"], stats["dead"], stats["workers"]) == (0, 2, 0)
    assert "dead            2" in run("stats").stdout
    letters = json.loads(run("dead", "--json").stdout)
    assert [one["run_id"] for one in letters] == ["bad-1", "bad-2"]
    assert [one["tenant"] for one in letters] == ["acme", "acme"]
    assert json.loads(run("dead", "--after", "bad-1", "--json").stdout) == letters[1:]
    assert json.loads(run("dead", "--limit", "1", "--json").stdout) == letters[:1]
    # a handler's words paint nothing
    shown = run("dead").stdout
    assert "\x1b" not in shown
    assert len(shown.splitlines()) == 2
    assert json.loads(run("replay", "bad-1", "--json").stdout)["replayed"] is True
    again = run("replay", "bad-1", "--json")
    assert again.exit_code == 2
    assert json.loads(again.stdout)["error"]["code"] == "run-unknown"
    assert json.loads(run("stats", "--json").stdout)["depth"] == 1
    assert json.loads(run("cancel", "bad-1", "--json").stdout)["cancelled"] is True
    assert json.loads(run("cancel", "bad-1", "--json").stdout)["cancelled"] is False
    assert run("cancel", "never").exit_code == 2
    assert json.loads(run("stats", "--json").stdout)["depth"] == 0


def test_a_tenant_s_limit_is_set_listed_and_taken_away(config: Config, run: Run) -> None:
    assert json.loads(run("limits", "--json").stdout) == []
    told = run("limit", "--tenant", "acme", "--runs", "4", "--json")
    assert json.loads(told.stdout) == {"tenant": "acme", "runs": 4}
    limits = json.loads(run("limits", "--json").stdout)
    assert limits == [{"tenant": "acme", "runs": 4, "held": 0}]
    assert run("limits").stdout.split() == ["acme", "0", "of", "4"]
    assert "acme may have 0 runs" in run("limit", "--tenant", "acme", "--runs", "0").stderr
    for wrong in ((), ("--runs", "1", "--none"), ("--runs", "-1")):
        assert run("limit", "--tenant", "acme", *wrong).exit_code == 2
    assert run("limit", "--tenant", "a b", "--runs", "1").exit_code == 2
    assert [one["runs"] for one in json.loads(run("limits", "--json").stdout)] == [0]
    assert run("limit", "--tenant", "acme", "--none").exit_code == 0
    assert json.loads(run("limits", "--json").stdout) == []


def test_a_tenant_s_limit_is_that_of_its_id(config: Config) -> None:
    def run(*arguments: str) -> Result:
        context = AppContext(
            config=config,
            launcher=None,
            run=None,
            queue=lambda drain: queue(config, drain),
            platform=lambda: platform(config),
        )  # type: ignore[arg-type]
        return CliRunner().invoke(app, [*arguments, "--json"], obj=context)

    assert run("keys", "create", "--tenant", "acme").exit_code == 0
    nobody = run("queue", "limit", "--tenant", "amce", "--runs", "1")
    assert nobody.exit_code == 2
    assert json.loads(nobody.stdout)["error"]["code"] == "usage"
    found = json.loads(run("queue", "limit", "--tenant", "acme", "--runs", "1").stdout)["tenant"]
    assert found.startswith("wrkspc_")
    again = run("queue", "limit", "--tenant", found, "--runs", "2")
    assert json.loads(again.stdout) == {"tenant": found, "runs": 2}
    limits = json.loads(run("queue", "limits").stdout)
    assert limits == [{"tenant": found, "runs": 2, "held": 0}]


def engine(tmp_path: Path, **settings: str) -> QueueEngine:
    environment = {f"RINGFENCE_QUEUE__{name.upper()}": v for name, v in settings.items()}
    environment["RINGFENCE_STATE_DIR"] = str(tmp_path)
    return load_config(environment, settings_file=tmp_path / "none.toml").queue


def test_a_cluster_is_reached_in_the_clear_only_when_nothing_is_secret(tmp_path: Path) -> None:
    pem = tmp_path / "a.pem"
    pem.write_text("x")
    assert not engine(tmp_path, engine="temporal", address="t.example.com:7233").encrypted
    for secret in (
        {"api_key": "hunter2"},
        {"tls": "true"},
        {"ca_file": str(pem)},
        {"server_name": "t"},
        {"certificate_file": str(pem), "key_file": str(pem)},
    ):
        found = engine(tmp_path, engine="temporal", **secret)
        assert found.encrypted
        assert "hunter2" not in repr(found)


@pytest.mark.parametrize(
    "settings",
    [
        {"engine": "celery"},
        {"address": "t.example.com"},
        {"address": "https://t.example.com:7233"},
        {"ca_file": "/nowhere/ca.pem"},
        {"certificate_file": "{pem}"},
        {"key_file": "{pem}"},
        {"user": "x"},
    ],
)
def test_settings_that_are_not_whole_are_refused(tmp_path: Path, settings: dict[str, str]) -> None:
    pem = tmp_path / "a.pem"
    pem.write_text("x")
    filled = {name: value.format(pem=pem) for name, value in settings.items()}
    with pytest.raises(CallerError) as caught:
        engine(tmp_path, **filled)
    assert caught.value.code == "settings-invalid"
