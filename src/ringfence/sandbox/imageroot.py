"""An image as the system of a sandbox: found, held against removal, verified, looked at.

What is trusted of an image is that its files are those of its digest. What they are is whatever
its packages brought: a link in it is never followed by us, because it would be followed on the
host, and each directory that is shown is one by the word of the manifest that was verified.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from ringfence.errors import AgentError, DeniedError, UnavailableError
from ringfence.images import store, tree
from ringfence.images.image import Image
from ringfence.images.whole import require_whole
from ringfence.sandbox.profile import SYSTEM, ImageRoot
from ringfence.sandbox.safeopen import open_within, read_regular

_OWN = frozenset(
    {"boot", "dev", "etc", "home", "mnt", "opt", "proc", "root", "run", "sys", "tmp", "workspace"}
)
"""Root-level names that a sandbox has of its own, or that hold nothing for an agent. /etc lies
below the one made for the sandbox, and of /opt all is shown but what is ringfence's."""
_RINGFENCE = "opt/ringfence"
_TRUST_STORE = "etc/ssl/certs/ca-certificates.crt"
_TRUST_STORE_BYTES = 16 << 20
_PARTS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldImage:
    """An image that nobody removes until it is released.

    Attributes:
        digest: which it is. root: what of it a sandbox is shown.
        trust_store: its CA certificates, PEM; empty when it has none.
    """

    digest: str
    root: ImageRoot
    trust_store: str
    holding: ExitStack

    def release(self) -> None:
        """Whoever removes it may now. Idempotent."""
        self.holding.close()


def digest_of(state_dir: Path, name: str) -> str:
    """What a name stands for now: a digest stands for itself, when it is there.

    Raises:
        CallerError: `image-unknown`.
        UnavailableError: `image-damaged`.
    """
    return store.ImageStore(state_dir).find(name).digest


def has_file(state_dir: Path, name: str, paths: Iterable[str]) -> bool:
    """Whether an image has a regular file at one of these absolute paths, without links.

    Raises:
        CallerError: `image-unknown`.
        UnavailableError: `image-damaged`.
    """
    with _opened(store.ImageStore(state_dir).find(name).rootfs) as top:
        return any(_is_file(top, path.lstrip("/")) for path in paths)


def hold(
    state_dir: Path, name: str, *, blocked: Iterable[str] = (), needed: Sequence[str] = ()
) -> HeldImage:
    """The image of a name or digest, verified whole.

    Args:
        state_dir: where it is looked for.
        name: of the image.
        blocked: absolute paths that are absent inside.
        needed: paths below its root of files without which no program can be started in it.

    Raises:
        CallerError: `image-unknown`.
        UnavailableError: `image-damaged`, `image-in-use` while it is being removed, `image-unfit`.
    """
    image = store.ImageStore(state_dir).find(name)
    with ExitStack() as stack:
        stack.enter_context(image.held())
        manifest = require_whole(image)
        with _opened(image.rootfs) as top:
            for path in needed:
                if not _is_file(top, path):
                    raise _unfit(name, f"/{path}")
            return HeldImage(
                digest=image.digest,
                root=_root(image, top, manifest, blocked),
                trust_store=_trust_store(top),
                holding=stack.pop_all(),
            )


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _unfit(name: str, path: str) -> UnavailableError:
    return UnavailableError(
        "image-unfit",
        f"image {name} has no {path}",
        hint="build it from a definition that has the package: ringfence image build mine.yaml",
    )


def _root(image: Image, top: int, manifest: bytes, blocked: Iterable[str]) -> ImageRoot:
    found = (_inside(image.rootfs, top, path) for path in blocked)
    covered = dict(one for one in found if one is not None)
    kinds = {entry.path: entry for entry in _shallow(manifest)}
    for path in ("etc", "usr"):
        # what is mounted is resolved on the host, where a link leads to the host's own
        if path not in kinds or kinds[path].kind != "d":
            raise _unfit(image.digest, f"directory /{path}")
    directories = tuple(
        path
        for path, entry in kinds.items()
        if entry.kind == "d"
        and path.rpartition("/")[0] in {"", "opt"}
        and path not in {*_OWN, _RINGFENCE}
        and not any(_below(f"/{path}", one) for one in covered)
    )
    shown = [f"/{one}" for one in (*directories, "etc")]
    return ImageRoot(
        path=str(image.rootfs),
        directories=directories,
        links={name: kinds[name].content for name in SYSTEM if _links(kinds.get(name))},
        covered={
            path: directory
            for path, directory in covered.items()
            if any(_below(path, one) and path != one for one in shown)
        },
    )


def _links(entry: tree.Entry | None) -> bool:
    return entry is not None and entry.kind == "l"


def _shallow(manifest: bytes) -> Iterator[tree.Entry]:
    """Entries of the two uppermost levels; a manifest has tens of thousands of others."""
    for line in tree.lines(manifest):
        if line.partition(b'",')[0].count(b"/") < _PARTS:
            yield tree.read_line(line)


def _below(path: str, parent: str) -> bool:
    return path == parent or path.startswith(parent.rstrip("/") + "/")


def _inside(rootfs: Path, top: int, path: str) -> tuple[str, bool] | None:
    """What a path is inside, without links, and whether a directory; None when it is not there, or
    shut anyway.
    """
    try:
        handle = open_within(top, path, os.O_PATH)
    except OSError:
        return None
    try:
        real, mode = os.readlink(f"/proc/self/fd/{handle}"), os.fstat(handle).st_mode
    finally:
        os.close(handle)
    if os.geteuid() == 0 and not mode & stat.S_IRWXO:
        return None  # root's alone: no sandbox is root, and gVisor could not mount a cover on it
    below = os.path.relpath(real, os.path.realpath(rootfs))
    return ("/" if below == "." else f"/{below}"), stat.S_ISDIR(mode)


def _is_file(top: int, path: str) -> bool:
    try:
        handle = open_within(top, path, os.O_PATH)
    except OSError:
        return False
    try:
        return stat.S_ISREG(os.fstat(handle).st_mode)
    finally:
        os.close(handle)


def _trust_store(top: int) -> str:
    try:
        content, _ = read_regular(top, _TRUST_STORE, _TRUST_STORE_BYTES)
    except (OSError, DeniedError, AgentError):
        return ""
    return content.decode("utf-8", "replace")
