"""A second look at a few failures, for a run of thousands of tests on a busy machine.

With `--second-look N`: when at most N tests have failed, each is run again, alone, `LOOKS` times.
If all of that passes the run passes, and the summary names those tests as unsteady, so that they
are mended and not forgotten. Never for what shows containment: a probe that got out once, got out.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

LOOKS = 3
SECONDS = 500
"""For all the looks together: less than a controller may take for its end (`bounds`)."""
NEVER = ("tests/attack/",)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--second-look",
        type=int,
        default=0,
        metavar="N",
        help=f"Pass if at most N tests failed and each passes alone {LOOKS} times; they are named.",
    )


def pytest_configure(config: pytest.Config) -> None:
    if (most := config.getoption("--second-look")) and not hasattr(config, "workerinput"):
        config.pluginmanager.register(SecondLook(most))


def worth(failed: Iterable[str], most: int) -> list[str]:
    """The tests to look at again: none if there are too many, or one for which once is enough."""
    names = sorted(set(failed))
    if len(names) > most or any(name.startswith(NEVER) for name in names):
        return []
    return names


class SecondLook:
    def __init__(self, most: int) -> None:
        self._most = most
        self._failed: list[str] = []
        self._is_whole = True
        self._unsteady: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._failed.append(report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be read has tests that nobody counts: beside xdist the others run."""
        self._is_whole = self._is_whole and not report.failed

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if session.exitstatus != pytest.ExitCode.TESTS_FAILED or not self._is_whole:
            return
        names = worth(self._failed, self._most)
        if names and _all_pass(names, session.config.rootpath):
            self._unsteady = names
            session.exitstatus = pytest.ExitCode.OK

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self._unsteady:
            terminalreporter.section("unsteady")
            for name in self._unsteady:
                terminalreporter.write_line(f"{name} failed, and passed {LOOKS} times alone")


def _all_pass(names: list[str], root: Path) -> bool:
    until = time.monotonic() + SECONDS
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    env["PYTEST_ADDOPTS"] = "-p no:xdist"
    with tempfile.TemporaryDirectory() as place:
        counts = Path(place, "counts.xml")
        command = [sys.executable, "-m", "pytest", f"--junitxml={counts}", *names]
        for _ in range(LOOKS):
            left = until - time.monotonic()
            try:
                done = subprocess.run(command, cwd=root, env=env, timeout=left, check=False)
            except subprocess.TimeoutExpired:
                return False
            if done.returncode != 0 or _skipped(counts):
                return False
    return True


def _skipped(counts: Path) -> int:
    """What is skipped alone has shown nothing."""
    suite = ET.parse(counts).getroot().find("testsuite")
    return 1 if suite is None else int(suite.get("skipped", "1"))
