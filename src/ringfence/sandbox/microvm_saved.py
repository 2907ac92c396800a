"""The files of saved machines: code, so that what is read is compared and then cannot change."""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
from pathlib import Path

_KEPT_SNAPSHOTS = 4


def seal(descriptor: int) -> None:
    """From now on nobody can change it."""
    seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)


def read_saved(path: Path) -> int | None:
    """The snapshot, sealed; None when there is none, or not the one that was written."""
    try:
        digest, data = path.with_suffix(".sha256").read_text(), path.read_bytes()
    except OSError:
        return None
    if hashlib.sha256(data).hexdigest() != digest:
        return None
    descriptor = os.memfd_create("snapshot", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with os.fdopen(os.dup(descriptor), "wb") as file:
        file.write(data)
    seal(descriptor)
    return descriptor


def write_saved(path: Path, descriptor: int) -> None:
    """Whole or not at all, with its hash beside it. Raises OSError."""
    with open(f"/proc/self/fd/{descriptor}", "rb") as file:
        data = file.read()
    for target, content in (
        (path.with_suffix(".sha256"), hashlib.sha256(data).hexdigest().encode()),
        (path, data),
    ):
        temporary = target.with_name(f"{target.name}.{secrets.token_hex(6)}.part")
        with open(os.open(temporary, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "wb") as file:
            file.write(content)
        temporary.replace(target)


def forget(directory: Path) -> None:
    """Only the latest are kept: each is some 70 MB."""
    every = sorted(directory.glob("snapshot-*.sha256"), key=lambda path: path.stat().st_mtime)
    for path in every[:-_KEPT_SNAPSHOTS]:
        path.unlink(missing_ok=True)
        path.with_suffix("").unlink(missing_ok=True)
