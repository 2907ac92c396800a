"""The settings, read once: environment (`RINGFENCE_…`) over the operator's file.

The file is `settings.toml` below `/etc/ringfence` (root) or `$XDG_CONFIG_HOME/ringfence` (anyone
else); one that others can write is refused, because it names where credentials go.
"""

from __future__ import annotations

import json
import os
import stat
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ringfence.config.plain import PLAIN
from ringfence.config.settings import Config
from ringfence.errors import CallerError

PREFIX = "RINGFENCE_"
_DELIMITER = "__"


def load_config(
    environment: Mapping[str, str] | None = None, *, settings_file: Path | None = None
) -> Config:
    """Read the settings once.

    Raises:
        CallerError: `settings-invalid`, with the setting's name and what to write instead.
    """
    environment = os.environ if environment is None else environment
    path = settings_file or default_settings_file(environment)
    values = _merge(_read_file(path), _from_environment(environment))
    values.setdefault("state_dir", default_state_dir(environment))
    providers = values.setdefault("providers", {})
    if isinstance(providers, dict):
        providers.setdefault("anthropic", {})
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if first["type"] == "extra_forbidden":
            raise CallerError(
                "settings-invalid",
                f"there is no setting {'.'.join(str(part) for part in first['loc'])}",
                hint=f"take it out of {path} or of the environment",
            ) from None
        name = PREFIX + _DELIMITER.join(str(part).upper() for part in first["loc"])
        raise CallerError(
            "settings-invalid",
            f"setting {'.'.join(str(part) for part in first['loc'])}: "
            + first["msg"].removeprefix("Value error, "),
            hint=f"set it in {path} or as {name}",
        ) from None


def default_state_dir(environment: Mapping[str, str]) -> Path:
    """`/var/lib/ringfence` for root, `$XDG_STATE_HOME/ringfence` for anyone else."""
    if os.geteuid() == 0:
        return Path("/var/lib/ringfence")
    home = environment.get("XDG_STATE_HOME")
    return (Path(home) if home else Path.home() / ".local" / "state") / "ringfence"


def default_settings_file(environment: Mapping[str, str]) -> Path:
    """`/etc/ringfence/settings.toml` for root, below `$XDG_CONFIG_HOME` for anyone else."""
    if os.geteuid() == 0:
        return Path("/etc/ringfence/settings.toml")
    home = environment.get("XDG_CONFIG_HOME")
    return (Path(home) if home else Path.home() / ".config") / "ringfence" / "settings.toml"


def _read_file(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_uid not in {0, os.geteuid()}:
                raise CallerError(
                    "settings-invalid",
                    f"{path} belongs to another user, and it names where credentials go",
                    hint=f"chown it to the user who runs ringfence: {path}",
                )
            if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise CallerError(
                    "settings-invalid",
                    f"{path} can be written by others, and it names where credentials go",
                    hint=f"chmod go-w {path}",
                )
            return tomllib.load(file)
    except FileNotFoundError:
        return {}
    # tomllib decodes before it parses
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CallerError("settings-invalid", f"{path} cannot be read: {error}") from None


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    """`RINGFENCE_A__B=v` is `{"a": {"b": "v"}}`; a value that starts with `{` or `[` is JSON."""
    values: dict[str, Any] = {}
    names = [name for name in environment if name.startswith(PREFIX) and name not in _NOT_SETTINGS]
    # the whole before its parts, whatever the order of the environment
    for name in sorted(names, key=lambda name: (name.count(_DELIMITER), name)):
        text = environment[name]
        keys = name[len(PREFIX) :].lower().split(_DELIMITER)
        node = values
        for key in keys[:-1]:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise CallerError("settings-invalid", f"{name} contradicts another setting")
        node[keys[-1]] = _scalar(name, text)
    return values


# Read elsewhere, by programs that have no configuration of their own.
_NOT_SETTINGS = frozenset({"RINGFENCE_LOG", "RINGFENCE_URL", "RINGFENCE_API_KEY", PLAIN})


def _scalar(name: str, text: str) -> Any:
    if text[:1] not in {"{", "["}:
        return text
    try:
        return json.loads(text)
    except ValueError as error:
        raise CallerError("settings-invalid", f"{name} is not JSON: {error}") from None


def _merge(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    merged = dict(low)
    for key, value in high.items():
        below = merged.get(key)
        if isinstance(value, dict) and isinstance(below, dict):
            merged[key] = _merge(below, value)
        else:
            merged[key] = value
    return merged
