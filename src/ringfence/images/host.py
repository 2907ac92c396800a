"""The base of an image from packages that are installed on this host: no mirror, no network.

Files of packages only, by dpkg's own lists. What lies in /etc goes in when it is byte for byte what
the package shipped: a file that this host's people changed may hold what is theirs alone. Copies,
not hard links: a link's mode and time are the host file's own.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ringfence.errors import CallerError, UnavailableError
from ringfence.images.process import require_tool

_BUILT = ("/usr/", "/bin/", "/sbin/", "/lib/", "/lib32/", "/lib64/", "/libx32/")
_LEFT_OUT = ("/usr/share/man/", "/usr/share/info/", "/usr/share/locale/", "/usr/local/")
_STATUS = Path("/var/lib/dpkg/status")
_BUNDLE = "etc/ssl/certs/ca-certificates.crt"


@dataclass(frozen=True, kw_only=True, slots=True)
class Installed:
    """One stanza of dpkg's status file.

    Attributes:
        needs: alternatives of each dependency, by package name.
        provides: virtual packages.
        conffiles: absolute path to MD5 as shipped.
    """

    name: str
    architecture: str
    essential: bool
    needs: tuple[tuple[str, ...], ...]
    provides: tuple[str, ...]
    conffiles: Mapping[str, str]
    stanza: str


def read_status(text: str) -> dict[str, Installed]:
    """Installed packages by name; of several architectures the first. PURE."""
    found: dict[str, Installed] = {}
    for stanza in text.split("\n\n"):
        fields = _fields(stanza)
        if fields.get("Status", "").endswith(" ok installed"):
            package = _package(fields, stanza)
            found.setdefault(package.name, package)
    return found


def _fields(stanza: str) -> dict[str, str]:
    fields: dict[str, str] = {}
    name = ""
    for line in stanza.splitlines():
        if line[:1].isspace():
            fields[name] = fields.get(name, "") + "\n" + line.strip()
        else:
            name, _, value = line.partition(":")
            fields[name] = value.strip()
    return fields


def _package(fields: Mapping[str, str], stanza: str) -> Installed:
    needs = ",".join(filter(None, (fields.get("Pre-Depends"), fields.get("Depends"))))
    conffiles = (line.split() for line in fields.get("Conffiles", "").split("\n") if line)
    return Installed(
        name=fields["Package"],
        architecture=fields.get("Architecture", ""),
        essential=fields.get("Essential") == "yes",
        needs=tuple(
            tuple(_names(each, "|")) for each in needs.replace("\n", " ").split(",") if each.strip()
        ),
        provides=tuple(_names(fields.get("Provides", ""), ",")),
        conffiles={words[0]: words[1] for words in conffiles if len(words) == 2},
        stanza=stanza.strip("\n"),
    )


def _names(text: str, separator: str) -> Iterator[str]:
    for part in text.split(separator):
        match = re.match(r"\s*([a-z0-9][a-z0-9+.-]*)", part)
        if match:
            yield match[1]


def closure(installed: Mapping[str, Installed], wanted: Iterable[str]) -> list[Installed]:
    """The wanted packages, the essential ones, and all that these depend on; by name. PURE.

    Raises:
        CallerError: `image-invalid` with every wanted package that is not installed.
    """
    wanted = sorted(set(wanted))
    missing = [name for name in wanted if name not in installed]
    if missing:
        raise CallerError(
            "image-invalid",
            f"not installed on this host: {', '.join(missing)}",
            hint=f"apt-get install {' '.join(missing)}, or build without --from-host",
        )
    virtual = {name: each.name for each in installed.values() for name in each.provides}
    pending = [*wanted, *(each.name for each in installed.values() if each.essential)]
    chosen: dict[str, Installed] = {}
    while pending:
        name = pending.pop()
        if name in chosen:
            continue
        chosen[name] = installed[name]
        for alternatives in installed[name].needs:
            real = [each if each in installed else virtual.get(each) for each in alternatives]
            # dpkg saw to it that one of them is there
            pending += [each for each in real if each is not None][:1]
    return [chosen[name] for name in sorted(chosen)]


def fingerprint(packages: Iterable[str]) -> str:
    """Hex digest of dpkg's records of what `make_base` copies: an upgrade of the host changes it.

    Raises as `make_base` does.
    """
    require_tool("dpkg-query")
    chosen = closure(read_status(_STATUS.read_text("utf-8", "replace")), packages)
    return hashlib.sha256("\0".join(each.stanza for each in chosen).encode()).hexdigest()


def make_base(root: Path, packages: Iterable[str]) -> None:
    """Fill the empty directory `root`.

    Raises:
        CallerError: `image-invalid` for packages that are not installed.
        UnavailableError: `image-tool-missing` on a host without dpkg.
    """
    require_tool("dpkg-query")
    chosen = closure(read_status(_STATUS.read_text("utf-8", "replace")), packages)
    for link in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
        _copy(root, f"/{link}", Path("/") / link)
    for package in chosen:
        for path in _files_of(package):
            _place(root, path, package)
    _accounts(root)
    _alternatives(root)
    _certificates(root)
    (root / "var/lib/dpkg").mkdir(parents=True, exist_ok=True)
    (root / "var/lib/dpkg/status").write_text(
        "".join(each.stanza + "\n\n" for each in chosen), "utf-8"
    )


def _files_of(package: Installed) -> list[str]:
    name = package.name
    name += "" if package.architecture == "all" else f":{package.architecture}"
    done = subprocess.run(
        [require_tool("dpkg-query"), "-L", name], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise UnavailableError("image-build-failed", f"dpkg-query -L {name}: {done.stderr[:200]}")
    # "diverted by" lines stand between; a diverted file lies elsewhere and is another package's
    return sorted(line for line in done.stdout.splitlines() if line.startswith("/"))


def _place(root: Path, path: str, package: Installed) -> None:
    source = Path(path)
    if path.startswith("/etc/"):
        folder = source.is_dir() and not source.is_symlink()
        if folder or _as_shipped(source, package.conffiles.get(path)):
            _copy(root, path, source)
    elif path.startswith(_BUILT) and not path.startswith(_LEFT_OUT) and not _is_doc(path):
        # dpkg knows /bin/x where the host merged it into /usr/bin
        _copy(root, os.path.realpath(source.parent) + "/" + source.name, source)


def _is_doc(path: str) -> bool:
    return path.startswith("/usr/share/doc/") and not path.endswith("/copyright")


def _as_shipped(path: Path, md5: str | None) -> bool:
    try:
        if path.is_symlink():
            return md5 is None
        return (
            md5 is not None
            and hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() == md5
        )
    except OSError:
        return False


def _copy(root: Path, name: str, source: Path) -> None:
    target = root / name.lstrip("/")
    try:
        status = source.lstat()
    except FileNotFoundError:
        return  # excluded by the host's own dpkg settings, as documentation often is
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        return  # two packages may list one directory link
    if stat.S_ISDIR(status.st_mode):
        target.mkdir(exist_ok=True)
        target.chmod(stat.S_IMODE(status.st_mode) & 0o755 | 0o700)
    elif stat.S_ISLNK(status.st_mode):
        target.symlink_to(source.readlink())
    elif stat.S_ISREG(status.st_mode) and os.access(source, os.R_OK):
        shutil.copyfile(source, target)
        target.chmod(stat.S_IMODE(status.st_mode))


def _accounts(root: Path) -> None:
    """The distribution's own accounts, never this host's."""
    (root / "etc").mkdir(exist_ok=True)
    for name in ("passwd", "group"):
        master = Path(f"/usr/share/base-passwd/{name}.master")
        lines = master.read_text("utf-8") if master.exists() else ""
        (root / "etc" / name).write_text(lines, "utf-8")
    nsswitch = Path("/usr/share/libc-bin/nsswitch.conf")
    if nsswitch.exists():
        shutil.copyfile(nsswitch, root / "etc/nsswitch.conf")


def _alternatives(root: Path) -> None:
    """Links of /etc/alternatives whose program is in the image."""
    place = root / "etc/alternatives"
    place.mkdir(exist_ok=True)
    for link in sorted(Path("/etc/alternatives").glob("*")):
        if link.is_symlink() and os.path.lexists(root / str(link.readlink()).lstrip("/")):
            (place / link.name).symlink_to(link.readlink())


def _certificates(root: Path) -> None:
    """The distribution's authorities, without those that this host's people added."""
    given = sorted((root / "usr/share/ca-certificates").rglob("*.crt"))
    bundle = root / _BUNDLE
    bundle.parent.mkdir(parents=True, exist_ok=True)
    bundle.write_bytes(b"".join(path.read_bytes() for path in given))


def read_status_versions(text: str) -> Iterator[tuple[str, str]]:
    """Name and version of each installed package of a status file. PURE."""
    for stanza in text.split("\n\n"):
        fields = _fields(stanza)
        if fields.get("Status", "").endswith(" ok installed"):
            yield fields["Package"], fields["Version"]
