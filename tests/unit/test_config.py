"""Settings: environment over file, refused when malformed or writable by others."""

from __future__ import annotations

from pathlib import Path

import pytest

from ringfence.config import Config, load_config
from ringfence.errors import CallerError


def test_defaults_name_the_public_api(tmp_path: Path) -> None:
    config = load_config({}, settings_file=tmp_path / "none.toml")
    assert config.providers["anthropic"].base_url == "https://api.anthropic.com"
    assert config.providers["anthropic"].credential == "anthropic"


def test_environment_wins_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(
        'state_dir = "/a"\n[providers.anthropic]\nbase_url = "https://one.example"\nheader = "authorization"\n'
    )
    file.chmod(0o600)
    config = load_config(
        {"RINGFENCE_PROVIDERS__ANTHROPIC__BASE_URL": "http://127.0.0.1:9/"}, settings_file=file
    )
    assert config.providers["anthropic"].base_url == "http://127.0.0.1:9"
    assert config.providers["anthropic"].header == "authorization"
    assert config.state_dir == Path("/a")


def test_a_second_provider_leaves_the_first(tmp_path: Path) -> None:
    config = load_config(
        {"RINGFENCE_PROVIDERS__LOCAL__BASE_URL": "http://127.0.0.1:9"},
        settings_file=tmp_path / "none.toml",
    )
    assert set(config.providers) == {"anthropic", "local"}


@pytest.mark.parametrize(
    "environment",
    [
        {"RINGFENCE_PROVIDER__ANTHROPIC__BASE_URL": "http://x.example"},  # a typo is not ignored
        {"RINGFENCE_PROVIDERS__ANTHROPIC__BASE_URL": "ftp://x.example"},
        {"RINGFENCE_PROVIDERS__ANTHROPIC__BASE_URL": "https://u:p@x.example"},
        {"RINGFENCE_UID_BASE": "0"},
        {"RINGFENCE_PROVIDERS": "{"},
    ],
)
def test_malformed_settings_are_refused_by_name(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    with pytest.raises(CallerError) as caught:
        load_config(environment, settings_file=tmp_path / "none.toml")
    assert caught.value.code == "settings-invalid"
    assert caught.value.status == 2


def test_a_file_that_others_can_write_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("uid_base = 3000000\n")
    file.chmod(0o622)
    with pytest.raises(CallerError, match="written by others"):
        load_config({}, settings_file=file)
    file.chmod(0o600)
    assert load_config({}, settings_file=file).uid_base == 3_000_000


def test_config_is_frozen(tmp_path: Path) -> None:
    config = load_config({}, settings_file=tmp_path / "none.toml")
    with pytest.raises(ValueError, match="frozen"):
        config.uid_base = 5  # type: ignore[misc]
    assert isinstance(config, Config)
