"""The recorder as a real process: durability under kill -9, who may write what, quota, its end."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from ringfence.errors import UnavailableError
from ringfence.record.audit import AuditLog
from ringfence.record.client import RecorderClient, RecorderProcess
from ringfence.record.events import EgressRefused, RunEnded, RunStarted, SandboxStopped
from ringfence.record.read import AuditReader
from ringfence.record.recorder import Recorder
from ringfence.record.verify import Report, verify
from ringfence.record.wire import encode
from ringfence.testing.fakes import MemoryRecorder

ALLOWED = {
    "type": "egress.allowed",
    "run_id": "run_1",
    "sandbox_id": "box",
    "host": "api.example.com",
    "port": 443,
    "method": "GET",
    "path": "/",
    "rule": "network.allowed_hosts[0]",
}
STARTED = RunStarted(
    run_id="run_1",
    kind="claude",
    policy_digest="d",
    role="default",
    permission_mode="default",
    workspace_mode="review",
    prompt_hmac="h",
)
Body = Callable[[RecorderClient, RecorderClient, RecorderProcess], Awaitable[None]]


def with_recorder(directory: Path, body: Body) -> RecorderProcess:
    """Run `body` with both clients, then end everything in order."""
    process = RecorderProcess.start(directory)

    async def run() -> None:
        worker = RecorderClient(process.sockets["worker"])
        egress = RecorderClient(process.sockets["egress"])
        try:
            await worker.ready()
            await egress.ready()
            await body(worker, egress, process)
        finally:
            await worker.close()
            await egress.close()

    try:
        asyncio.run(run())
    finally:
        process.close()
    return process


def check(directory: Path) -> Report:
    return verify(directory / "log.sqlite", (directory / "public.key").read_text(), [])


def records(directory: Path, *, own: bool = False) -> list[dict[str, Any]]:
    with AuditReader(directory) as reader:
        found = reader.events(limit=100_000)
    return [record for record in found if own or not record["type"].startswith("log.")]


def test_who_wrote_what(tmp_path: Path) -> None:
    async def body(worker: RecorderClient, egress: RecorderClient, _: RecorderProcess) -> None:
        assert await worker.append(STARTED) == 1
        assert await egress.append_fields({**ALLOWED}) == 2
        assert await worker.append(SandboxStopped(run_id="run_1"), durable=False) == -1

    with_recorder(tmp_path / "audit", body)
    everything = records(tmp_path / "audit", own=True)
    assert [(r["type"], r["source"]) for r in everything] == [
        ("log.opened", "recorder"),
        ("run.started", "worker"),
        ("egress.allowed", "egress"),
        ("sandbox.stopped", "worker"),
        ("run.lost", "recorder"),
        ("log.closed", "recorder"),
    ]
    report = check(tmp_path / "audit")
    assert (report.ok, report.signed, report.warnings) == (True, 6, [])


def test_a_sender_chooses_neither_source_nor_time(tmp_path: Path) -> None:
    async def body(worker: RecorderClient, egress: RecorderClient, _: RecorderProcess) -> None:
        for extra in ({"source": "worker"}, {"time": "1999"}, {"index": 0}):
            with pytest.raises(UnavailableError, match="unknown-field"):
                await egress.append_fields({**ALLOWED, **extra})
        for kind in ("tool.decided", "run.ended", "log.heartbeat", "no.such", ""):
            with pytest.raises(UnavailableError, match="wrong-source"):
                await egress.append_fields({"type": kind})
        with pytest.raises(UnavailableError, match="wrong-source"):
            await worker.append_fields(
                {"type": "log.key_rotated", "old_public_key": "", "new_public_key": ""}
            )
        assert await egress.append_fields({**ALLOWED}) > 0

    with_recorder(tmp_path / "audit", body)
    assert [r["type"] for r in records(tmp_path / "audit")] == ["egress.allowed"]
    refused = [r for r in records(tmp_path / "audit", own=True) if r["type"] == "log.refused"]
    assert {(r["client"], r["reason"], r["count"]) for r in refused} == {
        ("egress", "unknown-field", 3),
        ("egress", "wrong-source", 5),
        ("worker", "wrong-source", 1),
    }


def test_keyed_hashes_are_one_key_for_both_and_for_the_next_recorder(tmp_path: Path) -> None:
    seen: list[str] = []

    async def body(worker: RecorderClient, egress: RecorderClient, _: RecorderProcess) -> None:
        seen.extend((worker.hmac(b"ls"), egress.hmac(b"ls")))
        assert worker.hmac(b"ls -l") != worker.hmac(b"ls")

    with_recorder(tmp_path / "audit", body)
    with_recorder(tmp_path / "audit", body)
    assert len(set(seen)) == 1
    assert check(tmp_path / "audit").ok
    with_recorder(tmp_path / "other", body)
    assert len(set(seen)) == 2


def test_order_is_kept_and_nothing_lost_under_a_flood(tmp_path: Path) -> None:
    """More than a socket buffer holds, durable and not, from many tasks."""
    count = 4000

    async def body(worker: RecorderClient, egress: RecorderClient, _: RecorderProcess) -> None:
        worker.quota("box", 100_000)
        await worker.append(STARTED)
        for number in range(count):
            await egress.append_fields(
                {**ALLOWED, "path": f"{number:05}" + "x" * 800}, durable=False
            )
        async with asyncio.TaskGroup() as group:
            for number in range(count, count + 500):
                group.create_task(egress.append_fields({**ALLOWED, "path": f"{number:05}"}))

    with_recorder(tmp_path / "audit", body)
    found = [
        int(r["path"][:5]) for r in records(tmp_path / "audit") if r["type"] == "egress.allowed"
    ]
    assert found[:count] == list(range(count))
    assert sorted(found[count:]) == list(range(count, count + 500))
    assert check(tmp_path / "audit").ok


def test_kill_9_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    directory = tmp_path / "audit"
    for seed in range(4):
        acknowledged: list[int] = []

        async def body(
            worker: RecorderClient,
            egress: RecorderClient,
            process: RecorderProcess,
            *,
            seed: int = seed,
            acknowledged: list[int] = acknowledged,
        ) -> None:
            async def write(task: int) -> None:
                for number in range(100_000):
                    name = seed * 10**7 + task * 10**6 + number
                    await egress.append_fields(
                        {**ALLOWED, "sandbox_id": f"b{task}", "path": str(name)}
                    )
                    acknowledged.append(name)

            tasks = [asyncio.ensure_future(write(task)) for task in range(8)]
            await asyncio.sleep(0.1 + random.Random(seed).random() * 0.1)
            os.kill(process.pid, signal.SIGKILL)
            done = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(error, UnavailableError) for error in done), done
            with pytest.raises(UnavailableError):
                await worker.append(STARTED)
            with pytest.raises(UnavailableError):
                await worker.append(STARTED, durable=False)

        with_recorder(directory, body)
        stored = {int(r["path"]) for r in records(directory) if r["type"] == "egress.allowed"}
        assert acknowledged
        assert set(acknowledged) <= stored
        assert check(directory).ok


def test_it_drains_on_sigterm_and_ignores_sigint(tmp_path: Path) -> None:
    async def body(
        worker: RecorderClient, egress: RecorderClient, process: RecorderProcess
    ) -> None:
        os.kill(process.pid, signal.SIGINT)
        assert await worker.append(STARTED) == 1
        for number in range(50):
            await egress.append_fields({**ALLOWED, "path": str(number)}, durable=False)
        await asyncio.sleep(0)  # what one turn of the loop queues goes out at its end
        os.kill(process.pid, signal.SIGTERM)
        await asyncio.to_thread(process._process.wait, 20)

    process = with_recorder(tmp_path / "audit", body)
    assert process._process.returncode == 0
    assert len(records(tmp_path / "audit")) == 51
    assert check(tmp_path / "audit").ok


def test_a_flood_of_denials_is_coalesced_and_the_others_go_on(tmp_path: Path) -> None:
    """Requirement K, AGT-25: one agent fills its own share, not the log."""

    async def body(worker: RecorderClient, egress: RecorderClient, _: RecorderProcess) -> None:
        worker.quota("noisy", 100)
        egress.quota("noisy", 10**9)  # only the worker may say so
        await worker.append(STARTED)
        line = "GET /\r\nFAKE audit line: allowed\x1b[2J"
        for _n in range(1000):
            event = EgressRefused(
                sandbox_id="noisy", target=line, rule="default", reason="host-not-allowed"
            )
            await egress.append(event, durable=False)
        for number in range(50):
            await egress.append_fields({**ALLOWED, "sandbox_id": "quiet", "path": str(number)})
        for _n in range(900):
            await egress.append_fields({**ALLOWED, "sandbox_id": "noisy"})
        with pytest.raises(UnavailableError) as caught:
            await egress.append_fields({**ALLOWED, "sandbox_id": "noisy"})
        assert caught.value.code == "audit-quota-reached"
        await egress.append_fields({**ALLOWED, "sandbox_id": "noisy"}, durable=False)
        await egress.append_fields({**ALLOWED, "sandbox_id": "quiet"})
        await worker.append(SandboxStopped(sandbox_id="noisy"))

    with_recorder(tmp_path / "audit", body)
    found = records(tmp_path / "audit")
    noisy = [r for r in found if r["type"] == "egress.refused"]
    assert len(noisy) == 101
    assert sum(r["count"] for r in noisy) == 1000
    assert (noisy[-1]["count"], noisy[-1]["source"]) == (900, "recorder")
    assert sum(r.get("sandbox_id") == "quiet" for r in found) == 51
    assert found[0]["type"] == "run.started"
    assert any(r["type"] == "sandbox.stopped" for r in found)
    everything = records(tmp_path / "audit", own=True)
    (refused,) = [r for r in everything if r.get("reason") == "quota"]
    assert refused["type"] == "log.refused"
    assert (refused["client"], refused["sandbox_id"], refused["count"]) == ("egress", "noisy", 2)


HOSTILE = [
    b"\xff\xff\xff\xff",
    b"\0\0\0\2[]",
    struct.pack(">I", 40_000) + b"[" * 40_000,
    b"GET / HTTP/1.1\r\n\r\n",
    encode({"n": "x", "e": None})
    + encode({"n": True, "e": {"type": ["x"]}})
    + encode({"q": 1, "records": {}}),
    encode({"n": 10**30, "e": {**ALLOWED, "port": 10**30}}),
    encode({"n": 1, "e": {**ALLOWED, "host": {"a": 1}}}),
    encode({"n": 1, "e": {**ALLOWED, "run_id": "\ud800"}}),
    encode({"n": 1, "e": {**ALLOWED, "sandbox_id": "x" * 129}}),
]


@pytest.mark.parametrize("data", HOSTILE, ids=range(len(HOSTILE)))
def test_an_egress_gone_mad_does_not_stop_the_worker(tmp_path: Path, data: bytes) -> None:
    process = RecorderProcess.start(tmp_path / "audit")
    process.sockets["egress"].sendall(data)

    async def run() -> None:
        worker = RecorderClient(process.sockets["worker"])
        await worker.ready()
        assert await worker.append(STARTED) >= 1
        await worker.close()

    try:
        asyncio.run(run())
    finally:
        process.close()
    assert [r["type"] for r in records(tmp_path / "audit")] == ["run.started", "run.lost"]
    assert check(tmp_path / "audit").ok


def test_a_worker_gone_mad_is_refused(tmp_path: Path) -> None:
    async def body(worker: RecorderClient, _: RecorderClient, __: RecorderProcess) -> None:
        for kind in (["x"], {}, None, 7, "run.lost"):
            with pytest.raises(UnavailableError, match="wrong-source"):
                await worker.append_fields({"type": kind})
        assert await worker.append(STARTED) == 1

    with_recorder(tmp_path / "audit", body)


def test_a_run_whose_worker_is_gone_is_not_left_open(tmp_path: Path) -> None:
    async def body(worker: RecorderClient, egress: RecorderClient, _: RecorderProcess) -> None:
        await worker.append(STARTED)
        await worker.append(STARTED.model_copy(update={"run_id": "run_2", "sandbox_id": "box"}))
        await worker.append(RunEnded(run_id="run_1", status="failed", exit_code=1, duration_ms=1.0))
        await worker.close()
        assert await egress.append_fields({**ALLOWED}) > 0

    with_recorder(tmp_path / "audit", body)
    (lost,) = [r for r in records(tmp_path / "audit") if r["type"] == "run.lost"]
    assert (lost["run_id"], lost["sandbox_id"]) == ("run_2", "box")
    assert (lost["source"], lost["reason"]) == ("recorder", "worker-gone")
    with AuditReader(tmp_path / "audit") as reader:
        assert {run.run_id: run.status for run in reader.runs()} == {
            "run_1": "failed",
            "run_2": "lost",
        }


def test_a_client_that_does_not_read_does_not_hold_up_the_other(tmp_path: Path) -> None:
    process = RecorderProcess.start(tmp_path / "audit")
    stuck = process.sockets["egress"]
    stuck.settimeout(0)
    frame = encode({"n": 7, "e": {**ALLOWED}})

    async def run() -> None:
        worker = RecorderClient(process.sockets["worker"])
        await worker.ready()
        for _ in range(20_000):
            try:
                stuck.send(frame)
            except BlockingIOError:
                await worker.append(STARTED)
        async with asyncio.timeout(5):
            await worker.append(STARTED)
        await worker.close()

    try:
        asyncio.run(run())
    finally:
        process.close()
    assert check(tmp_path / "audit").ok


@pytest.mark.user
def test_a_log_that_cannot_be_written_stops_everything(tmp_path: Path) -> None:
    (tmp_path / "audit").mkdir(mode=0o500)
    process = RecorderProcess.start(tmp_path / "audit")

    async def run() -> None:
        worker = RecorderClient(process.sockets["worker"])
        with pytest.raises(UnavailableError):
            await worker.ready()
        with pytest.raises(UnavailableError):
            await worker.append(STARTED)
        await worker.close()

    try:
        asyncio.run(run())
    finally:
        process.close()


def test_why_it_does_not_start_is_said_in_the_clients_error(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    AuditLog(tmp_path / "audit").close()
    (tmp_path / "audit" / "key").chmod(0o644)
    process = RecorderProcess.start(tmp_path / "audit")

    async def run() -> None:
        for label in ("worker", "egress"):
            client = RecorderClient(process.sockets[label])
            with pytest.raises(UnavailableError) as caught:
                await client.ready()
            assert caught.value.code == "audit-key-refused"
            assert caught.value.hint.startswith("chmod 600")
            await client.close()

    try:
        asyncio.run(run())
    finally:
        process.close()
    assert process._process.returncode == 1
    assert capfd.readouterr().err == ""


@pytest.mark.storm
def test_one_that_gets_no_processor_for_a_while_is_waited_for(tmp_path: Path) -> None:
    process = RecorderProcess.start(tmp_path / "audit")
    os.kill(process.pid, signal.SIGSTOP)

    async def run() -> None:
        clients = [RecorderClient(each) for each in process.sockets.values()]
        waiting = asyncio.ensure_future(clients[0].ready())
        await asyncio.wait({waiting}, timeout=17)
        assert not waiting.done()
        os.kill(process.pid, signal.SIGCONT)
        await waiting
        for client in clients:
            await client.close()

    try:
        asyncio.run(run())
    finally:
        process.close()


def test_a_log_that_fails_mid_way_tells_every_waiter(tmp_path: Path) -> None:
    """A full disk, as a limit on the size of files (SIGXFSZ ignored: the write fails)."""
    script = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000)); "
        "from ringfence.record.process import main; sys.exit(main(sys.argv[1:]))"
    )
    ours, theirs = socket.socketpair()
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "audit"), f"worker:{theirs.fileno()}"],
        pass_fds=[theirs.fileno()],
    )
    theirs.close()
    written = 0

    async def run() -> None:
        nonlocal written
        worker = RecorderClient(ours)
        await worker.ready()
        failure = ""
        for _ in range(5000):
            try:
                await worker.append(STARTED)
            except UnavailableError as error:
                failure = error.code
                break
            written += 1
        assert failure == "store-unavailable"
        await worker.close()

    asyncio.run(run())
    assert process.wait(5) == 1
    stored = [r for r in records(tmp_path / "audit") if r["type"] == "run.started"]
    assert written > 10
    assert len(stored) == written
    assert check(tmp_path / "audit").ok


def test_text_that_utf8_has_no_word_for_is_recorded_as_it_is(tmp_path: Path) -> None:
    """An upstream's answer can name a tool by half a surrogate pair, and may not hide it so."""
    names = ["plain", "é \u2028", "\ud800", "\U0001f600"]

    async def body(_: RecorderClient, egress: RecorderClient, __: RecorderProcess) -> None:
        for name in names:
            asked = {"type": "tool.requested", "tool_use_id": "t", "input_hmac": "h", "name": name}
            await egress.append_fields(asked)

    with_recorder(tmp_path / "audit", body)
    found = [r["name"] for r in records(tmp_path / "audit") if r["type"] == "tool.requested"]
    assert found == names
    assert check(tmp_path / "audit").ok


