"""Which isolation technologies the tests can use on this machine, and why not the others.

    pytestmark = needs("gvisor")          # skips a module, a class or a test, with the reason
    if reason := available("container"): pytest.skip(reason)

What a skipped backend lacks stands in the summary at the end of the run. `make test-hosts` gets it.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from ringfence.config import Config, load_config
from ringfence.errors import RingfenceError
from ringfence.policy.compiled import SandboxProfile
from ringfence.wiring import backends

NAMES = ("bubblewrap", "runtime", "container", "gvisor", "microvm")


def cache_dir() -> Path:
    """Where `tools/test-hosts` keeps what is neither a package of Debian nor in the environment;
    images and snapshots that tests share can lie there too.
    """
    home = Path.home() / ".cache"
    default = Path("/var/cache") if os.geteuid() == 0 else home
    return Path(os.environ.get("RINGFENCE_TEST_CACHE") or default / "ringfence-tests")


CACHE = cache_dir()


def machines() -> Path | None:
    """Where saved machines are shared: one takes as long to make as three tests of it."""
    return CACHE / f"machines-{os.geteuid()}" if os.access(CACHE, os.W_OK) else None


def config(state_dir: Path) -> Config:
    """Settings under which everything that `tools/test-hosts` installed is found."""
    return load_config(settings(state_dir), settings_file=Path("/nonexistent"))


def settings(state_dir: Path) -> dict[str, str]:
    """The same as an environment for a `ringfence` process."""
    found = {"RINGFENCE_STATE_DIR": str(state_dir)}
    if place := machines():
        found["RINGFENCE_MACHINES"] = str(place)
    if (CACHE / "runtime" / "node_modules").is_dir():
        found["RINGFENCE_RUNTIME"] = str(CACHE / "runtime")
    return found


@functools.cache
def available(name: str) -> str:
    """Empty when this machine can start a sandbox with a technology; else what is missing."""
    with tempfile.TemporaryDirectory() as place:
        state = Path(place) / "state"
        state.mkdir(mode=0o700)
        known = backends(config(state))
        if name not in known.names:
            return "not part of this version"
        try:
            known.get(name).probe(SandboxProfile(emulation=True))
        except RingfenceError as error:
            return f"{error.message}: {error.hint}" if error.hint else error.message
    return ""


def needs(name: str) -> pytest.MarkDecorator:
    """A mark that skips when a technology is missing, and counts the tests that ran with it.

    Decided when the tests run, not when they are collected: a probe may start a machine.
    """
    return pytest.mark.needs(name)


def summary(ran: dict[str, int], skipped: dict[str, int], probe: Callable[[str], str]) -> list[str]:
    """A line for every technology that tests were collected for."""
    lines = []
    for name in NAMES:
        if not ran.get(name) and not skipped.get(name):
            lines.append(f"{name:<11} no tests were selected")
        elif reason := probe(name):
            lines.append(f"{name:<11} SKIPPED ({skipped.get(name, 0)} tests): {reason}")
        else:
            lines.append(f"{name:<11} ran ({ran.get(name, 0)} tests)")
    return lines


def reasons(skipped: Iterable[str]) -> list[str]:
    """A line for every reason that tests were skipped for, the most frequent first."""
    counts = Counter(one.removeprefix("Skipped: ") for one in skipped)
    return [f"{count:>5}  {reason}" for reason, count in counts.most_common()]
