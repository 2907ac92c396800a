"""The statements of statements.sql, by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from importlib import resources
from types import MappingProxyType


@cache
def statements() -> Mapping[str, str]:
    """Name to SQL, one statement each."""
    text = resources.files("ringfence.queue").joinpath("statements.sql").read_text()
    _, *parts = re.split(r"^-- name: (\w+)\n", text, flags=re.MULTILINE)
    return MappingProxyType(dict(zip(parts[::2], parts[1::2], strict=True)))
