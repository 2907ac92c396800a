"""An image that is built: its tree, its lock, and the words for what is wrong with one."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ringfence.errors import CallerError, UnavailableError

DEFAULT = "agent"
"""Name of the built-in definition's image."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Image:
    """What a backend needs of an image.

    Attributes:
        digest: `sha256:…` of the manifest; two images with one digest hold the same files.
        rootfs: the tree, for a read-only mount. It lies below the state directory, which is 0700:
            a program of another uid needs a mount of it, never a path. Owners on the disk are
            right when root built it; an ordinary user's tree is all that user's.
        manifest: `image.json`: definition, suite, architecture, packages, built_by.
    """

    digest: str
    rootfs: Path
    manifest: dict[str, Any]

    @property
    def entries_file(self) -> Path:
        """The manifest of the tree."""
        return self.rootfs.with_name("tree")

    @contextmanager
    def held(self) -> Iterator[None]:
        """While a sandbox uses it, nobody removes it.

        Raises:
            CallerError: `image-unknown` when it was removed meanwhile.
        """
        with locked(self.rootfs.parent, fcntl.LOCK_SH | fcntl.LOCK_NB):
            yield


@contextmanager
def locked(place: Path, how: int) -> Iterator[None]:
    """The lock of an image's directory.

    Raises:
        CallerError: `image-unknown` when there is none.
        UnavailableError: `image-in-use`.
    """
    try:
        descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise unknown(f"sha256:{place.name}") from None
    try:
        fcntl.flock(descriptor, how)
        if not place.exists():  # removed between the two
            raise unknown(f"sha256:{place.name}")
        yield
    except BlockingIOError:
        raise UnavailableError(
            "image-in-use",
            f"sha256:{place.name[:12]}… is used by a sandbox, or is being removed",
            hint="try again when the sandboxes that use it have ended",
        ) from None
    finally:
        os.close(descriptor)


def unknown(name: str) -> CallerError:
    """`image-unknown`, with how to build it."""
    option = "" if name == DEFAULT else f" --name {name}"
    return CallerError(
        "image-unknown", f"there is no image {name}", hint=f"ringfence image build{option}"
    )


def damaged(digest: str, reason: str) -> UnavailableError:
    """`image-damaged`."""
    return UnavailableError(
        "image-damaged",
        f"image {digest[:19]}…: {reason}",
        hint="something wrote to the state directory; ringfence image build --rebuild",
    )
