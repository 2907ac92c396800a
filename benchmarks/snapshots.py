"""Snapshots of workspaces beside `tar --zstd`: save, save again, save with one change, restore.

`python -m benchmarks.snapshots [thousands of small files]`

Processor time, ours and our children's; each row has a ratio to tar's in the same run. Bytes are
what lies on disk after it.
"""

from __future__ import annotations

import asyncio
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from ringfence.store.blobs import BlobStore, DirectoryObjects
from ringfence.worker.workspaces import WorkspaceStore

WHOSE = {"tenant": "bench", "session": "bench"}


def plant(root: Path, thousands: int) -> None:
    """Something like a checkout: small texts in many directories, and a few large files."""
    draw = random.Random(7)
    words = [f"{draw.getrandbits(40):x}" for _ in range(4000)]
    for number in range(thousands * 1000):
        place = root / f"d{number % 97}" / f"e{number % 7}"
        place.mkdir(parents=True, exist_ok=True)
        size = int(draw.expovariate(1 / 500)) + 1
        (place / f"f{number}.py").write_text(" ".join(draw.choices(words, k=size)))
    for number in range(3):
        (root / f"large{number}").write_bytes(draw.randbytes(16 << 20))


def cpu() -> float:
    """Seconds of this process with its threads, and of its children."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Wall clock and processor seconds."""
    wall, used = time.perf_counter(), cpu()
    work()
    return time.perf_counter() - wall, cpu() - used


def size(root: Path) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file())


def main(arguments: list[str]) -> None:
    """Print the table."""
    thousands = int(arguments[0]) if arguments else 5
    place = Path(tempfile.mkdtemp(prefix="rfsnap"))
    try:
        tree, archive = place / "tree", place / "tree.tar.zst"
        tree.mkdir()
        plant(tree, thousands)
        print(f"{thousands}k files and 3 of 16 MiB, {size(tree) / 1e6:.0f} MB")
        store = WorkspaceStore(BlobStore(DirectoryObjects(place / "blobs")))
        references: list[str] = []

        def save() -> None:
            references.append(asyncio.run(store.save(tree, **WHOSE)))

        def pack() -> None:
            command = ["tar", "--zstd", "-cf", str(archive), "-C", str(tree), "."]
            subprocess.run(command, check=True)
            os.sync()

        def change() -> None:
            with (tree / "d5" / "e0" / "f1071.py").open("a") as file:
                file.write("changed")

        def restore() -> None:
            asyncio.run(store.restore(references[-1], place / "again", **WHOSE))

        def unpack() -> None:
            (place / "other").mkdir()
            subprocess.run(["tar", "-xf", str(archive), "-C", str(place / "other")], check=True)

        print(f"{'':18}{'ours':>16}{'tar --zstd':>18}{'ratio, CPU':>12}{'MB written':>12}")
        steps = (
            ("save", save, pack),
            ("save unchanged", save, pack),
            ("save one changed", lambda: (change(), save()), pack),
            ("restore", restore, unpack),
        )
        before = 0
        for name, ours, theirs in steps:
            mine, peer = timed(ours), timed(theirs)
            after = size(place / "blobs") if (place / "blobs").exists() else 0
            print(
                f"{name:18}{mine[0]:7.2f} s{mine[1]:6.2f} s{peer[0]:9.2f} s{peer[1]:6.2f} s"
                f"{mine[1] / peer[1]:11.2f}x{(after - before) / 1e6:12.1f}"
            )
            before = after
        assert references[0] == references[1] != references[2]
        print(
            f"{len(list((place / 'blobs').rglob('*')))} blobs; tar {archive.stat().st_size / 1e6:.1f} MB"
        )
    finally:
        shutil.rmtree(place)


if __name__ == "__main__":
    main(sys.argv[1:])
