"""Images that are built, by name and digest, below the state directory; verified when used.

    names/NAME           the digest that the name stands for
    keys/KEY             the digest that a build of these inputs gave
    trees/HEX/tree       the manifest: one line a path; its SHA-256 is HEX
    trees/HEX/image.json definition, suite, packages; all of it can be had from the tree again
    trees/HEX/rootfs     the files

A tree is renamed into place whole and never changed. Whoever uses one holds its lock shared;
removing takes it exclusively.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ringfence.errors import CallerError, UnavailableError
from ringfence.images import tree

DEFAULT = "agent"

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_SAMPLE = 48
_SAMPLE_BYTES = 1 << 18
_REPORTED = 10


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
        with _locked(self.rootfs.parent, fcntl.LOCK_SH | fcntl.LOCK_NB):
            yield


def require(state_dir: Path, name: str = DEFAULT) -> Image:
    """The image of that name or digest, its manifest and a sample of its files verified.

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
            raise _unknown(name) from None
        except ValueError:
            raise _damaged(digest, "image.json is not JSON") from None
        return Image(digest=digest, rootfs=place / "rootfs", manifest=manifest)

    def require(self, name: str = DEFAULT) -> Image:
        """As the function of that name."""
        image = self.find(name)
        _sample(image)
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
            raise _unknown(name) from None

    def set_name(self, name: str, digest: str) -> None:
        """Let a name stand for an image from now on."""
        self._write("names", check_name(name), digest)

    def set_key(self, key: str, digest: str) -> None:
        """Remember what these inputs gave."""
        self._write("keys", key, digest)

    def _write(self, folder: str, name: str, digest: str) -> None:
        place = self.root / folder
        place.mkdir(parents=True, exist_ok=True)
        written = place / f".{name}.{os.getpid()}"
        written.write_text(digest + "\n", "ascii")
        written.replace(place / name)

    def keep(self, building: Path, digest: str) -> Image:
        """Take in a finished tree, by one rename; one that is there already is the same."""
        place = self.root / "trees" / digest.removeprefix("sha256:")
        place.parent.mkdir(parents=True, exist_ok=True)
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
            with _locked(place, fcntl.LOCK_EX | fcntl.LOCK_NB):
                (self.root / "names" / name).unlink(missing_ok=True)
                _delete(place)
        elif name == digest:
            raise _unknown(name)
        (self.root / "names" / name).unlink(missing_ok=True)
        return digest


def differences(image: Image) -> list[str]:
    """How the files differ from the manifest, the first of them as sentences; empty when whole.

    Reads every byte. Root's tree is judged by its owners, too.

    Raises:
        UnavailableError: `image-damaged` for a manifest that is not the digest's.
    """
    expected = {entry.path: entry for entry in tree.parse(_manifest(image))}
    found: list[str] = []
    for path in sorted(tree.paths(image.rootfs), key=os.fsencode):
        entry = expected.pop(path, None)
        reason = "is not in the manifest" if entry is None else _differs(image.rootfs, entry)
        if reason:
            found.append(f"/{path} {reason}")
    found += [f"/{path} is missing" for path in expected]
    return found[:_REPORTED]


def _differs(root: Path, entry: tree.Entry) -> str:
    try:
        now = tree.entry_at(root, entry.path)
        status = (root / entry.path).lstat()
    except (OSError, UnavailableError) as error:
        return f"cannot be read: {error}"
    for field in ("kind", "mode", "size", "content"):
        if getattr(now, field) != getattr(entry, field):
            return f"differs in {field}"
    if os.geteuid() == 0 and (status.st_uid, status.st_gid) != (entry.uid, entry.gid):
        return "differs in owner"
    return ""


def _manifest(image: Image) -> bytes:
    """The manifest's bytes, which the digest vouches for."""
    try:
        content = image.entries_file.read_bytes()
    except OSError as error:
        raise _damaged(image.digest, f"the manifest cannot be read: {error.strerror}") from None
    if tree.digest_of(content) != image.digest:
        raise _damaged(image.digest, "the manifest was changed")
    return content


def _sample(image: Image) -> None:
    """The manifest whole; claude and some files by size, mode and time, small ones by content.

    Cheap enough for every start. `image verify` reads everything.
    """
    lines = tree.lines(_manifest(image))
    chosen = random.SystemRandom().sample(lines, min(_SAMPLE, len(lines)))
    chosen += [line for line in lines if line.startswith(f'["{tree.CLAUDE}",'.encode())]
    for line in chosen:
        entry = tree.read_line(line)
        reason = _looks_different(image.rootfs, entry)
        if reason:
            raise _damaged(image.digest, f"/{entry.path} {reason}")


def _looks_different(root: Path, entry: tree.Entry) -> str:
    try:
        status = (root / entry.path).lstat()
    except OSError:
        return "is missing"
    if entry.kind != "f":
        return _differs(root, entry)
    if not stat.S_ISREG(status.st_mode) or stat.S_IMODE(status.st_mode) != entry.mode:
        return "differs in mode"
    if status.st_size != entry.size or int(status.st_mtime) != tree.EPOCH:
        return "differs in size or time"
    return _differs(root, entry) if entry.size <= _SAMPLE_BYTES else ""


@contextmanager
def _locked(place: Path, how: int) -> Iterator[None]:
    try:
        descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise _unknown(place.name) from None
    try:
        fcntl.flock(descriptor, how)
        yield
    except BlockingIOError:
        raise UnavailableError(
            "image-in-use",
            f"sha256:{place.name[:12]}… is used by a sandbox, or is being removed",
            hint="try again when the sandboxes that use it have ended",
        ) from None
    finally:
        os.close(descriptor)


def _delete(place: Path) -> None:
    """Out of sight by one rename, then away: half a tree has no digest's name."""
    gone = place.with_name(f".gone-{place.name}-{os.getpid()}")
    with suppress(FileNotFoundError):
        place.rename(gone)
        shutil.rmtree(gone)


def _unknown(name: str) -> CallerError:
    option = "" if name == DEFAULT else f" --name {name}"
    return CallerError(
        "image-unknown", f"there is no image {name}", hint=f"ringfence image build{option}"
    )


def _damaged(digest: str, reason: str) -> UnavailableError:
    return UnavailableError(
        "image-damaged",
        f"image {digest[:19]}…: {reason}",
        hint="something wrote to the state directory; ringfence image build --rebuild",
    )
