"""What every test needs: a scrubbed environment, and the marks that say who may run it."""

from __future__ import annotations

import os
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

pytest.register_assert_rewrite("ringfence.testing")
# `from backends import needs`, whatever folder a test lies in
sys.path.insert(0, str(Path(__file__).parent))
pytest_plugins = ["again", "bounds", "order"]

# a shell has Ctrl-C ignored by what it starts in the background (POSIX, `&`), and what the tests
# start would inherit that
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# no example database: the checkout may belong to another user than the one who runs the tests
# a machine under load draws inputs slowly (the first draw builds a table of all characters): that
# says nothing about the code
settings.register_profile(
    "ringfence",
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("ringfence")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    is_root = os.geteuid() == 0
    for item in items:
        if item.get_closest_marker("root") and not is_root:
            item.add_marker(pytest.mark.skip(reason="needs euid 0"))
        if item.get_closest_marker("user") and is_root:
            item.add_marker(pytest.mark.skip(reason="needs an ordinary user"))
        for name in _needed(item):
            item.user_properties.append(("isolation", name))


def _needed(item: pytest.Item) -> list[str]:
    return [name for mark in item.iter_markers("needs") for name in mark.args]


def pytest_runtest_setup(item: pytest.Item) -> None:
    from backends import available

    for name in _needed(item):
        if reason := available(name):
            pytest.skip(f"isolation {name}: {reason}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Each isolation technology as run or skipped, and every reason that a test was skipped for:
    what did not run must not go unseen in CI.
    """
    from backends import available, reasons, summary

    counts = {outcome: Counter[str]() for outcome in ("ran", "skipped")}
    for outcome, key in (
        ("passed", "ran"),
        ("failed", "ran"),
        ("xfailed", "ran"),
        ("skipped", "skipped"),
    ):
        for report in terminalreporter.getreports(outcome):
            counts[key].update(v for k, v in report.user_properties if k == "isolation")
    if any(counts.values()):
        terminalreporter.section("isolation")
        for line in summary(counts["ran"], counts["skipped"], available):
            terminalreporter.write_line(line)
    if skipped := terminalreporter.getreports("skipped"):
        terminalreporter.section("skipped, and why")
        for line in reasons(str(report.longrepr[2]) for report in skipped):
            terminalreporter.write_line(line)


@pytest.fixture(autouse=True)
def _scrubbed_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A developer's own key or settings must neither reach a test nor decide its outcome."""
    for name in list(os.environ):
        if name.startswith(("RINGFENCE_", "ANTHROPIC_", "CLAUDE_", "AWS_", "OTEL_")):
            monkeypatch.delenv(name)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Any]:
    """A PostgreSQL of this process; made by the first test that wants it, in about a second."""
    from postgres import missing, postgres

    if reason := missing():
        pytest.skip(reason)
    with postgres() as server:
        yield server


@pytest.fixture(scope="session")
def openbao_server() -> Iterator[Any]:
    """An OpenBao of this process; made by the first test that wants it."""
    from openbao import missing, openbao

    if reason := missing():
        pytest.skip(reason)
    with openbao() as server:
        yield server


@pytest.fixture(scope="session")
def temporal_server() -> Iterator[str]:
    """Address of a Temporal of this process; made by the first test that wants it."""
    from temporal import missing, temporal

    if reason := missing():
        pytest.skip(reason)
    with temporal() as address:
        yield address


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A new, empty database of either kind, for one file of tests."""
    from gateway_rig import postgres_place, sqlite_place

    if request.param == "sqlite":
        return sqlite_place(tmp_path_factory.mktemp("platform"))
    return postgres_place(request.getfixturevalue("postgres_server"))
