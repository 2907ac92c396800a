"""What an agent leaves in `/mnt/session/outputs` becomes files of its session when a turn ends.

The place is a directory of the workspace, so that every technology has it, and a link to it in the
session's own directory, which is read-only. No process of the sandbox is alive, or thawed, when it
is collected. What lies there is hostile all the same: it is walked by descriptor and through no
link, and only regular files of bounded size and number, with names that are fit to be shown, are
copied. A file is made of a place when it holds another content than the last time, and of one that
is new when the session has no file of this name and content: an attempt that died in between is
repeated, a file that stays is one file, and one that its owner has deleted does not come back.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import stat
from pathlib import Path

from ringfence.control import files, turns
from ringfence.control.files import Described, FileLimits
from ringfence.control.mounts import OUTPUTS
from ringfence.control.turns import Superseded, Turn
from ringfence.errors import AgentError, CallerError, DeniedError, RingfenceError, words
from ringfence.model import WorkspaceMode
from ringfence.policy.compiled import SandboxProfile
from ringfence.record.safe_text import one_line
from ringfence.sandbox import safeopen
from ringfence.sandbox.protocol import INSIDE_SESSION_FILES, INSIDE_WORKSPACE
from ringfence.store import file_rows, output_rows
from ringfence.store.contents import Contents, Writing
from ringfence.store.database import Database

PLACE = OUTPUTS.rpartition("/")[2]
"""The directory's name, in the workspace and in the session's own directory."""
MOST_FILES, MOST_BYTES, MOST_LOOKED_AT, DEEPEST = 100, 256 << 20, 10_000, 8
"""Of one turn: files and bytes that are new, four times which are read; entries that are looked at;
directories in one another."""
_CHUNK = 1 << 20
_MOST_PROBLEMS = 20


def offered(profile: SandboxProfile) -> bool:
    """Whether a turn has the place: it can write to its workspace, and the policy shows nothing
    where the session's own directory is mounted.
    """
    top = INSIDE_SESSION_FILES.split("/")[1]
    shown = (*profile.readable, *profile.writable)
    free = not any(path == "/" or path.split("/")[1:2] == [top] for path in shown)
    return free and profile.workspace_mode is not WorkspaceMode.READONLY


def prepare(workspace: Path, session_files: Path) -> None:
    """Make the place, before a turn. What an agent has put in its stead stays, and nothing is
    collected there.
    """
    make_place(workspace)
    (session_files / PLACE).symlink_to(f"{INSIDE_WORKSPACE}/{PLACE}")


def make_place(workspace: Path) -> None:
    """In the workspace. An agent that took the right to do so has no place, and its turn all the
    same: it alone can mend that.
    """
    with contextlib.suppress(OSError):
        (workspace / PLACE).mkdir(mode=0o700)


async def collect(
    database: Database, contents: Contents, limits: FileLimits, turn: Turn, workspace: Path
) -> list[str]:
    """Keep what is new; one line for each thing that is not kept, twenty at most.

    Raises:
        Superseded: a later attempt has the turn, and collects.
        UnavailableError: `store-unavailable`.
    """
    place = await asyncio.to_thread(_opened, workspace)
    if place is None:
        return []
    try:
        collecting = _Collecting(database, contents, limits, turn)
        entries = safeopen.walk(place, max_entries=MOST_LOOKED_AT, max_depth=DEEPEST, unlock=True)
        with contextlib.closing(entries):
            while (entry := await asyncio.to_thread(next, entries, None)) is not None:
                if not stat.S_ISDIR(entry[1].st_mode) and not await collecting.take(place, *entry):
                    break
    except (AgentError, DeniedError) as error:
        collecting.problems.append(error.message)
    except OSError as error:
        collecting.problems.append(words(error))
    finally:
        os.close(place)
    return collecting.problems[:_MOST_PROBLEMS]


def _opened(workspace: Path) -> int | None:
    """The place's descriptor; None where a link, a file or nothing is in its stead."""
    try:
        root = os.open(workspace, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            return safeopen.open_beneath(root, PLACE, os.O_RDONLY | os.O_DIRECTORY)
        finally:
            os.close(root)
    except (OSError, DeniedError):
        return None


class _Collecting:
    def __init__(
        self, database: Database, contents: Contents, limits: FileLimits, turn: Turn
    ) -> None:
        self._database, self._contents = database, contents
        self._limits, self._turn = limits, turn
        self._files = self._bytes = self._read = self._noted = 0
        self._seen: set[tuple[int, int]] = set()
        self.problems: list[str] = []

    async def take(self, place: int, path: bytes, status: os.stat_result) -> bool:
        """Keep what is at a path, if it is a file; whether to look at more."""
        text = one_line(os.fsdecode(path), 80)
        if not stat.S_ISREG(status.st_mode):
            self.problems.append(f"{text}: a link, or no regular file")
            return len(self.problems) < _MOST_PROBLEMS
        # hard links cost the agent nothing: a thousand names of one file were read as often
        if (inode := (status.st_dev, status.st_ino)) in self._seen:
            self.problems.append(f"{text}: another name of a file that was looked at")
            return len(self.problems) < _MOST_PROBLEMS
        self._seen.add(inode)
        try:
            await self._keep(place, path, files.described(os.fsdecode(path), "", None))
        except Superseded:
            raise
        except (CallerError, DeniedError) as error:
            self.problems.append(f"{text}: {error.message}")
        except OSError as error:
            self.problems.append(f"{text}: {words(error)}")
        if self._read >= 4 * MOST_BYTES:
            self.problems.append(f"of one turn {4 * MOST_BYTES} bytes are looked at")
            return False
        if self._files < MOST_FILES and self._bytes < MOST_BYTES:
            return len(self.problems) < _MOST_PROBLEMS
        self.problems.append(f"of one turn {MOST_FILES} files and {MOST_BYTES} bytes are kept")
        return False

    async def _keep(self, place: int, path: bytes, what: Described) -> None:
        turn, contents = self._turn, self._contents
        most = min(self._limits.file, MOST_BYTES - self._bytes)
        spot = hashlib.sha256(path).hexdigest()
        with contents.begin(turn.tenant) as writing:
            try:
                await asyncio.to_thread(_copy, place, path, writing, most)
            finally:
                self._read += writing.size
            if not await self._is_new(spot, what.filename, writing.sha256):
                return
            identity = await files.put(contents, turn.tenant, writing)
        try:
            async with self._database.writing() as connection:
                # the session is this attempt's still, and stays so until this is written
                await turns.append(connection, turn, [])
                await files.create(
                    connection,
                    turn.tenant,
                    Described(
                        filename=what.filename, mime_type=what.mime_type, scope_id=turn.session_id
                    ),
                    identity=identity,
                    size=writing.size,
                    sha256=writing.sha256,
                    limits=self._limits,
                )
                await output_rows.put(
                    connection, turn.tenant, turn.session_id, spot, writing.sha256
                )
        except RingfenceError:
            # where the commit's end was not seen `tidy` finds the content, if it has no row
            await asyncio.to_thread(contents.remove, turn.tenant, identity)
            raise
        self._files += 1
        self._bytes += writing.size

    async def _is_new(self, spot: str, filename: str, sha256: str) -> bool:
        """Whether a place has what it did not have when it was last collected."""
        tenant, session = self._turn.tenant, self._turn.session_id
        async with self._database.reading() as connection:
            last = await output_rows.last(connection, tenant, session, spot)
            if last is not None:
                return last != sha256
            if not await file_rows.made_before(connection, tenant, session, filename, sha256):
                return True
        # a copy of a file, or one that was moved; a row each is all that an agent makes with them
        if self._noted < MOST_FILES:
            self._noted += 1
            async with self._database.writing() as connection:
                await turns.append(connection, self._turn, [])
                await output_rows.put(connection, tenant, session, spot, sha256)
        return False


def _copy(place: int, path: bytes, writing: Writing, most: int) -> None:
    """Raises CallerError `request-too-large`, DeniedError `path-escapes`, OSError."""
    handle = safeopen.open_beneath(place, path, os.O_PATH)
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise DeniedError("path-escapes", "no regular file any more")
        # the very inode that was looked at: opening a FIFO would wait, a device would act
        descriptor = os.open(f"/proc/self/fd/{handle}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(handle)
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        while data := file.read(_CHUNK):
            if writing.size + len(data) > most:
                raise CallerError("request-too-large", f"larger than {most} bytes")
            writing.write(data)
