"""Definition → image: base, packages, compile, settle, hash, and one rename. The acts in order.

Everything is made in one directory that is no image's, and a scratch directory for programs of
other ids; both go away with any end of a build. What a build that was killed left behind, the next
one takes away, as it holds the lock.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ringfence.errors import UnavailableError
from ringfence.images import debian, fetch, host, inside, layout, tree
from ringfence.images.contents import packages_in
from ringfence.images.definition import ImageDefinition, key_of
from ringfence.images.image import Image
from ringfence.images.process import Tools, find_tool
from ringfence.images.store import ImageStore, check_name

_PREFIX = "building-"
_SCRATCH_PREFIX = "ringfence-image-"


@dataclass(frozen=True, kw_only=True, slots=True)
class Built:
    """A build's end; `cached` when nothing had to be done."""

    image: Image
    cached: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Watcher:
    """Who is told: of each step, and of each line a program says within it."""

    step: Callable[[str], None]
    line: Callable[[str], None]


def build(
    state_dir: Path,
    definition: ImageDefinition,
    *,
    name: str,
    claude: Path,
    watcher: Watcher,
    rebuild: bool = False,
) -> Built:
    """Build, unless these inputs were built already, and give the image its name.

    Raises:
        CallerError: `image-invalid`, `image-unknown` for a bad name.
        UnavailableError: `image-tool-missing`, `image-build-failed`.
    """
    store = ImageStore(state_dir)
    check_name(name)
    suite = definition.suite or debian.host_suite()
    key = key_of(
        definition,
        suite=suite,
        architecture=debian.architecture(),
        claude=tree.file_digest(claude.resolve()) if definition.claude else "",
        installed=host.fingerprint(definition.apt_names()) if definition.source == "host" else "",
    )
    with _only_builder(store.root, watcher):
        _clear_left_overs(store.root)
        found = None if rebuild else store.by_key(key)
        if found is None:
            image = _build(store, definition, suite, claude, watcher)
            store.set_key(key, image.digest)
        else:
            image = found
        store.set_name(name, image.digest)
    return Built(image=image, cached=found is not None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Collected:
    """Digests of images without a name: those that are gone, and those that a sandbox uses."""

    removed: list[str]
    in_use: list[str]


def collect(state_dir: Path, watcher: Watcher) -> Collected:
    """Delete every image without a name that nobody uses. No build runs meanwhile: what it made
    has no name for a moment.
    """
    store = ImageStore(state_dir)
    gone = Collected(removed=[], in_use=[])
    with _only_builder(store.root, watcher):
        _clear_left_overs(store.root)
        for digest in store.nameless():
            try:
                store.remove(digest)
                gone.removed.append(digest)
            except UnavailableError as error:
                if error.code != "image-in-use":
                    raise
                gone.in_use.append(digest)
        store.forget_keys()
    return gone


def _build(
    store: ImageStore, definition: ImageDefinition, suite: str, claude: Path, watcher: Watcher
) -> Image:
    with _workplace(store.root) as (place, scratch):
        root, work = place / "image" / "rootfs", place / "work"
        for each in (root / "dev", root / "tmp"):  # mount points of what runs inside
            each.mkdir(parents=True)
        work.mkdir()
        log = store.root / "last-build.log"
        log.write_bytes(b"")
        tools = Tools(log=log, scratch=scratch, progress=watcher.line)
        _fill(tools, definition, suite, root, work, watcher)
        watcher.step("settle: users, times, claude" if definition.claude else "settle")
        layout.settle(root, claude=claude.resolve() if definition.claude else None)
        watcher.step("hash every file")
        manifest = tree.render(tree.scan(root))
        digest = tree.digest_of(manifest)
        (place / "image" / "tree").write_bytes(manifest)
        facts = _facts(definition, suite, root)
        (place / "image" / "image.json").write_text(json.dumps(facts, indent=1) + "\n", "utf-8")
        return store.keep(place / "image", digest)


def _fill(
    tools: Tools, definition: ImageDefinition, suite: str, root: Path, work: Path, watcher: Watcher
) -> None:
    names = definition.apt_names()
    if definition.source == "host":
        watcher.step(f"base from this host: {len(names)} packages and what they need")
        host.make_base(root, names)
        tools.run(inside.command(root, work, ["ldconfig"]))
    else:
        watcher.step(f"base from Debian {suite}: {len(names)} packages and what they need")
        debian.make_base(tools, root, suite, names, work)
    if definition.packages.pip:
        watcher.step(f"wheels: {', '.join(definition.packages.pip)}")
        wheels = work / "wheels"
        wheels.mkdir()
        python = inside.python_version(root)
        pinned = fetch.wheels(tools, definition.packages.pip, root, python, wheels)
        inside.install_wheels(tools, root, wheels, pinned)
    if definition.packages.npm:
        watcher.step(f"node packages: {', '.join(definition.packages.npm)}")
        fetch.node_packages(tools, definition.packages.npm, root, work)
    watcher.step("compile modules")
    layout.drop_compiled(root)
    empty = work / "empty"
    empty.mkdir()
    inside.compile_modules(tools, root, empty)


def _facts(definition: ImageDefinition, suite: str, root: Path) -> dict[str, object]:
    """image.json: what a person or a bill of materials wants to know."""
    return {
        "format": 1,
        "definition": definition.model_dump(mode="json"),
        "suite": suite,
        "distribution": _distribution(root),
        "architecture": debian.architecture(),
        "built_by": "root" if os.geteuid() == 0 else "user",
        "packages": packages_in(root),
    }


def _distribution(root: Path) -> str:
    """ID of the image's os-release, such as debian; where its packages have their names from."""
    try:
        lines = (root / "usr/lib/os-release").read_text("utf-8").splitlines()
    except OSError:
        return "debian"
    return next((line[3:].strip('"') for line in lines if line.startswith("ID=")), "debian")


@contextmanager
def _only_builder(root: Path, watcher: Watcher) -> Iterator[None]:
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (root / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            watcher.step("another build is under way: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _workplace(root: Path) -> Iterator[tuple[Path, Path]]:
    """The directory of a build below the store, and the scratch directory of its programs.

    The scratch directory is in TMPDIR: the ids that a package's scripts run under cannot pass
    through the store, which is the state directory's and 0700.
    """
    place = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=root))
    scratch = Path(tempfile.mkdtemp(prefix=_SCRATCH_PREFIX))
    scratch.chmod(0o711)
    try:
        (place / "scratch").write_text(str(scratch), "utf-8")
        yield place, scratch
    finally:
        _clear(place)


def _clear_left_overs(root: Path) -> None:
    for place in root.glob(_PREFIX + "*"):
        _clear(place)
    for gone in (root / "trees").glob(".gone-*"):
        shutil.rmtree(gone, ignore_errors=True)


def _clear(place: Path) -> None:
    """Remove a build's directory and its scratch directory, the latter by its own name alone."""
    with suppress(OSError):
        scratch = Path((place / "scratch").read_text("utf-8"))
        if scratch.name.startswith(_SCRATCH_PREFIX) and scratch.stat().st_uid == os.geteuid():
            _remove_foreign(scratch)
    shutil.rmtree(place, ignore_errors=True)
    if place.exists():
        raise UnavailableError("image-build-failed", f"{place} cannot be removed")


def _remove_foreign(scratch: Path) -> None:
    """What a killed mmdebstrap left belongs to ids of /etc/subuid; its own helper has them."""
    shutil.rmtree(scratch, ignore_errors=True)
    program = find_tool("mmdebstrap")
    if scratch.exists() and program is not None:
        helper = [program, "--unshare-helper", "rm", "-rf", str(scratch)]
        subprocess.run(helper, check=False, capture_output=True, timeout=120)
        shutil.rmtree(scratch, ignore_errors=True)
