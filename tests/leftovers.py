"""What sandboxes of this process could leave behind, counted. Others of the host mount, unmount and
run sandboxes of their own as they like: what may be theirs is left out.

    with counted(tmp_path):
        before = left(state)
        ...
        assert left(state) == before
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from ringfence.sandbox import cgroups, hostfacts

_PR_SET_CHILD_SUBREAPER = 36
_there: set[str] = set()
"""Children of this process that are of other tests: servers that all of them share."""


def children() -> set[str]:
    own = os.getpid()
    found = Path(f"/proc/{own}/task").glob("*/children")
    return {pid for path in found for pid in path.read_text().split()}


def _alive(pid: str) -> str:
    """A process and its command line; nothing for an orphan that has ended, whom process 1 would
    have buried.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except FileNotFoundError:
        return ""
    state = stat[stat.rindex(")") + 2 :].split()[0]
    return "" if state == "Z" else f"{pid} {state} {words}"


@contextlib.contextmanager
def counted(place: Path) -> Iterator[None]:
    """An orphan becomes ours, not process 1's, and temporary files are in a place of our own."""
    temporary = place / "temporary"
    temporary.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    _there.clear()
    _there.update(children())
    try:
        with (
            mock.patch.object(tempfile, "tempdir", str(temporary)),
            mock.patch.dict(os.environ, {"TMPDIR": str(temporary)}),
        ):
            yield
    finally:
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def left(state: Path) -> dict[str, Any]:
    """Within `counted`: equal where nothing came and nothing went."""
    gc.collect()  # what tests before this one dropped has descriptors too
    own = os.getpid()
    places = (hostfacts.stage(), str(state), "stage", "scratch")
    mounts = [line.split()[:2] for line in Path("/proc/self/mounts").read_text().splitlines()]
    hierarchy = cgroups.discover()
    parents = {*hierarchy.parents.values(), *([hierarchy.freezer] if hierarchy.freezer else [])}
    return {
        "processes": sorted(filter(None, map(_alive, children() - _there))),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "mounts": [mount for mount in mounts if any(one in places for one in mount)],
        "groups": sorted(str(p) for each in parents for p in each.glob(f"ringfence-{own}-*")),
        "files": sorted(path.name for path in state.rglob("*") if path.name != "lock"),
        "networks": sorted(path.name for path in Path("/run/netns").glob("*")),
        "interfaces": sorted(one for one in os.listdir("/sys/class/net") if one.startswith("veth")),
        "loops": sorted(str(path) for path in Path("/sys/block").glob("loop*/loop/backing_file")),
        "temporary": sorted(os.listdir(tempfile.gettempdir())),
    }
