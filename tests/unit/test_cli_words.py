"""What the command line says to people: plain words, and what to do next."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from ringfence.cli.main import app
from ringfence.cli.remote import definition
from ringfence.cli.run import _resolved
from ringfence.cli.serve import listen
from ringfence.cli.summary import print_summary
from ringfence.errors import CallerError, UnavailableError
from ringfence.model import RunResult, RunStatus, Usage


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    for name, below in getattr(command, "commands", {}).items():
        yield from commands(below, (*path, name))


EVERY = tuple(commands(typer.main.get_command(app)))


@pytest.mark.parametrize("path", EVERY, ids=" ".join)
def test_help_says_what_to_write(path: tuple[str, ...]) -> None:
    """No type of Python's."""
    done = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": "120"})
    assert done.exit_code == 0, done.output
    for line in done.output.splitlines():
        assert not re.fullmatch(r" +--json *", line), "it says what it does"
    assert not re.search(r"list\[|Path\]|None\b", done.output), done.output


def test_the_walk_meets_every_kind_of_command() -> None:
    assert {(), ("run",), ("exec",), ("patch", "apply"), ("audit", "verify")} <= set(EVERY)


def say(*words: str, state: Path) -> tuple[int, str]:
    """Exit status and all that is printed, of the command itself."""
    done = subprocess.run(
        [sys.executable, "-m", "ringfence", *words],
        env={**os.environ, "RINGFENCE_STATE_DIR": str(state)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


def test_what_is_no_run_is_told_with_where_runs_are(tmp_path: Path) -> None:
    status, said = say("patch", "show", "run_1", state=tmp_path)
    assert status == 2
    assert "'run_1' is not a run id" in said
    assert "the latest runs: ringfence audit usage" in said


def test_without_sessions_that_is_said(tmp_path: Path) -> None:
    status, said = say("sessions", "list", state=tmp_path)
    assert status == 0, said
    assert "no sessions yet: `ringfence run` makes one" in said
    status, said = say("sessions", "list", "--skip", "3", state=tmp_path)
    assert status == 0, said
    assert "no sessions yet" not in said


def test_a_workspace_and_a_definition_that_cannot_be_read_say_what_to_name(tmp_path: Path) -> None:
    with pytest.raises(CallerError) as caught:
        _resolved(Path("a\0b"))
    assert caught.value.code == "workspace-missing"
    assert "--workspace" in caught.value.hint
    assert _resolved(tmp_path) == str(tmp_path)
    with pytest.raises(CallerError, match="No such file") as caught:
        definition(tmp_path / "absent.yaml")
    assert "Errno" not in caught.value.message
    assert "-f names a YAML file" in caught.value.hint


def test_an_address_in_use_is_said_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UnavailableError) as caught:
            listen("127.0.0.1", port)
    assert caught.value.message == f"cannot listen at 127.0.0.1:{port}: address already in use"
    with listen("127.0.0.1", 0) as free:
        assert free.getsockname()[1]


@pytest.mark.parametrize(
    ("requests", "words"), [(1, "1 model request ·"), (2, "2 model requests ·")]
)
def test_the_summary_counts_in_words(
    capsys: pytest.CaptureFixture[str], requests: int, words: str
) -> None:
    usage = Usage(requests=requests, input_tokens=3, output_tokens=4)
    print_summary(
        RunResult(run_id="r", session_id="s", status=RunStatus.SUCCEEDED, usage=usage), None
    )
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("status", [RunStatus.CANCELLED, RunStatus.FAILED])
def test_the_clients_notes_of_its_end_are_no_errors_of_a_cancelled_run(
    capsys: pytest.CaptureFixture[str], status: RunStatus
) -> None:
    print_summary(RunResult(run_id="r", session_id="s", status=status, errors=("its note",)), None)
    assert ("its note" in capsys.readouterr().err) is (status is RunStatus.FAILED)


def test_the_summary_marks_what_runs_later(capsys: pytest.CaptureFixture[str]) -> None:
    files = {"changed_files": (".envrc", "a.txt"), "host_files": (".envrc",)}
    print_summary(RunResult(run_id="r", session_id="s", status=RunStatus.SUCCEEDED, **files), None)
    said = capsys.readouterr().err
    assert ".envrc (runs on your machine later)" in said
    assert "a.txt (runs" not in said
    assert "more" not in said


def test_the_summary_of_many_files_shows_first_what_runs_later(
    capsys: pytest.CaptureFixture[str],
) -> None:
    plain = tuple(f"a{number}.txt" for number in range(1_000))
    late = tuple(f"z/.envrc.{number}" for number in range(60))
    files = {"changed_files": (*plain, *late), "host_files": late}
    print_summary(RunResult(run_id="r", session_id="s", status=RunStatus.SUCCEEDED, **files), None)
    said = capsys.readouterr().err
    assert said.count("(runs on your machine later)") == 50
    assert "a0.txt" not in said
    assert "and 1010 more, 10 of which run on your machine later" in said
