"""Programs of the image itself, run in it: no network, no devices, nothing of the host.

The image's own Python installs wheels and compiles modules. Wheels are unpacked, none of their
code runs: there is no build, and the compiler starts with `-S`, which reads no `.pth` file.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ringfence.images.process import Tools

# mounts are private to this namespace and vanish with it, whatever ends it
_SCRIPT = """\
set -e
root=$1 given=$2; shift 2
mount -t tmpfs -o mode=755 none "$root/dev"
: > "$root/dev/null"; mount --bind /dev/null "$root/dev/null"
mount -t tmpfs -o mode=1777 none "$root/tmp"
mkdir "$root/tmp/given"; mount --bind "$given" "$root/tmp/given"
cd /
# an ordinary PATH has no sbin, where chroot is
PATH=$PATH:/usr/sbin:/sbin
exec chroot "$root" /usr/bin/env -i PATH=/usr/local/bin:/usr/bin:/usr/sbin HOME=/tmp \
  LC_ALL=C.UTF-8 PYTHONHASHSEED=0 SOURCE_DATE_EPOCH=946684800 "$@"
"""

GIVEN = "/tmp/given"  # noqa: S108  a mount point of the image


def command(root: Path, given: Path, program: Sequence[str]) -> list[str]:
    """Argv that runs `program` in the tree, with the directory `given` at `GIVEN`."""
    spaces = ["--mount", "--pid", "--fork", "--kill-child", "--net", "--ipc", "--uts"]
    if os.geteuid() != 0:
        spaces += ["--user", "--map-root-user"]
    script = ["--", "sh", "-c", _SCRIPT, "sh", str(root), str(given), *program]
    return ["unshare", *spaces, "--propagation", "private", *script]


def install_wheels(tools: Tools, root: Path, wheels: Path, pinned: Sequence[str]) -> None:
    """Unpack wheels with the image's own pip, and nothing that is not among them.

    Raises:
        UnavailableError: `image-build-failed`.
    """
    pip = ["python3", "-m", "pip", "install", "--no-index", "--find-links", GIVEN]
    pip += ["--no-deps", "--no-compile", "--no-cache-dir", "--no-input", "--quiet"]
    pip += ["--only-binary=:all:", "--break-system-packages", "--root-user-action=ignore"]
    pip += ["--disable-pip-version-check", "--no-warn-script-location", "--", *pinned]
    tools.run(command(root, wheels, pip))


def compile_modules(tools: Tools, root: Path, empty: Path) -> None:
    """Compile what is imported; a `.pyc` names its source by nothing, as the tree never changes.

    One process in a fixed order, without hash randomisation: the same bytes every time. A module
    that is a template or of another Python does not compile, which is no fault of the image.
    """
    places = [str(path) for path in _module_directories(root)]
    # -B and -f: what the compiler itself imports would else be kept as its import wrote it, by time
    compiler = ["python3", "-B", "-S", "-m", "compileall", "-f", "-q", "-q", "-j", "1"]
    compiler += ["--invalidation-mode", "unchecked-hash", "--", *places]
    tools.run(command(root, empty, compiler), accepted=frozenset({0, 1}))


def _module_directories(root: Path) -> list[Path]:
    found = [*root.glob("usr/lib/python3*"), *root.glob("usr/local/lib/python3*")]
    return sorted(Path("/") / path.relative_to(root) for path in found if path.is_dir())


def python_version(root: Path) -> str:
    """`3.11`, from where /usr/bin/python3 points; it is never started for that.

    Raises:
        OSError: when the image has no Python.
    """
    return (root / "usr/bin/python3").readlink().name.removeprefix("python")
