"""Wheels and Node packages, fetched by the host's own pip and npm: their index, certificates and
credentials are the host's business and never enter the image.
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ringfence.errors import UnavailableError
from ringfence.images.process import Tools, index_environment

_GLIBC_OLDEST = 5
"""Minor version of the glibc that the first manylinux tag means (PEP 600)."""


def platforms(machine: str, glibc_minor: int) -> list[str]:
    """Platform tags that a glibc 2.x can load, newest first (PEP 600 and its older names). PURE."""
    tags = [f"manylinux_2_{minor}_{machine}" for minor in range(glibc_minor, _GLIBC_OLDEST - 1, -1)]
    return [*tags, f"manylinux2014_{machine}", f"manylinux1_{machine}", f"linux_{machine}"]


def wheels(tools: Tools, packages: Sequence[str], root: Path, python: str, into: Path) -> list[str]:
    """Download wheels for the image's Python and all they need; `name==version` of each, sorted.

    Raises:
        UnavailableError: `image-tool-missing`, `image-build-failed`.
    """
    probe = subprocess.run(
        [sys.executable, "-m", "pip", "--version"], capture_output=True, check=False
    )
    if probe.returncode != 0:
        raise UnavailableError(
            "image-tool-missing",
            f"{sys.executable} has no pip to fetch wheels with",
            hint=f"{sys.executable} -m ensurepip, or take the pip packages out of the definition",
        )
    digits = python.replace(".", "")
    argv: list[str | Path] = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input"]
    argv += ["--dest", into, "--only-binary=:all:", "--implementation", "cp"]
    argv += ["--python-version", python, "--disable-pip-version-check"]
    for abi in (f"cp{digits}", "abi3", "none"):
        argv += ["--abi", abi]
    for tag in platforms(platform.machine(), glibc_minor(root)):
        argv += ["--platform", tag]
    tools.run([*argv, "--", *packages], environment=index_environment())
    return sorted(pin_of(path.name) for path in into.glob("*.whl"))


def pin_of(wheel: str) -> str:
    """`name==version` of a wheel's file name (PEP 427). PURE."""
    name, version, *_ = wheel.split("-")
    return f"{name.replace('_', '-').lower()}=={version}"


def glibc_minor(root: Path) -> int:
    """The x of the image's glibc 2.x, from its package's record.

    Raises:
        UnavailableError: `image-build-failed` when there is none.
    """
    status = (root / "var/lib/dpkg/status").read_text("utf-8", "replace")
    for stanza in status.split("\n\n"):
        if stanza.startswith("Package: libc6\n"):
            version = next(line for line in stanza.splitlines() if line.startswith("Version: "))
            return int(version.removeprefix("Version: ").split(".")[1].split("-")[0])
    raise UnavailableError("image-build-failed", "the image has no libc6")


def node_packages(tools: Tools, packages: Sequence[str], root: Path, work: Path) -> None:
    """Put Node packages below /usr/local; their scripts never run.

    Raises:
        UnavailableError: `image-tool-missing`, `image-build-failed`.
    """
    prefix = work / "node"
    argv: list[str | Path] = ["npm", "install", "--global", "--prefix", prefix, "--ignore-scripts"]
    argv += ["--no-audit", "--no-fund", "--no-update-notifier", "--loglevel", "error"]
    argv += ["--cache", work / "npm-cache", "--", *packages]
    tools.run(argv, environment=index_environment())
    for record in prefix.rglob(".package-lock.json"):
        record.unlink()  # it names the index it came from
    for part in ("lib/node_modules", "bin"):
        if (prefix / part).is_dir():
            shutil.copytree(
                prefix / part, root / "usr/local" / part, symlinks=True, dirs_exist_ok=True
            )
    for name in root.glob("usr/local/lib/node_modules/**/package.json"):
        _scrub(name)


def _scrub(manifest: Path) -> None:
    """Npm of old writes where a package came from into its package.json: keys that start with _."""
    try:
        value = json.loads(manifest.read_bytes())
    except ValueError:
        return
    if isinstance(value, dict) and any(key.startswith("_") for key in value):
        kept = {key: inner for key, inner in value.items() if not key.startswith("_")}
        manifest.write_text(json.dumps(kept, indent=2) + "\n", "utf-8")
