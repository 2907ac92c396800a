"""The working directory of each session, kept on this host below the state directory.

A sandbox never sees another: each gets its own session's directory mounted, and the attempt refuses
every other directory of the state directory. What an agent left in one is hostile: it is never
walked by name, and no program of the host is started in it.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import structlog

from ringfence.errors import CallerError, UnavailableError, words
from ringfence.sandbox.apply import apply_changes
from ringfence.sandbox.applying import recover_all
from ringfence.sandbox.opening import WORKSPACES
from ringfence.sandbox.saved import load_changes
from ringfence.store.files import write_whole
from ringfence.worker.marks import NO_SNAPSHOT, Mark, Work
from ringfence.worker.workspaces import WorkspaceStore, remove_tree

_LOG = structlog.get_logger("ringfence.worker")
_SESSION = re.compile(r"[A-Za-z0-9_-]{1,110}", re.ASCII)
_DRAFT = re.compile(r"\.[A-Za-z0-9_-]{1,110}\.[0-9a-f]{16}", re.ASCII)
"""What was being made or removed when its worker died."""


class SessionDirectories:
    """Below one state directory; `snapshots` is where those lie that outlive the host.

    Which snapshot a directory grew from is kept beside it: what another host has changed since
    is found out by that, and the directory made anew.
    """

    def __init__(self, state_dir: Path, snapshots: WorkspaceStore | None = None) -> None:
        self._state_dir, self._snapshots = state_dir, snapshots
        self._root, self._marks = state_dir / WORKSPACES, state_dir / "workspace-snapshots"
        self._locks = state_dir / "workspace-locks"

    @contextlib.contextmanager
    def held(self, session_id: str) -> Iterator[None]:
        """The session's directory is one attempt's while the block runs. The transcript's lease
        is a later attempt's at once; the sandbox of an earlier one, which is stalled and not dead,
        may still have the directory mounted.

        Raises:
            CallerError: `session-unknown`.
            UnavailableError: `session-busy` while another has it; `host-failed`.
        """
        lock = self._locks / self.path(session_id).name
        try:
            self._locks.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = _locked(lock)
        except OSError as error:
            raise UnavailableError(
                "host-failed", f"the workspace cannot be locked: {words(error)}"
            ) from None
        if descriptor is None:
            raise UnavailableError(
                "session-busy", f"another attempt works in the directory of {session_id}"
            )
        try:
            yield
        finally:
            os.close(descriptor)

    async def open(
        self,
        session_id: str,
        *,
        tenant: str = "",
        reference: str | None = None,
        turn: int = 1,
        travels: bool = False,
    ) -> Path:
        """The session's directory for a turn, which the caller holds. Where the session has a
        snapshot, or will have one (`travels`), it is as it is here when it is the session's own
        still; else made from the snapshot, and empty without one. All others stay as they are.

        Raises:
            CallerError: `session-unknown`, `snapshot-unknown`.
            UnavailableError: `host-failed`, and what a restore raises.
        """
        path, grown = self.path(session_id), reference or NO_SNAPSHOT
        try:
            mark = await asyncio.to_thread(self._mark, session_id)
            own = mark is not None and mark.passes(grown, turn)
            if self._snapshots is not None and not own and (travels or reference is not None):
                await self._clear(session_id)
                await asyncio.to_thread(self._ready, path)
                if reference is not None:
                    await self._snapshots.restore(
                        reference, path, tenant=tenant, session=session_id
                    )
            await asyncio.to_thread(self._ready, path)
            # before anything is changed in it
            begun = Mark(reference=grown, turn=turn)
            if mark != begun or not own:
                await asyncio.to_thread(self._write, session_id, begun)
        except OSError as error:
            raise UnavailableError(
                "host-failed", f"the workspace cannot be made: {words(error)}"
            ) from None
        return path

    async def fits(self, session_id: str, reference: str | None, turn: int) -> bool:
        """Whether `open` leaves what is here as it is, for a session whose files travel. What
        cannot be read does not fit; `open` says why.
        """
        try:
            mark = await asyncio.to_thread(self._mark, session_id)
        except OSError:
            return False
        own = mark is not None and mark.passes(reference or NO_SNAPSHOT, turn)
        return own or self._snapshots is None

    async def save(self, session_id: str, *, tenant: str) -> str | None:
        """A snapshot of the directory; its reference, None where none are kept.

        Raises:
            AgentError: `snapshot-refused`. UnavailableError: `snapshot-unsteady`,
                `store-unavailable`.
        """
        if self._snapshots is None:
            return None
        return await self._snapshots.save(self.path(session_id), tenant=tenant, session=session_id)

    async def settled(self, session_id: str, reference: str | None, turn: int) -> None:
        """A turn is over, with this snapshot or without one; then the next goes on with the files,
        if this one had them here. Called after it is committed: a worker that dies in between
        leaves a directory that is made anew, and never one that passes for another.
        """

        def mark() -> None:
            before = self._mark(session_id)
            if reference is not None:
                self._write(session_id, Mark(reference=reference))
            elif before is not None and turn == before.turn + (before.work is Work.OVER):
                over = Mark(reference=before.reference, turn=turn, work=Work.OVER)
                self._write(session_id, over)

        try:
            await asyncio.to_thread(mark)
        except OSError as error:
            # the turn is over all the same; what is here is made anew
            _LOG.warning("a session's directory could not be marked", why=words(error))

    async def stands(self, session_id: str, reference: str | None, turn: int) -> Work | None:
        """What an earlier attempt of a turn has left in the directory that is here: None when it is
        not that attempt's, `BEGUN` when it may have changed files, `KEEPING` when all that a run in
        review mode changed has been written. What a worker that died was writing is written now.

        Raises:
            UnavailableError: `host-failed`.
        """

        def look() -> Work | None:
            mark = self._mark(session_id)
            if mark is None or mark.turn != turn or mark.reference != (reference or NO_SNAPSHOT):
                return None
            if mark.work is Work.KEEPING:
                recover_all(self._state_dir / "runs")
                try:
                    self._apply(mark.run)
                except CallerError:
                    # written already, or never to be: the agent looks for itself
                    mark = replace(mark, work=Work.BEGUN, run="")
                    self._write(session_id, mark)
            return mark.work

        try:
            return await asyncio.to_thread(look)
        except OSError as error:
            raise UnavailableError(
                "host-failed", f"the workspace cannot be read: {words(error)}"
            ) from None

    async def collect(self, tenant: str, references: list[str]) -> None:
        """Remove of a tenant's snapshots what none of these needs, but for what is a day young.
        Raises UnavailableError: nothing is removed.
        """
        if self._snapshots is not None:
            await self._snapshots.collect(tenant, references)

    def _mark(self, session_id: str) -> Mark | None:
        mark = self._marks / session_id
        if not (self._root / session_id).is_dir() or not mark.is_file():
            return None
        return Mark.parse(mark.read_text())

    def _write(self, session_id: str, mark: Mark) -> None:
        self._marks.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_whole(self._marks / session_id, mark.encode())

    def path(self, session_id: str) -> Path:
        """Where the session's files are on this host, whether or not they are there. Raises
        CallerError `session-unknown`.
        """
        if not _SESSION.fullmatch(session_id):
            raise CallerError("session-unknown", f"{session_id[:64]!r} is not a session's name")
        return self._root / session_id

    def _ready(self, path: Path) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
        # a worker that died while it wrote changes left half of them
        recover_all(self._state_dir / "runs")

    async def keep(self, run_id: str, session_id: str) -> None:
        """Write what a run in review mode changed into its session's directory, all of it: the
        files that run later on a person's machine run here in a sandbox alone.

        Raises:
            CallerError: `patch-conflict`.
        """

        def write() -> None:
            mark = self._mark(session_id)
            if mark is not None:
                # first: whoever comes after a crash ends what was begun, and does not do it again
                self._write(session_id, replace(mark, work=Work.KEEPING, run=run_id))
            self._apply(run_id)

        await asyncio.to_thread(write)

    def _apply(self, run_id: str) -> None:
        file = self._state_dir / "runs" / run_id / "changes.bin"
        if not file.exists():
            return
        changes, workspace = load_changes(file)
        if Path(workspace).parent != self._root:
            raise CallerError("workspace-refused", f"{workspace} is no session's directory")
        apply_changes(
            Path(workspace), changes, include=lambda _: True, journal=file.with_name("applying")
        )
        # they are in the workspace now, whole; run.patch says what they were
        file.unlink()

    def unused(self, seconds: float) -> list[str]:
        """Names, drafts' too, of what has not changed here for so long, by its own time."""
        if not self._root.is_dir():
            return []
        until, found = time.time() - seconds, []
        for path in self._root.iterdir():
            # a session that is deleted meanwhile takes its own away
            with contextlib.suppress(OSError):
                if path.lstat().st_mtime < until:
                    found.append(path.name)
        return found

    async def remove(self, session_id: str) -> None:
        """Forget a session's files, or a draft that `unused` named. Links are not followed.

        Raises:
            UnavailableError: `session-busy` while an attempt works in them.
        """
        if _DRAFT.fullmatch(session_id):
            await asyncio.to_thread(remove_tree, self._root / session_id)
        elif _SESSION.fullmatch(session_id):
            with self.held(session_id):
                await self._clear(session_id)
                # only by its holder: who waits for the file that goes looks at the name again
                (self._locks / session_id).unlink(missing_ok=True)

    def _away(self, path: Path) -> None:
        """Out of the way first: what its agent made unremovable must not stand where the session
        is restored to.
        """
        gone = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        with contextlib.suppress(FileNotFoundError):
            path.rename(gone)
            remove_tree(gone)

    async def _clear(self, session_id: str) -> None:
        if _SESSION.fullmatch(session_id):
            await asyncio.to_thread(self._away, self._root / session_id)
            (self._marks / session_id).unlink(missing_ok=True)


def _locked(path: Path) -> int | None:
    """Descriptor that holds the lock until it is closed; None where another has it. No program
    that is started inherits it.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and path.stat().st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # removed between: a lock on a file without a name keeps nobody out
