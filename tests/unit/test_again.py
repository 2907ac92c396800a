"""A second look passes a test that is unsteady, says so, and passes nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from again import worth

pytest_plugins = ["pytester"]

FAILS_ONCE = """
from pathlib import Path

def test_fails_once():
    mark = Path(__file__).with_suffix(".seen")
    seen, _ = mark.exists(), mark.touch()
    assert seen

def test_passes():
    pass
"""
SKIPS = "__import__('pytest').skip() if seen else 1 / 0"
FAILS = "def test_fails():\n    assert False\n"


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    here = Path(__file__).parent.parent
    monkeypatch.setenv("PYTHONPATH", f"{here}:{os.environ.get('PYTHONPATH', '')}")
    pytester.makeini("[pytest]\naddopts = -p again -p no:cacheprovider\n")
    return pytester


def test_one_that_failed_once_is_named(run: pytest.Pytester) -> None:
    run.makepyfile(test_it=FAILS_ONCE)
    result = run.runpytest_subprocess("-n", "2", "--second-look", "1")
    assert result.ret == pytest.ExitCode.OK
    result.stdout.fnmatch_lines(["*= unsteady =*", "test_it.py::test_fails_once failed, and *"])


def test_one_that_fails_again_has_failed(run: pytest.Pytester) -> None:
    run.makepyfile(test_it=FAILS_ONCE, test_other=FAILS)
    result = run.runpytest_subprocess("--second-look", "2")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.no_fnmatch_line("*unsteady*")


def test_a_file_that_cannot_be_read_is_no_second_look(run: pytest.Pytester) -> None:
    run.makepyfile(test_it=FAILS_ONCE, test_broken="import no_such_module")
    result = run.runpytest_subprocess("-n", "2", "--second-look", "3")
    assert result.ret != pytest.ExitCode.OK
    result.stdout.no_fnmatch_line("*unsteady*")


def test_one_that_is_skipped_alone_has_failed(run: pytest.Pytester) -> None:
    run.makepyfile(test_it=FAILS_ONCE.replace("assert seen", SKIPS))
    result = run.runpytest_subprocess("--second-look", "1")
    assert result.ret == pytest.ExitCode.TESTS_FAILED


def test_without_the_option_once_is_enough(run: pytest.Pytester) -> None:
    run.makepyfile(test_it=FAILS_ONCE)
    assert run.runpytest_subprocess().ret == pytest.ExitCode.TESTS_FAILED


def test_too_many_or_a_probe_are_not_looked_at_again() -> None:
    assert worth(["b", "a", "a"], 2) == ["a", "b"]
    assert worth(["a", "b", "c"], 2) == []
    assert worth(["a", "tests/attack/test_probes.py::test_it"], 2) == []
