"""What hangs in a run of tests ends it, and has a name: pytest is run on tests that hang."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

SETTINGS = """
[pytest]
addopts = -p xdist.plugin -p pytest_timeout -p bounds -p no:cacheprovider
timeout = 60
timeout_teardown = 3
timeout_grace = 2
"""
HANGS = """
import threading, time
import pytest

def waits_for_ever():
    while True:
        try:
            time.sleep(600)
        except BaseException:
            pass

@pytest.fixture
def stubborn():
    yield
    waits_for_ever()

@pytest.fixture
def joined():
    thread = threading.Thread(target=waits_for_ever)
    thread.start()
    yield
    thread.join()

@pytest.fixture
def slow():
    yield
    time.sleep(0.5)

def test_whose_teardown_catches_everything(stubborn):
    raise AssertionError("a failure takes the alarm away")

@pytest.mark.timeout(1)
def test_that_joins_a_thread(joined):
    time.sleep(600)

@pytest.mark.parametrize("number", range(6))
def test_that_ends(slow, number):
    pass
"""
AT_THE_END = """
import time

def pytest_sessionfinish(session):
    if hasattr(session.config, "workerinput"):
        time.sleep(600)
"""
LEFT_OVER = """
import threading, time

def never_joined():
    time.sleep(600)

def test_that_leaves_a_thread():
    threading.Thread(target=never_joined).start()
"""


@pytest.fixture
def hung(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    pytester.makefile(".ini", pytest=SETTINGS)
    return pytester


def _run(hung: pytest.Pytester, *arguments: str) -> tuple[int, str, str]:
    done = hung.runpytest_subprocess(*arguments, timeout=240)
    return int(done.ret), done.stdout.str(), done.stderr.str()


def test_a_teardown_that_hangs_ends_and_is_named(hung: pytest.Pytester) -> None:
    hung.makepyfile(test_hangs=HANGS)
    status, out, log = _run(hung, "-n2", "--dist=worksteal")
    assert status == pytest.ExitCode.TESTS_FAILED, out
    # what can be raised in is an error of its test; what cannot, the end of its process
    assert "ERROR test_hangs.py::test_that_joins_a_thread" in out
    name = "test_hangs.py::test_whose_teardown_catches_everything"
    assert f"crashed while running '{name}'" in out
    assert "in waits_for_ever" in log
    assert "in stubborn" in log
    # the rest is run, by another worker
    assert "3 failed, 6 passed, 1 error" in out, "the first is failed, and crashed"


def test_a_worker_that_hangs_at_the_end_fails_the_run(hung: pytest.Pytester) -> None:
    hung.makepyfile(test_well="def test_that_ends(): pass", conftest=AT_THE_END)
    status, out, log = _run(hung, "-n1", "--max-worker-restart=0")
    assert status == pytest.ExitCode.TESTS_FAILED, out
    assert "1 passed" in out
    assert "in pytest_sessionfinish" in log


def test_a_thread_that_nobody_joins_does_not_keep_the_process(hung: pytest.Pytester) -> None:
    hung.makepyfile(test_left=LEFT_OVER)
    status, out, log = _run(hung)
    assert status == 1
    assert "1 passed" in out
    assert "in never_joined" in log


def test_what_ends_in_time_is_left_alone(hung: pytest.Pytester) -> None:
    """The twin of the one above."""
    hung.makepyfile(test_left=LEFT_OVER.replace("600", "1"))
    status, out, log = _run(hung, "-otimeout_teardown=60")
    assert (status, log) == (0, ""), out


MANY = """
import pytest

@pytest.mark.parametrize("number", range(100))
def test_that_is_told_on_a_line_of_its_own(number):
    pass
"""


@pytest.mark.parametrize("is_read", [False, True], ids=["never", "in-time"])
def test_output_that_nobody_reads_ends_the_controller(hung: pytest.Pytester, is_read: bool) -> None:
    """The log of the end goes into the same full pipe, and must not wait for it either."""
    hung.makepyfile(test_many=MANY)
    read, write = os.pipe()
    # not the size of a page: the terminal's writer is asked for more than fits in any case
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    bound = f"-otimeout_output={60 if is_read else 3}"
    command = [sys.executable, "-m", "pytest", "-v", "-n1", bound]
    with open(read) as reader:
        with open(write, "wb"):
            process = subprocess.Popen(command, cwd=hung.path, stdout=write, stderr=write)
        out = reader.read() if is_read else ""
        assert process.wait(240) == (0 if is_read else 1)
    assert out.count("PASSED") == (100 if is_read else 0)
