"""Looking for secrets where none may be: in processes, in their memory, in files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path


def in_processes(canaries: list[str]) -> set[int]:
    """Asserts that no process shows one in its environment or command line; which were looked at."""
    looked = set()
    for directory in Path("/proc").glob("[0-9]*"):
        for name in ("environ", "cmdline"):
            try:
                data = (directory / name).read_bytes()
            except OSError:
                continue
            looked.add(int(directory.name))
            assert not [one for one in canaries if one.encode() in data], directory
    return looked


def in_files(place: Path, canaries: list[str]) -> list[Path]:
    return [
        path
        for path in place.rglob("*")
        if path.is_file() and any(one.encode() in path.read_bytes() for one in canaries)
    ]


def in_memory(pid: int, canaries: list[str]) -> set[str] | None:
    """Those that a process has in what it can write; None where nobody may look, or it is gone."""
    found: set[str] | None = None
    try:
        maps = Path(f"/proc/{pid}/maps").read_text()
        with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
            for start, end in re.findall(r"^(\w+)-(\w+) rw.p", maps, re.MULTILINE):
                try:
                    memory.seek(int(start, 16))
                    data = memory.read(int(end, 16) - int(start, 16))
                except (OSError, ValueError, OverflowError):
                    continue
                found = (found or set()) | {one for one in canaries if one.encode() in data}
    except OSError:
        return None
    return found


def descendants(parent: int) -> Iterator[tuple[int, bytes]]:
    """Every process that descends from one, and its command line."""
    for task in Path(f"/proc/{parent}/task").glob("*/children"):
        for pid in map(int, task.read_text().split()):
            yield pid, Path(f"/proc/{pid}/cmdline").read_bytes()
            yield from descendants(pid)
