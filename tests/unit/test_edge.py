"""The outermost edge: no traceback reaches a user, whatever goes wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ringfence.errors import UnavailableError
from ringfence.policy.compiled import SandboxProfile
from ringfence.sandbox.enforce import refuse as refuse_unenforceable
from ringfence.sandbox.protocol import Control, ControlState

DEFECT = """
import ringfence.cli.policy as policy
def schema():
    raise LookupError("a defect\\nof two lines")
policy.policy_schema = schema
import sys
sys.argv = ["ringfence", "policy", "schema"]
from ringfence.wiring import main
main()
"""


def ringfence(
    tmp_path: Path, *arguments: str, stdin: bytes = b"", **more: str
) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONUTF8": "1"}
    environment["RINGFENCE_STATE_DIR"] = str(tmp_path / "state")
    done = subprocess.run(
        [sys.executable, *arguments],
        env=environment | more,
        cwd=tmp_path,
        input=stdin,
        capture_output=True,
        timeout=60,
        check=False,
    )
    return subprocess.CompletedProcess(
        done.args, done.returncode, done.stdout.decode(), done.stderr.decode()
    )


def test_a_defect_is_one_line_with_a_code(tmp_path: Path) -> None:
    done = ringfence(tmp_path, "-c", DEFECT)
    assert done.returncode == 4
    assert done.stderr.startswith("ringfence: internal: LookupError: a defect of two lines\n")
    assert "Traceback" not in done.stderr


def test_a_defect_shows_where_to_who_asks(tmp_path: Path) -> None:
    done = ringfence(tmp_path, "-c", DEFECT, RINGFENCE_LOG="debug")
    assert done.returncode == 4
    assert "Traceback" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "-"], "the prompt on standard input is not UTF-8"),
        (["run", "x", "--output", "xml"], "'--output' / '-o': 'xml' is not one of"),
        (["check", "-o", "xml"], "'--output' / '-o': 'xml' is not one of"),
        (["run"], "Missing argument"),
        (["nothing"], "No such command"),
    ],
)
def test_what_cannot_be_read_is_a_usage_error(
    tmp_path: Path, arguments: list[str], words: str
) -> None:
    done = ringfence(
        tmp_path, "-m", "ringfence", *arguments, stdin=b"\xff\xfe", ANTHROPIC_API_KEY="k"
    )
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr


READERS = [
    ("check", "--list"),
    ("check", "--list", "--json"),
    ("policy", "schema"),
    ("--help",),
    ("run", "--help"),
    ("--version",),
]


@pytest.mark.parametrize("words", READERS, ids=" ".join)
@pytest.mark.parametrize("leaves", [True, False], ids=["leaves", "reads"])
def test_who_reads_no_more_ends_a_command_without_a_word(
    tmp_path: Path, words: tuple[str, ...], leaves: bool
) -> None:
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONUTF8": "1"}
    read, write = os.pipe()
    command = [sys.executable, "-m", "ringfence", *words]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdout=write, stderr=pipe) as process:
        os.close(write)
        with open(read, "rb") as reader:
            said = b"" if leaves else reader.read()
        errors = process.communicate(timeout=60)[1]
    assert (process.returncode, errors) == (141 if leaves else 0, b"")
    assert bool(said) is not leaves


def test_another_pipe_that_breaks_is_an_error(tmp_path: Path) -> None:
    broken = DEFECT.replace('LookupError("a defect\\nof two lines")', "BrokenPipeError(32, 'x')")
    assert broken != DEFECT
    done = ringfence(tmp_path, "-c", broken)
    assert done.returncode == 4
    assert done.stderr.startswith("ringfence: host-failed: ")


def test_json_of_a_check_is_asked_for_as_elsewhere(tmp_path: Path) -> None:
    asked = ("-m", "ringfence", "check", "--list", "--only", "NET-01")
    told = [ringfence(tmp_path, *asked, *words) for words in (("--json",), ("--output", "json"))]
    assert told[0].stdout == told[1].stdout
    assert told[0].stdout.startswith('{"checks":[')
    twice = ringfence(tmp_path, *asked, "--json", "--output", "sarif")
    assert (twice.returncode, twice.stdout) == (2, "")


def test_a_setting_that_does_not_exist_is_called_so(tmp_path: Path) -> None:
    done = ringfence(
        tmp_path, "-m", "ringfence", "vault", "list", RINGFENCE_PROVIDERS__ANTHROPIC__URL="x"
    )
    assert done.returncode == 2
    assert "there is no setting providers.anthropic.url" in done.stderr


def test_all_that_a_host_cannot_enforce_is_named_at_once() -> None:
    """One at a time would be a new failure for each line that a user adds."""
    states = [
        ControlState(control=c, enforced=c is Control.DISK, how="no cgroup", mend="delegate one")
        for c in (Control.MEMORY, Control.CPU, Control.PIDS, Control.DISK, Control.TMP_NOEXEC)
    ]
    with pytest.raises(UnavailableError) as caught:
        refuse_unenforceable(states, SandboxProfile(accept_unenforced=frozenset({"pids"})))
    assert "cannot enforce memory, cpu: no cgroup" in caught.value.message
    assert caught.value.hint == (
        "delegate one; or name it in the policy: accept_unenforced: [memory, cpu]"
    )
    accepted = SandboxProfile(accept_unenforced=frozenset({"memory", "cpu", "pids"}))
    refuse_unenforceable(states, accepted)


LOADED = """
import os, signal, sys
class Hit:
    def find_spec(self, name, *_):
        if name == "ringfence.wiring":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Hit())
signal.signal(signal.SIGINT, {handler})
sys.argv = ["ringfence", "--version"]
from ringfence.__main__ import main
main()
"""


@pytest.mark.parametrize(
    ("handler", "status", "said"),
    [("signal.default_int_handler", -2, ""), ("signal.SIG_IGN", 0, "ringfence ")],
)
def test_ctrl_c_while_the_program_is_loaded(
    tmp_path: Path, handler: str, status: int, said: str
) -> None:
    """It ends at once and without a traceback; one that ignores it, as under nohup, goes on."""
    done = ringfence(tmp_path, "-c", LOADED.replace("{handler}", handler))
    assert (done.returncode, done.stderr) == (status, "")
    assert done.stdout.startswith(said)
