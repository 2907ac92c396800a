"""What a shell's Tab offers as values: names and ids that this host knows.

Looking changes nothing: no directory is made, no gateway and no database of another host is asked.
Only what has the form of a name is offered, because a shell puts it into a command line.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import typer

from ringfence.policy.isolation import TECHNOLOGIES
from ringfence.policy.load import PRESETS

if TYPE_CHECKING:
    from ringfence.cli.context import AppContext

_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]*\Z")
_MOST = 50
"""Ids at most, the latest first: a shell asks before it shows more."""

_Look = Callable[["AppContext"], Iterable[str]]


def values(look: _Look) -> Callable[[typer.Context, str], list[str]]:
    """Typer's `autocompletion` from something that looks into the state directory.

    Whatever fails offers nothing: what it would print stands in the middle of the user's line.
    """

    def complete(ctx: typer.Context, incomplete: str) -> list[str]:
        try:
            found = list(look(ctx.obj))
        except Exception:  # noqa: BLE001  see above
            return []
        return [one for one in found if one.startswith(incomplete) and _PLAIN.match(one)]

    return complete


def _runs(context: AppContext) -> list[str]:
    found = (context.state_dir / "runs").glob("run_*")
    return sorted((place.name for place in found), reverse=True)[:_MOST]  # ids sort by time


def _changed(context: AppContext) -> list[str]:
    """Runs that left something to show or apply."""
    found = (context.state_dir / "runs").glob("run_*/changes.bin")
    return sorted((file.parent.name for file in found), reverse=True)[:_MOST]


def _sessions(context: AppContext) -> list[str]:
    """Of this host alone: a Tab waits for no server, and for no writer of the file."""
    from ringfence.record.sessions import latest_ids

    here = context.state_dir / "sessions.sqlite"
    return latest_ids(here, _MOST) if context.config.session_store is None else []


def _credentials(context: AppContext) -> list[str]:
    from ringfence.vault.keys import VaultPaths
    from ringfence.vault.store import VaultFile

    return sorted(VaultFile(VaultPaths(context.state_dir).store).entries())


def _wanted(context: AppContext) -> list[str]:
    """What is sealed, to be set anew, and what the settings' providers ask for."""
    asked = {one.credential for one in context.config.providers.values() if one.credential}
    return sorted(asked | set(_credentials(context)))


def _images(context: AppContext) -> list[str]:
    from ringfence.images.store import ImageStore

    return list(ImageStore(context.state_dir).names())


def _checks(_context: AppContext) -> list[str]:
    from ringfence.check.catalogue import catalogue

    return [check.id for check in catalogue()]


presets = values(lambda _: PRESETS)
check_isolations = values(lambda _: ("auto", "all", *TECHNOLOGIES))
runs = values(_runs)
changed_runs = values(_changed)
sessions = values(_sessions)
credentials = values(_credentials)
wanted_credentials = values(_wanted)
images = values(_images)
checks = values(_checks)