def test_once_a_beat_it_lives_signs_and_says_what_it_counted(tmp_path: Path) -> None:
    script = (
        "import sys; import ringfence.record.process as process; process.BEAT_SECONDS = 0.2; "
        "sys.exit(process.main(sys.argv[1:]))"
    )
    pairs = {label: socket.socketpair() for label in ("worker", "egress")}
    ends = {label: pair[1] for label, pair in pairs.items()}
    argv = [
        sys.executable,
        "-c",
        script,
        str(tmp_path / "audit"),
        *(f"{k}:{v.fileno()}" for k, v in ends.items()),
    ]
    process = subprocess.Popen(argv, pass_fds=[end.fileno() for end in ends.values()])
    for end in ends.values():
        end.close()

    async def run() -> None:
        worker, egress = (RecorderClient(pairs[label][0]) for label in ("worker", "egress"))
        await worker.ready()
        worker.quota("noisy", 1)
        await worker.append(STARTED)
        for _ in range(11):
            event = EgressRefused(sandbox_id="noisy", target="x", rule="default", reason="q")
            await egress.append(event)
        await asyncio.sleep(1)
        await worker.close()
        await egress.close()

    asyncio.run(run())
    assert process.wait(5) == 0
    everything = records(tmp_path / "audit", own=True)
    beats = [r["index"] for r in everything if r["type"] == "log.heartbeat"]
    assert 3 <= len(beats) <= 6
    (held,) = [r for r in everything if r.get("count", 1) > 1]
    assert (held["count"], held["index"] < beats[-1]) == (10, True)
    with AuditReader(tmp_path / "audit") as reader:
        assert len(reader.checkpoints()) == len(beats) + 2
    assert check(tmp_path / "audit").warnings == []


