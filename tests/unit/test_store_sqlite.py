"""Opening a database twice in one process must not take the first connection's locks away."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from ringfence.errors import UnavailableError
from ringfence.queue.embedded import EmbeddedQueue
from ringfence.store.database import open_sqlite
from ringfence.store.sqlite import open_database

COMES_AND_GOES = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1])
print(connection.execute(sys.argv[2]).fetchone()[0])
connection.close()
"""


def another_process(path: Path, query: str = "SELECT count(*) FROM run") -> str:
    """Opens the file, reads, and closes it: the last one to do so takes the write-ahead file."""
    command = [sys.executable, "-c", COMES_AND_GOES, str(path), query]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_what_is_committed_after_another_process_left_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "q" / "queue.sqlite"

    async def work() -> None:
        # two connections: one that writes, one that reads
        queue = EmbeddedQueue(path)
        await queue.submit("one", tenant="a")
        inode = os.stat(f"{path}-wal").st_ino
        assert another_process(path) == "1"
        assert os.stat(f"{path}-wal").st_ino == inode, "it was the last to leave, it thought"
        assert await queue.submit("two", tenant="a")
        assert another_process(path) == "2"
        await queue.close()

    asyncio.run(work())
    assert another_process(path) == "2"


def test_so_it_is_with_the_platforms_database(tmp_path: Path) -> None:
    path = tmp_path / "p" / "platform.sqlite"

    async def work() -> None:
        database = open_sqlite(path)
        await database.migrate()
        inode = os.stat(f"{path}-wal").st_ino
        # made once more, for what else is in it
        await open_sqlite(path).close()
        another_process(path, "SELECT count(*) FROM tenants")
        assert os.stat(f"{path}-wal").st_ino == inode
        await database.close()

    asyncio.run(work())


@pytest.mark.parametrize("opened", [open_sqlite, lambda path: open_database(path, "x")])
def test_a_link_is_not_followed(tmp_path: Path, opened: object) -> None:
    target, path = tmp_path / "target", tmp_path / "d" / "x.sqlite"
    sqlite3.connect(target).close()
    path.parent.mkdir(mode=0o700)
    path.symlink_to(target)
    with pytest.raises(UnavailableError) as caught:
        opened(path)  # type: ignore[operator]
    assert caught.value.code == "store-unavailable"
