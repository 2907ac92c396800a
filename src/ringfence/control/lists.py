"""Cursors: where a page ended, as text that a caller hands back. PURE.

A cursor is a position and no right: it is held to the caller's tenant like every query, so that a
forged one shows only what its forger could list anyway.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from typing import Any

from ringfence.errors import CallerError


@dataclass(frozen=True, kw_only=True, slots=True)
class Listed:
    """One page in the public shape. next_page: None at the end."""

    data: list[dict[str, Any]]
    next_page: str | None


def cursor(*position: int | str) -> str:
    """Text of a position."""
    raw = json.dumps(position, separators=(",", ":")).encode()
    return "page_" + base64.urlsafe_b64encode(raw).decode().rstrip("=")


def position(text: str, *kinds: type) -> list[Any]:
    """The position of a cursor, of values of these kinds.

    Raises:
        CallerError: `page-invalid`.
    """
    try:
        raw = text.removeprefix("page_").encode("ascii")
        found = json.loads(base64.b64decode(raw + b"=" * (-len(raw) % 4), b"-_", validate=True))
    except (ValueError, RecursionError):
        found = None
    if (
        not text.startswith("page_")
        or not isinstance(found, list)
        or [type(value) for value in found] != list(kinds)
        or any(isinstance(value, int) and not 0 <= value < 2**63 for value in found)
        or any(isinstance(value, str) and not value.isascii() for value in found)
        or any(isinstance(value, str) and "\x00" in value for value in found)
    ):
        raise CallerError(
            "page-invalid",
            "page: not a cursor of this list",
            hint="hand back `next_page` of the page before",
        )
    return found


def only(rows: list[Any], limit: int) -> tuple[list[Any], Any | None]:
    """The rows of a page, and its last one when there is another page."""
    return rows[:limit], rows[limit - 1] if len(rows) > limit else None
