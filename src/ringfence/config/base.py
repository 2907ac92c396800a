"""What the groups of settings have in common."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict


class Frozen(BaseModel):
    """Read once, and no key that is not known."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def https(value: str, otherwise: str) -> str:
    """A URL that nobody on the way can change what comes from or goes to."""
    parts = urlsplit(value)
    local = parts.hostname in {"127.0.0.1", "::1", "localhost"}
    if not parts.hostname or parts.username or parts.password or not value.isprintable():
        raise ValueError("write it as https://host/path")
    if parts.port == 0:  # reading it refuses what is no port at all
        raise ValueError("a port is a number from 1 to 65535")
    if parts.scheme != "https" and not (parts.scheme == "http" and local):
        raise ValueError(otherwise)
    return value


def existing(path: Path | None) -> Path | None:
    """A file that is there, by its absolute path: the working directory may change."""
    if path is not None and not os.path.isfile(path):  # noqa: PTH113  pathlib's raises
        # a value that was set in place of its file's name is shown to nobody
        shown = str(path) if path.is_absolute() else "a file of this name"
        raise ValueError(f"{shown} cannot be read, or is no file: write its absolute path")
    return path and path.absolute()
