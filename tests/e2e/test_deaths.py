"""What a run depends on dies under it: the run ends at once, closed, and keeps what it has."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest
from harness import Box, bash, processes_with, script, signal, wait_for

import ringfence


@pytest.fixture
def marker() -> str:
    """Tests run side by side on one host: each looks for its own process."""
    return f"ringfence-e2e-death-{secrets.token_hex(4)}"


def _child(parent: int, module: str) -> int:
    """Pid of a process's child that runs a module."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes().split(b"\0")
                status = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if module.encode() in line and int(status[1]) == parent:
                return int(entry.name)
    raise AssertionError(f"no {module} below {parent}")


def _going(box: Box, marker: str) -> subprocess.Popen[str]:
    prompt = script(
        {"tool": "Write", "input": {"file_path": "/workspace/kept.txt", "content": "so far\n"}},
        bash(f"exec -a {marker} sleep 300"),
        {"text": "never"},
    )
    process = box.spawn(
        *("run", prompt, "--workspace", str(box.workspace), "--output", "json"),
        *("--policy", str(box.place / "policy.yaml")),
    )
    assert wait_for(lambda: processes_with(f"{marker}\0"), 40), process.stderr
    return process


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("ringfence.egress", "egress-unavailable"),
        ("ringfence.record", "recorder-unavailable"),
    ],
)
def test_a_helper_that_is_killed_ends_the_run_at_once(
    box: Box, marker: str, module: str, code: str
) -> None:
    process = _going(box, marker)
    os.kill(_child(process.pid, module), signal.SIGKILL)
    started = time.monotonic()
    out, err = process.communicate(timeout=30)
    assert time.monotonic() - started < 10
    assert process.returncode == 4, err
    assert f'"code":"{code}"' in out
    assert "kept.txt" in out
    assert "Traceback" not in err
    assert wait_for(lambda: not processes_with(f"{marker}\0"), 1)
    assert not list((box.state / "egress").iterdir())
    assert len(list((box.state / "runs").glob("*/run.patch"))) == 1
    assert box.call("audit", "verify").code == 0


KNOCK = r"""
import os, socket, ssl, sys, time
context = ssl.create_default_context()
context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
while True:
    for way in ("proxy", "direct"):
        try:
            to = ("127.0.0.1", int(os.environ["HTTPS_PROXY"].rsplit(":", 1)[1]))
            s = socket.create_connection(to if way == "proxy" else ("127.0.0.1", CANARY), 1)
            if way == "proxy":
                s.sendall(b"CONNECT a.example.com:443 HTTP/1.1\r\nHost: a.example.com:443\r\n\r\n")
                s.recv(4096)
            context.wrap_socket(s, server_hostname="a.example.com")
        except OSError as error:
            pass
    time.sleep(0.02)
"""


def test_without_egress_nothing_goes_out_and_the_run_is_unavailable(box: Box, marker: str) -> None:
    """The worker is stopped meanwhile, so that the sandbox lives on and it is the missing way out
    that holds, not the end of the run.
    """
    with socket.create_server(("127.0.0.1", 0)) as canary:
        port, knocks, over = canary.getsockname()[1], [], threading.Event()
        canary.settimeout(0.1)

        def listen() -> None:
            while not over.is_set():
                with contextlib.suppress(TimeoutError):
                    canary.accept()[0].close()
                    knocks.append(time.monotonic())

        listener = threading.Thread(target=listen)
        listener.start()
        try:
            _knocked(box, marker, port, knocks)
        finally:
            over.set()
            listener.join()


def _knocked(box: Box, marker: str, port: int, knocks: list[float]) -> None:
    (box.workspace / "knock.py").write_text(KNOCK.replace("CANARY", str(port)))
    host = {"host": "a.example.com", "opaque": True}
    box.policy({"preset": "ci", "network": {"allowed_hosts": ["api.anthropic.com", host]}})
    process = box.spawn(
        *("run", script(bash(f"exec -a {marker} python3 knock.py"), {"text": "never"})),
        *("--workspace", str(box.workspace), "--output", "json"),
        *("--policy", str(box.place / "policy.yaml")),
        RINGFENCE_EGRESS__CONNECT=json.dumps({"a.example.com:443": f"127.0.0.1:{port}"}),
    )
    assert wait_for(lambda: len(knocks) > 3, 60), "the allowed twin: it goes out through egress"
    egress = _child(process.pid, "ringfence.egress")
    process.send_signal(signal.SIGSTOP)
    os.kill(egress, signal.SIGKILL)
    time.sleep(0.5)  # what was under way when it died
    before = len(knocks)
    time.sleep(2)
    assert processes_with(f"{marker}\0"), "the sandbox lives, and knocks"
    assert len(knocks) == before, "nothing fell back to a direct way"
    process.send_signal(signal.SIGCONT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 4, err
    assert '"code":"egress-unavailable"' in out
    assert wait_for(lambda: not processes_with(f"{marker}\0"), 1)


def test_a_caller_that_cancels_leaves_a_record_and_nobody(
    box: Box, marker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in box.environment.items():
        if name.startswith(("RINGFENCE_", "ANTHROPIC_")):
            monkeypatch.setenv(name, value)

    async def cancelled() -> None:
        task = asyncio.get_running_loop().create_task(
            ringfence.run(
                script(bash(f"exec -a {marker} sleep 300"), {"text": "never"}),
                workspace=box.workspace,
                policy=box.place / "policy.yaml",
            )
        )
        while not processes_with(f"{marker}\0"):
            assert not task.done(), task
            await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(asyncio.wait_for(cancelled(), 60))
    assert wait_for(lambda: not processes_with(f"{marker}\0"), 1)
    ended = [record for record in box.records() if record["type"] == "run.ended"]
    assert [(one["status"], one["reason"]) for one in ended] == [("cancelled", "run-interrupted")]
    assert not list((box.state / "egress").iterdir())
