"""Where a file of a session's resources appears inside the sandbox. PURE.

The client's types: `mount_path`, by default `/mnt/session/uploads/<file_id>`. Everything lies
below `/mnt/session`: a mount elsewhere could cover what the sandbox itself needs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from ringfence.errors import CallerError

ROOT = "/mnt/session"
UPLOADS = f"{ROOT}/uploads"
OUTPUTS = f"{ROOT}/outputs"
"""Where an agent leaves what is to be kept; nothing is mounted over it."""

_PLAIN = re.compile(r"[^\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]+")


def mount_path(file_id: str, stated: str | None) -> str:
    """The path inside, normal and below `/mnt/session`.

    Raises:
        CallerError: `request-invalid`.
    """
    path = f"{UPLOADS}/{file_id}" if stated is None else stated
    parts = path.split("/")
    if (
        not path.startswith(f"{ROOT}/")
        or any(part in {"", ".", ".."} or len(part.encode("utf-8", "replace")) > 255
               for part in parts[1:])
        or len(path.encode("utf-8", "replace")) > 1024
        or not _PLAIN.fullmatch(path)
    ):  # fmt: skip
        raise CallerError(
            "request-invalid",
            f"mount_path: write a normal absolute path below {ROOT}",
            hint=f"as {UPLOADS}/report.csv; without `..`, doubled slashes or control characters",
        )
    if path == OUTPUTS or path.startswith(f"{OUTPUTS}/"):
        raise CallerError("request-invalid", f"mount_path: {OUTPUTS} is the session's own")
    return path


def refuse_overlaps(paths: Iterable[str]) -> None:
    """Two files in one place, or one where another needs a directory, hide one another.

    Raises:
        CallerError: `request-invalid`.
    """
    seen: list[str] = []
    for path in sorted(paths):
        for other in seen:
            if path == other or path.startswith(f"{other}/"):
                raise CallerError("request-invalid", f"mount_path: {other} is taken already")
        seen.append(path)
