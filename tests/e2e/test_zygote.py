"""A forked command is the command: what it says, how it ends, and that it can be given up."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
from harness import Box
from zygote import Zygote


@pytest.mark.parametrize(
    "arguments",
    [("--version",), ("policy", "lint", "absent.yaml"), ("no-such-command",)],
    ids=["fine", "refused", "usage"],
)
def test_it_is_as_when_it_is_started(box: Box, arguments: tuple[str, ...]) -> None:
    forked = box.call(*arguments)
    started = subprocess.run(
        [sys.executable, "-m", "ringfence", *arguments],
        env=box.environment,
        cwd=box.place,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (forked.code, forked.out, forked.err) == (
        started.returncode,
        started.stdout,
        started.stderr,
    )
    assert forked.out + forked.err


def test_one_is_given_up_while_another_goes_on(zygote: Zygote, tmp_path: Path, box: Box) -> None:
    def serve() -> None:
        with pytest.raises(subprocess.TimeoutExpired):
            zygote.run(
                ["simulator", "serve", "--port", "0"],
                env=box.environment,
                cwd=str(tmp_path),
                given="",
                seconds=3,
            )
        ended.set()

    ended = threading.Event()
    thread = threading.Thread(target=serve)
    thread.start()
    assert box.call("--version").code == 0
    thread.join(60)
    assert ended.is_set()
