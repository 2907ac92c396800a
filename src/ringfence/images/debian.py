"""The base of an image from the Debian mirrors that this host itself uses, by mmdebstrap."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable
from pathlib import Path

from ringfence.errors import CallerError, UnavailableError
from ringfence.images.process import Tools, require_tool

_ORIGINS = frozenset({"Debian", "Ubuntu"})
_FIELDS = "$(ORIGIN)|$(RELEASE)|$(CODENAME)|$(COMPONENT)|$(REPO_URI)"

# of the host's apt configuration, what its mirrors cannot be reached without
_APT_OPTIONS = (
    "Acquire::http::Proxy",
    "Acquire::https::Proxy",
    "Acquire::https::CaInfo",
    "Acquire::Check-Valid-Until",
    "Acquire::Check-Date",
)

_LEFT_OUT = (
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",  # licences ask to be passed on
    "path-exclude=/usr/share/man/*",
    "path-exclude=/usr/share/info/*",
    "path-exclude=/usr/share/locale/*",
)


def host_suite(os_release: Path = Path("/etc/os-release")) -> str:
    """Code name of the host's own release.

    Raises:
        CallerError: `image-invalid` when it has none.
    """
    try:
        lines = os_release.read_text("utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition("=")
        if key == "VERSION_CODENAME" and value.strip('"'):
            return value.strip('"')
    raise CallerError(
        "image-invalid",
        "this host names no release of its own, so that the suite is unknown",
        hint="write suite: trixie, or another, in the definition",
    )


def sources(suite: str, targets: Iterable[str]) -> list[str]:
    """One-line sources of a suite, from the lines that `apt-get indextargets` writes. PURE.

    Only archives whose signed Release file says that they are the distribution's: a third party's
    repository may call its suite by the same name.

    Raises:
        CallerError: `image-invalid` when apt knows no mirror of that suite.
    """
    wanted = {suite, f"{suite}-updates", f"{suite}-security"}
    found: dict[tuple[str, str], set[str]] = {}
    known: set[str] = set()
    for line in targets:
        origin, release, codename, component, uri = (*line.strip().split("|", 4), "", "", "", "")[
            :5
        ]
        if origin not in _ORIGINS:
            continue
        known.add(codename)
        if release in wanted or codename in wanted:
            found.setdefault((uri, release), set()).add(component)
    if not any(
        release == suite or not release.endswith(("-updates", "-security")) for _, release in found
    ):
        names = ", ".join(sorted(name for name in known if "-" not in name)) or "none"
        raise CallerError(
            "image-invalid",
            f"apt of this host has no Debian mirror of {suite}; it has: {names}",
            hint="add it to the sources of the host and run apt-get update, or take another suite",
        )
    return [
        f"deb {uri} {release} {' '.join(sorted(components))}"
        for (uri, release), components in sorted(found.items())
    ]


def host_sources(suite: str) -> list[str]:
    """`sources` of this host's apt, which reads its own files best. Raises as `sources` does."""
    return sources(
        suite, _ask("apt-get", "indextargets", "--format", _FIELDS, "Created-By: Packages")
    )


def apt_options() -> list[str]:
    """The host's own settings for reaching its mirrors, as apt.conf lines."""
    lines = _ask("apt-config", "dump", *_APT_OPTIONS)
    return [line for line in lines if line.split(" ", 1)[0] in _APT_OPTIONS and '""' not in line]


def architecture() -> str:
    """Dpkg's name of this host's architecture, such as amd64."""
    return _ask("dpkg", "--print-architecture")[0]


def _ask(program: str, *arguments: str) -> list[str]:
    done = subprocess.run(
        [require_tool(program), *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise UnavailableError(
            "image-build-failed", f"{program} ended with {done.returncode}: {done.stderr[:200]}"
        )
    return done.stdout.splitlines()


def command(suite: str, packages: Iterable[str], *, tar: Path, sources_file: Path) -> list[str]:
    """Argv of mmdebstrap. As root it mounts in a namespace of its own; anyone else's run is a
    user namespace with the ids of /etc/subuid, where packages' scripts hold no right of the host.
    """
    # namespaces as root: a kill leaves no process, and no mount on the host that clearing would
    # walk into
    apart = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    apart += ["--propagation", "private", "--"]
    options = ['Apt::Install-Recommends "false"', *apt_options()]
    return [
        *(apart if os.geteuid() == 0 else []),
        "mmdebstrap",
        f"--mode={'root' if os.geteuid() == 0 else 'unshare'}",
        "--variant=essential",
        "--format=tar",
        "--skip=output/dev",  # devices are the backend's; no image carries one
        f"--include={','.join(packages)}",
        *(f"--aptopt={line}" for line in options),
        *(f"--dpkgopt={line}" for line in _LEFT_OUT),
        suite,
        str(tar),
        str(sources_file),
    ]


def make_base(tools: Tools, root: Path, suite: str, packages: list[str], work: Path) -> None:
    """Fill the empty directory `root`.

    Raises:
        UnavailableError: `image-tool-missing`, `image-build-failed`.
        CallerError: `image-invalid` for a suite without a mirror.
    """
    require_tool("mmdebstrap")
    if os.geteuid() != 0:
        require_tool("newuidmap")
    sources_file = tools.scratch / "sources.list"
    sources_file.write_text("\n".join(host_sources(suite)) + "\n", "utf-8")
    tar = work / "base.tar"
    tools.run(command(suite, packages, tar=tar, sources_file=sources_file), cleans_up=True)
    unpack(tools, tar, root)
    tar.unlink()


def unpack(tools: Tools, tar: Path, root: Path) -> None:
    """A tree owned by us: owners, set-id bits and capabilities of the tar are not taken over."""
    tools.run(
        ["tar", "-C", root, "-xf", tar, "--no-same-owner", "--no-xattrs", "--exclude=./dev/*"]
    )