def test_its_memory_cannot_be_read_by_its_own_uid(tmp_path: Path) -> None:
    async def body(_: RecorderClient, __: RecorderClient, process: RecorderProcess) -> None:
        owner = Path(f"/proc/{process.pid}/mem").stat().st_uid
        assert owner == 0, "a process that is not dumpable belongs to root in /proc"
        if os.geteuid() != 0:
            with pytest.raises(PermissionError):
                Path(f"/proc/{process.pid}/environ").read_bytes()

    with_recorder(tmp_path / "audit", body)


@pytest.mark.user
def test_it_is_not_dumpable(tmp_path: Path) -> None:
    async def body(_: RecorderClient, __: RecorderClient, process: RecorderProcess) -> None:
        with pytest.raises(PermissionError):
            Path(f"/proc/{process.pid}/mem").read_bytes()

    with_recorder(tmp_path / "audit", body)


def test_unknown_clients_are_not_served(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    argv = [
        sys.executable,
        "-m",
        "ringfence.record",
        str(tmp_path / "audit"),
        f"agent:{theirs.fileno()}",
    ]
    done = subprocess.run(argv, pass_fds=[theirs.fileno()], timeout=30, check=False)
    ours.close()
    theirs.close()
    assert done.returncode == 2
    assert not (tmp_path / "audit").exists()


def test_it_starts_without_pydantic(tmp_path: Path) -> None:
    script = "import sys, ringfence.record.process; print(sorted(sys.modules))"
    out = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    assert "'ringfence.record.shapes'" in out
    for name in ("pydantic", "asyncio", "rich", "typer", "claude_agent_sdk"):
        assert f"'{name}'" not in out


def test_the_fake_keeps_the_contract() -> None:
    async def run() -> None:
        fake = MemoryRecorder()
        recorder: Recorder = fake
        assert await recorder.append(STARTED) == 0
        assert await recorder.append(STARTED, durable=False) == -1
        assert recorder.hmac(b"a") == recorder.hmac(b"a") != recorder.hmac(b"b")
        with pytest.raises(ValueError, match="union_tag_invalid"):
            await fake.append_fields({"type": "no.such"})
        fake.kill()
        with pytest.raises(UnavailableError):
            await recorder.append(STARTED)
        await recorder.close()
        assert [r["source"] for r in fake.of_type("run.started")] == ["worker"] * 2

    asyncio.run(run())
