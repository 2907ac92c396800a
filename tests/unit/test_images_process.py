"""Programs that build end with the build, whatever ends it; what they say is kept and passed on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ringfence.errors import UnavailableError
from ringfence.images.process import Tools, index_environment, plain_environment, require_tool


def tools(tmp_path: Path, progress: object = None) -> Tools:
    watcher = progress if callable(progress) else (lambda _line: None)
    return Tools(log=tmp_path / "log", scratch=tmp_path, progress=watcher)


def interrupt_at(word: str) -> object:
    def progress(line: str) -> None:
        if line == word:
            raise KeyboardInterrupt

    return progress


def running(marker: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if marker.encode() in path.read_bytes() and path.parent.name != str(os.getpid()):
                found.append(path.parent.name)
        except OSError:
            continue
    return found


def appeared(marker: str) -> bool:
    end = time.monotonic() + 30
    while not running(marker) and time.monotonic() < end:
        time.sleep(0.1)
    return bool(running(marker))


def gone(marker: str) -> bool:
    end = time.monotonic() + 30
    while running(marker) and time.monotonic() < end:
        time.sleep(0.1)
    return not running(marker)


def namespaced(script: str) -> list[str]:
    spaces = ["--mount", "--pid", "--fork", "--kill-child"]
    spaces += [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    return ["unshare", *spaces, "--", "sh", "-c", script]


def test_what_runs_in_a_namespace_ends_at_once(tmp_path: Path) -> None:
    marker = f"7.{time.time_ns()}"
    script = (
        f"echo ready; sleep {marker}; true"  # the first process of a pid namespace heeds no TERM
    )
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        tools(tmp_path, interrupt_at("ready")).run(namespaced(script))
    assert time.monotonic() - began < 6  # it would have slept for seven seconds
    assert gone(marker)


def test_a_program_that_cleans_up_has_time_to(tmp_path: Path) -> None:
    # a child that a signal to the session misses, since it is just being forked, ends by itself
    loop = "while :; do sleep 0.1; done"
    script = f"trap 'echo clean > {tmp_path}/done; exit' TERM; echo ready; {loop}"
    with pytest.raises(KeyboardInterrupt):
        tools(tmp_path, interrupt_at("ready")).run(["sh", "-c", script], cleans_up=True)
    assert (tmp_path / "done").read_text() == "clean\n"


@pytest.mark.parametrize("cleans_up", [True, False])
def test_no_program_outlives_a_killed_build(tmp_path: Path, cleans_up: bool) -> None:
    marker = f"600.{time.time_ns()}"
    code = (
        "import sys; from pathlib import Path; from ringfence.images.process import Tools\n"
        f"Tools(log=Path({str(tmp_path / 'log')!r}), scratch=Path({str(tmp_path)!r}),"
        " progress=lambda line: print(line, flush=True)).run("
        f"['sh', '-c', 'echo ready; exec sleep {marker}'], cleans_up={cleans_up})"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        found = appeared(f"sleep\0{marker}")
        process.send_signal(signal.SIGKILL)
    assert found
    assert gone(f"sleep\0{marker}")


def test_a_failure_repeats_the_first_error_and_names_the_log(tmp_path: Path) -> None:
    script = "echo 'I: fine'; echo 'E: no such package'; echo 'E: failed'; exit 25"
    with pytest.raises(UnavailableError, match=r"ended with 25: E: no such package$") as caught:
        tools(tmp_path).run(["sh", "-c", script])
    assert str(tmp_path / "log") in caught.value.hint
    assert "I: fine" in (tmp_path / "log").read_text()
    tools(tmp_path).run(["sh", "-c", "exit 1"], accepted=frozenset({0, 1}))


def test_a_missing_program_is_named_with_its_package(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="no-such-program is not installed") as caught:
        require_tool("no-such-program")
    assert caught.value.code == "image-tool-missing"
    assert require_tool("sh")


def test_no_credential_reaches_what_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-ant-CANARY")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "CANARY")
    monkeypatch.setenv("OTHER_SECRET", "CANARY")
    monkeypatch.setenv("PIP_INDEX_URL", "https://index.example/simple")
    assert "CANARY" not in str(plain_environment())
    assert "PIP_INDEX_URL" not in plain_environment()
    assert "ANTHROPIC_API_KEY" not in index_environment()
    assert "AWS_SECRET_ACCESS_KEY" not in index_environment()
    assert index_environment()["PIP_INDEX_URL"] == "https://index.example/simple"
