"""The operator's commands beside `ringfence up --services` see what it has started."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ringfence.cli.context import AppContext
from ringfence.cli.operator import beside
from ringfence.config import Config, load_config
from ringfence.errors import UnavailableError
from ringfence.fleet.beside import NAMES, found, left

SETTINGS = {
    "RINGFENCE_DATABASE": "postgresql://postgres@/postgres?host=/tmp/x",
    "RINGFENCE_QUEUE__ENGINE": "temporal",
    "RINGFENCE_QUEUE__ADDRESS": "127.0.0.1:7233",
}
HOLDER = """
import sys, time
from pathlib import Path
from ringfence.fleet.beside import left
with left(Path(sys.argv[1]), {"RINGFENCE_DATABASE": "postgresql://a/b"}):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def state(tmp_path: Path) -> Path:
    (tmp_path / "services").mkdir()
    return tmp_path


def test_what_a_fleet_started_is_found_while_it_lives(state: Path) -> None:
    assert found(state) == {}
    with left(state, SETTINGS):
        assert found(state) == SETTINGS
        assert found(state) == SETTINGS, "a look takes nothing away"
        (file,) = (state / "services").iterdir()
        assert file.stat().st_mode & 0o777 == 0o600
    assert found(state) == {}
    assert not list((state / "services").iterdir())


def test_a_fleet_without_services_leaves_nothing(tmp_path: Path) -> None:
    with left(tmp_path, {}):
        assert found(tmp_path) == {}
    assert not list(tmp_path.iterdir())


def test_what_a_killed_fleet_left_is_not_believed_and_is_no_hindrance(state: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(state)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdin is not None
    assert holder.stdout.readline() == "held\n"
    assert found(state) == {"RINGFENCE_DATABASE": "postgresql://a/b"}
    holder.kill()
    holder.wait()
    holder.stdin.close()
    holder.stdout.close()
    assert list((state / "services").iterdir()), "it could not take its file away"
    assert found(state) == {}
    with left(state, SETTINGS):
        assert found(state) == SETTINGS


def test_a_second_fleet_is_refused_and_takes_nothing_from_the_first(state: Path) -> None:
    with left(state, SETTINGS):
        with pytest.raises(UnavailableError) as refused, left(state, {NAMES[0]: "postgresql://b"}):
            raise AssertionError("two fleets on the files of one")
        assert refused.value.code == "host-failed"
        assert found(state) == SETTINGS
        assert [file.name for file in (state / "services").iterdir()] == ["settings.json"]
    with left(state, {NAMES[0]: "postgresql://b"}):
        assert found(state) == {NAMES[0]: "postgresql://b"}


def test_no_other_setting_is_taken_from_the_file(state: Path) -> None:
    with left(state, {**SETTINGS, "RINGFENCE_CLAUDE": "/tmp/x", "LD_PRELOAD": "/tmp/x"}):
        assert found(state) == SETTINGS


def context(state_dir: Path, **more: str) -> AppContext:
    """Its makers say what they are made for."""
    made: dict[str, Any] = {
        "platform_of": lambda config: config,
        "queue_of": lambda config, drain: (config, drain),
    }
    config = load_config({"RINGFENCE_STATE_DIR": str(state_dir), **more})
    return AppContext(config=config, launcher=lambda: None, run=lambda _: None, **made)  # type: ignore[arg-type,return-value]


def url(config: Config) -> str | None:
    return config.database and config.database.get_secret_value()


def test_commands_take_them_where_the_settings_name_none(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RINGFENCE_STATE_DIR", str(state))
    own = context(state)
    assert beside(own) is own, "no fleet, nothing changed"
    with left(state, SETTINGS):
        seen = beside(own)
        assert url(seen.config) == SETTINGS["RINGFENCE_DATABASE"]
        assert seen.config.queue.address == "127.0.0.1:7233"
        assert seen.platform is not None
        assert seen.queue is not None
        made: Any = (seen.platform(), seen.queue(1.5))
        assert made == (seen.config, (seen.config, 1.5))


def test_what_the_settings_name_goes_before(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = {
        "RINGFENCE_DATABASE": "postgresql://mine/x",
        "RINGFENCE_QUEUE__ENGINE": "temporal",
        "RINGFENCE_QUEUE__ADDRESS": "127.0.0.1:1",
    }
    for name, value in {**own, "RINGFENCE_STATE_DIR": str(state)}.items():
        monkeypatch.setenv(name, value)
    with left(state, SETTINGS):
        both = context(state, **own)
        assert beside(both) is both
        monkeypatch.delenv("RINGFENCE_QUEUE__ENGINE")
        monkeypatch.delenv("RINGFENCE_QUEUE__ADDRESS")
        half = beside(context(state, RINGFENCE_DATABASE=own["RINGFENCE_DATABASE"]))
        assert url(half.config) == own["RINGFENCE_DATABASE"]
        assert half.config.queue.address == "127.0.0.1:7233"
