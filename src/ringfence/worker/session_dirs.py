"""The working directory of each session, kept on this host below the state directory.

A sandbox never sees another: each gets its own session's directory mounted, and the attempt refuses
every other directory of the state directory. What an agent left in one is hostile: it is never
walked by name, and no program of the host is started in it.
"""

from __future__ import annotations

import asyncio
import re
import shutil
from pathlib import Path

from ringfence.errors import CallerError, UnavailableError, words
from ringfence.sandbox.apply import apply_changes
from ringfence.sandbox.applying import recover_all
from ringfence.sandbox.opening import WORKSPACES
from ringfence.sandbox.saved import load_changes

_SESSION = re.compile(r"[A-Za-z0-9_-]{1,110}", re.ASCII)


class SessionDirectories:
    """Below one state directory."""

    def __init__(self, state_dir: Path) -> None:
        self._state_dir = state_dir
        self._root = state_dir / WORKSPACES

    async def open(self, session_id: str) -> Path:
        """The session's directory, made empty when there is none.

        Raises:
            UnavailableError: `host-failed`.
        """
        if not _SESSION.fullmatch(session_id):
            raise CallerError("session-unknown", f"{session_id[:64]!r} is not a session's name")
        path = self._root / session_id
        try:
            await asyncio.to_thread(_made, path)
        except OSError as error:
            raise UnavailableError(
                "host-failed", f"the workspace cannot be made: {words(error)}"
            ) from None
        return path

    async def keep(self, run_id: str) -> None:
        """Write what a run in review mode changed into its session's directory, all of it: the
        files that run later on a person's machine run here in a sandbox alone.

        Raises:
            CallerError: `patch-conflict`.
        """
        await asyncio.to_thread(self._keep, run_id)

    def _keep(self, run_id: str) -> None:
        runs = self._state_dir / "runs"
        file = runs / run_id / "changes.bin"
        if not file.exists():
            return
        recover_all(runs)
        changes, workspace = load_changes(file)
        if Path(workspace).parent != self._root:
            raise CallerError("workspace-refused", f"{workspace} is no session's directory")
        apply_changes(
            Path(workspace), changes, include=lambda _: True, journal=file.with_name("applying")
        )

    def names(self) -> list[str]:
        """Sessions that have a directory here."""
        return [path.name for path in self._root.iterdir()] if self._root.is_dir() else []

    async def remove(self, session_id: str) -> None:
        """Forget a session's files. Links are not followed."""
        if _SESSION.fullmatch(session_id):
            path = self._root / session_id
            await asyncio.to_thread(shutil.rmtree, path, ignore_errors=True)


def _made(path: Path) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.mkdir(mode=0o700, exist_ok=True)
