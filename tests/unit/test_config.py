"""Settings: environment over file, refused when malformed or writable by others."""

from __future__ import annotations

import os
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
        {"RINGFENCE_PROVIDERS__ANTHROPIC__BASE_URL": "https://x.example:99999"},
        {"RINGFENCE_PROVIDERS__ANTHROPIC__BASE_URL": "https://x.example:0"},
        {"RINGFENCE_PROVIDERS__ANTHROPIC__BASE_URL": "https://x.exa\nmple"},
        {"RINGFENCE_PROVIDERS__ANTHROPIC__BASE_URL": "http://[::1"},
        {"RINGFENCE_EGRESS__RESOLVE": '{"a.example.com": ["a.example.org"]}'},
        {"RINGFENCE_EGRESS__CONNECT": '{"a.example.com": "127.0.0.1:1"}'},
        {"RINGFENCE_EGRESS__CA_FILE": "/nonexistent/ca.pem"},
        {"RINGFENCE_CLAUDE": "/nonexistent/claude"},
        # a part and a whole that contradict, in either order
        {"RINGFENCE_EGRESS": "x", "RINGFENCE_EGRESS__RESOLVE": "{}"},
        {"RINGFENCE_EGRESS__RESOLVE": "{}", "RINGFENCE_EGRESS": "x"},
    ],
)
def test_malformed_settings_are_refused_by_name(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    with pytest.raises(CallerError) as caught:
        load_config(environment, settings_file=tmp_path / "none.toml")
    assert caught.value.code == "settings-invalid"
    assert caught.value.status == 2
    assert "Value error" not in caught.value.message


def test_a_whole_and_its_parts_are_one_setting(tmp_path: Path) -> None:
    parts = {
        "RINGFENCE_PROVIDERS__LOCAL__BASE_URL": "http://127.0.0.1:9",
        "RINGFENCE_PROVIDERS": '{"local": {"base_url": "http://127.0.0.1:8", "credential": null}}',
    }
    for environment in (parts, dict(reversed(parts.items()))):
        local = load_config(environment, settings_file=tmp_path / "none.toml").providers["local"]
        assert (local.base_url, local.credential) == ("http://127.0.0.1:9", None)


def test_paths_are_absolute_wherever_a_process_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ca.pem").touch()
    environment = {"RINGFENCE_STATE_DIR": "state", "RINGFENCE_EGRESS__CA_FILE": "ca.pem"}
    config = load_config(environment, settings_file=tmp_path / "none.toml")
    assert config.state_dir == tmp_path / "state"
    assert config.egress.ca_file == tmp_path / "ca.pem"


def test_a_file_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("uid_base = 3000000\n")
    file.chmod(0o600)
    owner = file.stat().st_uid
    if os.geteuid() == 0:
        os.chown(file, 12345, 12345)
    else:
        monkeypatch.setattr("os.geteuid", lambda: owner + 1)
    with pytest.raises(CallerError, match="belongs to another user"):
        load_config({}, settings_file=file)


@pytest.mark.parametrize("content", [b"\xff", b"[", b"state_dir = 1"])
def test_a_damaged_file_is_one_error(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "settings.toml"
    file.write_bytes(content)
    file.chmod(0o600)
    with pytest.raises(CallerError) as caught:
        load_config({}, settings_file=file)
    assert caught.value.code == "settings-invalid"


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


def test_places_that_outlive_the_host_and_hold_secrets(tmp_path: Path) -> None:
    environment = {
        "RINGFENCE_SESSION_STORE": "redis://:hunter2@host/0",
        "RINGFENCE_BLOB_STORE": "s3://bucket/prefix",
        "RINGFENCE_S3__ENDPOINT": "http://127.0.0.1:9000/",
        "RINGFENCE_S3__ACCESS_KEY_ID": "key",
        "RINGFENCE_S3__SECRET_ACCESS_KEY": "hunter2",
    }
    config = load_config(environment, settings_file=tmp_path / "none.toml")
    assert config.s3.endpoint == "http://127.0.0.1:9000"
    assert "hunter2" not in f"{config!r}{config}{config.model_dump_json()}"
    for name, value in (
        ("SESSION_STORE", "mysql://:hunter2@host/0"),
        ("SESSION_STORE", "/somewhere"),
        ("BLOB_STORE", "relative/directory"),
        ("BLOB_STORE", "https://bucket"),
        ("S3__ENDPOINT", "host:9000"),
        ("SNAPSHOTS__MAX_MB", "0"),
    ):
        with pytest.raises(CallerError) as caught:
            load_config(
                {**environment, f"RINGFENCE_{name}": value}, settings_file=tmp_path / "none.toml"
            )
        assert caught.value.code == "settings-invalid"
        assert f"RINGFENCE_{name}" in caught.value.hint
        assert "hunter2" not in caught.value.render()


def test_a_file_that_is_not_there_is_named_and_a_secret_in_its_place_is_not(tmp_path: Path) -> None:
    url = {"RINGFENCE_WEBHOOKS__OPS__URL": "https://hooks.example.com/x"}
    file, name = tmp_path / "webhook.secret", "RINGFENCE_WEBHOOKS__OPS__SECRET_FILE"
    with pytest.raises(CallerError, match=f"{file} cannot be read") as caught:
        load_config({**url, name: str(file)})
    assert name in caught.value.hint
    with pytest.raises(CallerError) as caught:
        load_config({**url, name: "whsec_bm90LWEtZmlsZQ"})
    assert "whsec" not in caught.value.render()
    file.write_text("whsec_" + "QUJD" * 11)
    file.chmod(0o600)
    assert load_config({**url, name: str(file)}).webhooks["ops"].secret_file == file
