"""Asking sources whether they give what the settings name, without being told a value."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ringfence.config.secrets import SecretSettings
from ringfence.egress.keeping import KeeperLink
from ringfence.errors import UnavailableError


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceState:
    """What came of one credential: a version and a lease, or the error's code, message and hint."""

    name: str
    source: str
    version: str = ""
    lease_seconds: float | None = None
    code: str = ""
    message: str = ""
    hint: str = ""

    @property
    def good(self) -> bool:
        """Whether there is a value."""
        return not self.code


async def look(
    settings: SecretSettings, state_dir: Path, logins: Mapping[str, Any] = MappingProxyType({})
) -> list[SourceState]:
    """Each credential's state, by name, and that of each login (`Configure.logins`). Its keeper
    tells no values: who asks is not egress.
    """
    placed = {name: one.source for name, one in settings.credentials.items()}
    placed |= {name: f"{one['kind']} login" for name, one in logins.items()}
    if not placed:
        return []
    link = await KeeperLink.start(
        settings.model_dump(mode="json"), str(state_dir), tells=False, logins=logins
    )
    try:
        each = (_state(link, name, placed[name]) for name in sorted(placed))
        return list(await asyncio.gather(*each))
    finally:
        await link.close()


async def _state(link: KeeperLink, name: str, source: str) -> SourceState:
    found: dict[str, Any]
    try:
        given = await link.ask(name)
    except UnavailableError as error:
        found = {"code": error.code, "message": error.message, "hint": error.hint}
    else:
        found = {"version": given.version, "lease_seconds": given.lease_seconds}
    return SourceState(name=name, source=source, **found)
