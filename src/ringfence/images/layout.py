"""A raw tree → an image's: nothing that differs from day to day or host to host, no set-id bit,
the agent's user, fixed times. What a build ran is gone: logs, caches, lists, keys, sources.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from ringfence.images.tree import AGENT, CLAUDE, EPOCH, owner

_EMPTIED = (
    "boot",
    "dev",
    "proc",
    "run",
    "sys",
    "tmp",
    "root",
    "var/cache",
    "var/lib/apt",
    "var/log",
    "var/tmp",
    "var/backups",
    "var/spool",
)

_REMOVED = (
    "etc/*-",
    "etc/.pwd.lock",
    "etc/apt/sources.list*",
    "etc/apt/auth.conf*",
    "etc/apt/apt.conf*",
    "etc/apt/trusted.gpg*",
    "etc/dpkg/dpkg.cfg.d/*",
    "etc/mtab",
    "etc/subuid",
    "etc/subgid",
    "var/lib/dbus/machine-id",
    "var/lib/dpkg/*-old",
    "var/lib/dpkg/*lock*",
    "var/lib/dpkg/triggers/Lock",
    "var/lib/systemd/*",
    "usr/lib/python3*/EXTERNALLY-MANAGED",  # pip works inside as in deploy/Dockerfile
)

# mount points, and what programs look up; a backend may lay its own over them
_FILES = {
    "etc/hostname": "agent\n",
    "etc/hosts": "127.0.0.1\tlocalhost\n::1\tlocalhost\n",
    "etc/machine-id": "",
    "etc/resolv.conf": "",
}

_MODES = {"tmp": 0o1777, "var/tmp": 0o1777, "root": 0o700}
_PASSWD = f"agent:x:{AGENT}:{AGENT}::/home/agent:/bin/bash\n"
_DAYS = EPOCH // 86400


def drop_compiled(root: Path) -> None:
    """Remove compiled modules: they name their source by a time that is about to change."""
    for path in list(root.rglob("__pycache__")):
        if not path.is_symlink():
            shutil.rmtree(path)


def settle(root: Path, *, claude: Path | None) -> None:
    """Make the tree what an image is. `claude` is copied in."""
    for path in _EMPTIED:
        if (root / path).is_symlink() or not (root / path).is_dir():
            continue
        for inner in list((root / path).iterdir()):
            _remove(inner)
    for pattern in _REMOVED:
        for inner in list(root.glob(pattern)):
            _remove(inner)
    for path in (*_EMPTIED, "etc", "home/agent", "workspace"):
        (root / path).mkdir(parents=True, exist_ok=True)
    for path, text in _FILES.items():
        _write(root / path, text)
    _add_user(root)
    if claude is not None:
        _copy_program(claude, root / CLAUDE)
    stamp(root)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _write(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)  # it may be a link that leads out of the tree
    path.write_text(text, "utf-8")
    path.chmod(0o644)


def _add_user(root: Path) -> None:
    """Lines as useradd writes them, without the day; no password opens any account."""
    for name, line in (
        ("passwd", _PASSWD),
        ("group", f"agent:x:{AGENT}:\n"),
        ("shadow", f"agent:!:{_DAYS}:0:99999:7:::\n"),
        ("gshadow", "agent:!::\n"),
    ):
        path = root / "etc" / name
        kept = path.read_text("utf-8").splitlines(keepends=True) if path.exists() else []
        lines = [each for each in kept if not each.startswith("agent:")] + [line]
        if name == "shadow":
            lines = [_fixed_day(each) for each in lines]
        _write(path, "".join(lines))
        path.chmod(0o640 if name.endswith("shadow") else 0o644)


def _fixed_day(line: str) -> str:
    fields = line.split(":")
    return ":".join([*fields[:2], str(_DAYS), *fields[3:]])


def _copy_program(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    target.chmod(0o755)


def stamp(root: Path) -> None:
    """Owners, modes and times, children before their directory, whose own time they change."""
    give = os.geteuid() == 0
    for path in _bottom_up(root):
        full = root / path
        status = full.lstat()
        if give:
            who = owner(path)
            os.chown(full, who, who, follow_symlinks=False)
        if not stat.S_ISLNK(status.st_mode):
            full.chmod(mode_of(path, status.st_mode))
        os.utime(full, (EPOCH, EPOCH), follow_symlinks=False)


def mode_of(path: str, mode: int) -> int:
    """Permission bits of a path. PURE.

    No set-id bit: nothing inside may gain a right (no-new-privileges would refuse it as well), and
    such a file must not lie on the host either. No write for group and others: an agent that could
    write to a path of its image would find it everywhere. The owner can always read: an ordinary
    user builds, hashes and exports what is root's inside.
    """
    if path in _MODES:
        return _MODES[path]
    if stat.S_ISDIR(mode):
        return 0o755 if mode & 0o005 else 0o700
    return (stat.S_IMODE(mode) & 0o755) | 0o400


def _bottom_up(root: Path) -> Iterator[str]:
    for directory, folders, files in os.walk(root, topdown=False):
        below = os.path.relpath(directory, root)
        for name in (*files, *folders):
            yield name if below == "." else f"{below}/{name}"
    yield ""
