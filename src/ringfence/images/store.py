"""Images that are built, by name and digest, below the state directory; verified when used.

    names/NAME           the digest that the name stands for
    keys/KEY             the digest that a build of these inputs gave
    trees/HEX/tree       the manifest: one line a path; its SHA-256 is HEX
    trees/HEX/image.json definition, suite, packages; all of it can be had from the tree again
    trees/HEX/rootfs     the files
    trees/HEX/seal       what was true of them when they were last read whole; see `whole`

A tree is renamed into place whole and never changed. Whoever uses one holds its lock shared;
removing takes it exclusively.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

from ringfence.errors import CallerError, UnavailableError
from ringfence.images.image import DEFAULT, Image, damaged, locked, unknown
from ringfence.images.whole import differences, require_whole

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def require(state_dir: Path, name: str = DEFAULT) -> Image:
    """The image of that name or digest, verified: see `whole`.

    Raises:
        CallerError: `image-unknown`, with how to build it.
        UnavailableError: `image-damaged`.
    """
    return ImageStore(state_dir).require(name)


def check_name(name: str) -> str:
    """A name as it is.

    Raises:
        CallerError: `image-unknown` for what can be none; it becomes part of a path.
    """
    if not _NAME.fullmatch(name):
        raise CallerError(
            "image-unknown",
            f"{ascii(name)[:80]} is no name of an image",
            hint="lower-case letters, digits, dots, dashes; 63 at most",
        )
    return name


class ImageStore:
    """The images of one state directory."""

    def __init__(self, state_dir: Path) -> None:
        self.root = state_dir / "images"

    def names(self) -> dict[str, str]:
        """Name to digest."""
        place = self.root / "names"
        found = sorted(place.iterdir()) if place.is_dir() else []
        return {path.name: path.read_text("ascii").strip() for path in found}

    def find(self, name: str) -> Image:
        """The image of a name or digest, not yet verified. Raises as `require` does."""
        digest = name if _DIGEST.fullmatch(name) else self._digest_of(check_name(name))
        place = self.root / "trees" / digest.removeprefix("sha256:")
        try:
            manifest = json.loads((place / "image.json").read_bytes())
        except FileNotFoundError:
            raise unknown(name) from None
        except ValueError:
            raise damaged(digest, "image.json is not JSON") from None
        return Image(digest=digest, rootfs=place / "rootfs", manifest=manifest)

    def require(self, name: str = DEFAULT) -> Image:
        """As the function of that name."""
        image = self.find(name)
        require_whole(image)
        return image

    def by_key(self, key: str) -> Image | None:
        """What a build of these inputs gave, when it is still there and whole."""
        try:
            return self.require((self.root / "keys" / key).read_text("ascii").strip())
        except (FileNotFoundError, CallerError, UnavailableError):
            return None

    def _digest_of(self, name: str) -> str:
        try:
            return (self.root / "names" / name).read_text("ascii").strip()
        except FileNotFoundError:
            raise unknown(name) from None

    def set_name(self, name: str, digest: str) -> None:
        """Let a name stand for an image from now on."""
        self._write("names", check_name(name), digest)

    def set_key(self, key: str, digest: str) -> None:
        """Remember what these inputs gave."""
        self._write("keys", key, digest)

    def nameless(self) -> list[str]:
        """Digests of the trees that no name stands for."""
        place = self.root / "trees"
        named = set(self.names().values())
        found = sorted(place.iterdir()) if place.is_dir() else []
        digests = [f"sha256:{path.name}" for path in found]
        return [each for each in digests if _DIGEST.fullmatch(each) and each not in named]

    def forget_keys(self) -> None:
        """Forget what inputs gave whose tree is gone."""
        place = self.root / "keys"
        for path in place.iterdir() if place.is_dir() else ():
            if not (self.root / "trees" / path.read_text("ascii").strip()[7:]).is_dir():
                path.unlink()

    def _write(self, folder: str, name: str, digest: str) -> None:
        place = self.root / folder
        place.mkdir(parents=True, exist_ok=True)
        written = place / f".{name}.{os.getpid()}"
        written.write_text(digest + "\n", "ascii")
        written.replace(place / name)

    def keep(self, building: Path, digest: str) -> Image:
        """Take in a finished tree, by one rename; one that is there already is the same."""
        place = self.root / "trees" / digest.removeprefix("sha256:")
        # not left to the umask: one that others may write to is not believed
        for each in (place.parent, building):
            each.mkdir(parents=True, exist_ok=True)
            each.chmod(0o700)
        if place.exists():
            if not differences(self.find(digest)):
                shutil.rmtree(building)
                return self.find(digest)
            _delete(place)  # damaged: the new one takes its place
        building.rename(place)
        return self.find(digest)

    def remove(self, name: str) -> str:
        """Forget a name, and delete its tree when no other name has it; its digest.

        Raises:
            CallerError: `image-unknown`.
            UnavailableError: `image-in-use`.
        """
        digest = name if _DIGEST.fullmatch(name) else self._digest_of(check_name(name))
        others = [each for each, of in self.names().items() if of == digest and each != name]
        place = self.root / "trees" / digest.removeprefix("sha256:")
        if name == digest and others:
            raise UnavailableError(
                "image-in-use",
                f"{digest} is the image {', '.join(others)}",
                hint=f"ringfence image remove {others[0]}",
            )
        if not others and place.is_dir():
            with locked(place, fcntl.LOCK_EX | fcntl.LOCK_NB):
                (self.root / "names" / name).unlink(missing_ok=True)
                _delete(place)
        elif name == digest:
            raise unknown(name)
        (self.root / "names" / name).unlink(missing_ok=True)
        return digest


def _delete(place: Path) -> None:
    """Out of sight by one rename, then away: half a tree has no digest's name."""
    gone = place.with_name(f".gone-{place.name}-{os.getpid()}")
    with suppress(FileNotFoundError):
        place.rename(gone)
        shutil.rmtree(gone)
