"""A test that hangs ends, and is named: in its body, in its fixtures' teardown, and at the end.

pytest-timeout raises in a test that is out of time, and lets it go on from there: any failure takes
its alarm away, so a teardown that then waits for ever is bounded by nothing. Here the alarm is set
again for the teardown. Behind every alarm stands faulthandler's watchdog, a thread without Python
that needs neither the interpreter's lock nor the test's consent: it writes the stacks of all
threads to the log and ends the process. Under xdist that is a crash of the test by its name, and
another worker goes on with the rest.

pytest's own `faulthandler_exit_on_timeout` ends with the first failure of a test, as the alarm does.

The controller of the workers hangs when nobody reads what it writes: that is bounded too.
"""

from __future__ import annotations

import faulthandler
import os
import select
from collections.abc import Generator
from typing import Any

import pytest
from pytest_timeout import is_debugging

TEARDOWN = 180
"""Seconds in which the fixtures of a test end; those of a module or a session with its last."""
GRACE = 60
"""Seconds in which a test gets out of what the alarm raised in it, or the process is ended."""
OUTPUT = 600
"""Seconds in which somebody reads the output of a run whose pipe or terminal is full."""
_SETTINGS = pytest.StashKey[Any]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini("timeout_teardown", "Seconds for a test's teardown.", default=str(TEARDOWN))
    parser.addini("timeout_grace", "Seconds from a timeout to the end.", default=str(GRACE))
    parser.addini("timeout_output", "Seconds for writing a line of output.", default=str(OUTPUT))


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Bounds(config))


class Bounds:
    """The hooks, for one process: one without xdist, its controller, or a worker."""

    def __init__(self, config: pytest.Config) -> None:
        self._teardown = float(config.getini("timeout_teardown"))
        self._grace = float(config.getini("timeout_grace"))
        self._output = float(config.getini("timeout_output"))
        self._is_worker = hasattr(config, "workerinput")
        self._is_controller = self._is_set = False
        self._log, self._out = _unblocked(2), os.dup(1)
        self._lost: list[str] = []

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self._is_controller = session.config.pluginmanager.hasplugin("dsession")

    def _end_after(self, seconds: float) -> None:
        faulthandler.dump_traceback_later(seconds, exit=True, file=self._log)

    @pytest.hookimpl(tryfirst=True)
    def pytest_timeout_set_timer(self, item: pytest.Item, settings: Any) -> None:
        """Whenever pytest-timeout sets its alarm."""
        item.stash[_SETTINGS] = settings
        if settings.disable_debugger_detection or not is_debugging():
            self._is_set = True
            self._end_after(settings.timeout + self._grace)

    @pytest.hookimpl(tryfirst=True)
    def pytest_timeout_cancel_timer(self) -> None:
        """And takes it away: after a test, and after each failure within it."""
        self._is_set = False
        faulthandler.cancel_dump_traceback_later()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None]:
        settings = item.stash.get(_SETTINGS, None)
        if settings is not None and not self._is_set:
            item.ihook.pytest_timeout_set_timer(
                item=item, settings=settings._replace(timeout=self._teardown)
            )
        return (yield)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_logreport(self) -> Generator[None]:
        """In the controller, which tells what the workers report; a test's own is in its bounds."""
        is_blocked = self._is_controller and not select.select([], [self._out], [], 0)[1]
        if not is_blocked:
            return (yield)
        self._end_after(self._output)
        try:
            return (yield)
        finally:
            faulthandler.cancel_dump_traceback_later()

    pytest_runtest_logstart = pytest_runtest_logreport

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> Generator[None]:
        # the controller's end is the summary, which may be long, and be read by a person
        is_told = self._is_controller
        self._end_after(self._output if is_told else self._teardown + self._grace)
        if self._lost and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        return (yield)

    @pytest.hookimpl(trylast=True)
    def pytest_unconfigure(self) -> None:
        """The interpreter's own end joins threads, and is bounded too; a worker that has said all
        it had to say waits for the others, and is then killed.
        """
        if self._is_worker:
            faulthandler.cancel_dump_traceback_later()

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object | None) -> None:
        """A worker that was ended between two tests was in none that xdist could call failed."""
        if error:
            self._lost.append(str(node))


def _unblocked(descriptor: int) -> int:
    """The same, for a writer that must not wait for who reads it; it is not captured yet."""
    try:
        return os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK | os.O_APPEND)
    except OSError:  # a socket, or a terminal of another user
        return os.dup(descriptor)
