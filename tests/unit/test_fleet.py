"""The supervisor with small programs, and what it decides."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import structlog

from ringfence.cli.fleet import _run, read_buckets
from ringfence.cli.serve import inherited, log_to_stderr
from ringfence.cli.up import announce
from ringfence.config import load_config
from ringfence.control import keys
from ringfence.errors import CallerError, UnavailableError
from ringfence.fleet.plan import Member, Numbers, Rank, log_line, members, pause_after
from ringfence.fleet.services import postgresql, temporal
from ringfence.fleet.supervisor import Fleet, _Keeper, _named
from ringfence.wiring import platform

SERVES = """
import os, signal, sys, time
log = open(sys.argv[1], "a", buffering=1)
def end(*_):
    log.write(f"end {sys.argv[2]}\\n")
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
log.write(f"begin {sys.argv[2]} {os.getpid()}\\n")
print("ready", flush=True)
while True:
    time.sleep(0.02)
"""


def test_pauses_double_while_a_member_cannot_live() -> None:
    pauses, last = [], 0.0
    for _ in range(10):
        last = pause_after(1.0, last)
        pauses.append(last)
    assert pauses == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30.0, 30.0]
    assert pause_after(60.0, last) == 0.2


def test_a_line_says_whose_it_is_and_stays_json() -> None:
    assert json.loads(log_line("a", '{"event": "x"}')) == {"process": "a", "event": "x"}
    for text in ("plain", "{}", '{"cut', 'quote " and \\ and \x1b'):
        assert json.loads(log_line("a", text)) == {"process": "a", "event": text}


def test_members_get_what_they_need_of_the_environment() -> None:
    workers = {
        *("ANTHROPIC_API_KEY", "RINGFENCE_SESSION_STORE", "RINGFENCE_BLOB_STORE", "RINGFENCE_S3"),
        *("RINGFENCE_S3__ACCESS_KEY_ID", "RINGFENCE_S3__secret_access_key"),
        *("RINGFENCE_LIMITS", "RINGFENCE_LIMITS__REDIS", "ringfence_limits__redis"),
        *("RINGFENCE_SECRETS", "RINGFENCE_SECRETS__OPENBAO__TOKEN"),
    }
    gateways = {"RINGFENCE_WEBHOOKS", "RINGFENCE_WEBHOOKS__TEAM__SECRET"}
    both = {
        *("HOME", "PATH", "LC_ALL", "https_proxy", "SSL_CERT_FILE", "PGPASSFILE"),
        *("RINGFENCE_DATABASE", "RINGFENCE_FILE_STORE", "RINGFENCE_STATE_DIR", "RINGFENCE_LOG"),
    }
    buckets = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_WEB_IDENTITY_TOKEN_FILE"}
    nobody = {
        *("GITHUB_TOKEN", "OPENAI_API_KEY", "GOOGLE_APPLICATION_CREDENTIALS", "CLAUDE_CONFIG_DIR"),
        *("ANTHROPIC_AUTH_TOKEN", "RINGFENCE_API_KEY", "RINGFENCE_URL", "SSH_AUTH_SOCK"),
        "RINGFENCE_PLAIN_HTTP",
    }
    environment = dict.fromkeys([*workers, *gateways, *both, *buckets, *nobody], "x")
    for readers in (frozenset[Rank](), frozenset({Rank.WORKER})):
        numbers = Numbers(
            gateways=2, workers=3, slots=4, drain=5.0, environment=environment, buckets=readers
        )
        made = members(("ringfence",), numbers, 7)
        assert [one.name for one in made] == [
            *("gateway-1", "gateway-2", "worker-1", "worker-2", "worker-3")
        ]
        for one in made:
            alone = workers if one.rank is Rank.WORKER else gateways
            cloud = buckets if one.rank in readers else set()
            assert set(one.environment) == both | alone | cloud
            assert one.descriptors == ((7,) if one.rank is Rank.GATEWAY else ())


@pytest.mark.parametrize(
    ("settings", "readers"),
    [
        ({}, set()),
        ({"RINGFENCE_BLOB_STORE": "/srv/blobs"}, set()),
        ({"RINGFENCE_BLOB_STORE": "s3://b/p"}, {Rank.WORKER}),
        ({"RINGFENCE_SESSION_STORE": "s3://b/p"}, {Rank.WORKER}),
        # half a key is none
        (
            {"RINGFENCE_BLOB_STORE": "s3://b", "RINGFENCE_S3__ACCESS_KEY_ID": "k"},
            {Rank.WORKER},
        ),
        (
            {
                "RINGFENCE_BLOB_STORE": "s3://b",
                "RINGFENCE_S3__ACCESS_KEY_ID": "k",
                "RINGFENCE_S3__SECRET_ACCESS_KEY": "s",
            },
            set(),
        ),
    ],
)
def test_who_reads_buckets_is_a_matter_of_the_settings(
    tmp_path: Path, settings: dict[str, str], readers: set[Rank]
) -> None:
    assert read_buckets(load_config({"RINGFENCE_STATE_DIR": str(tmp_path), **settings})) == readers


def test_a_key_is_told_whoever_has_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Left(io.StringIO):
        def write(self, _: str) -> int:
            raise BrokenPipeError

    for stream in (Left(), None):
        monkeypatch.setattr(sys, "stderr", stream)
        announce("http://127.0.0.1:1", "rfk_x", json=False)
        assert capsys.readouterr().out == "http://127.0.0.1:1\nrfk_x\n"


def test_ready_is_what_begins_a_line_of_a_gateway_s_standard_output() -> None:
    numbers = Numbers(gateways=1, workers=1, slots=4, drain=5.0)
    gateway, worker = members(("ringfence",), numbers, 7)
    assert gateway.says_ready("http://127.0.0.1:8470", out=True)
    assert not gateway.says_ready("http://127.0.0.1:8470", out=False)
    assert not gateway.says_ready("see http://127.0.0.1:8470", out=True)
    assert worker.says_ready('{"slots": 4, "event": "worker.ready"}', out=False)


def test_only_a_listening_socket_is_taken_over() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        taken = inherited(os.dup(listener.fileno()))
        assert taken.getsockname()[1] == port
        taken.close()
    with socket.socket() as silent, open(os.devnull) as file:
        for other in (silent.fileno(), file.fileno(), 1_000_000):
            with pytest.raises(CallerError) as caught:
                inherited(other)
            assert caught.value.code == "usage"


def test_services_that_are_not_installed_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    for make in (lambda: postgresql(tmp_path, tmp_path), lambda: temporal(tmp_path)):
        with pytest.raises(UnavailableError) as caught:
            make()
        assert caught.value.code == "platform-missing"
        assert "ringfence[services]" in caught.value.hint


def member(name: str, rank: Rank, code: str, *arguments: str, **more: Any) -> Member:
    argv = (sys.executable, "-I", "-S", "-c", code, *arguments)
    return Member(name=name, rank=rank, argv=argv, ready="ready", environment={}, **more)


def serving(log: Path, name: str, rank: Rank) -> Member:
    return member(name, rank, SERVES, str(log), name)


async def until(condition: Any, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.02)


async def test_ranks_begin_in_order_end_in_reverse_and_what_dies_is_begun_again(
    tmp_path: Path,
) -> None:
    log, said = tmp_path / "log", []
    log.touch()
    ranks = {"s": Rank.SERVICE, "g": Rank.GATEWAY, "w": Rank.WORKER}
    fleet = Fleet([serving(log, name, rank) for name, rank in ranks.items()], said.append)
    stop, told = asyncio.Event(), []
    hooks = {Rank.SERVICE: lambda: told.append("s"), Rank.WORKER: lambda: told.append("w")}
    running = asyncio.ensure_future(fleet.run(stop, on_ready=hooks))
    await until(lambda: told == ["s", "w"])
    begun = [line.split()[1] for line in log.read_text().splitlines()]
    assert begun == ["s", "g", "w"]
    pid = int(log.read_text().splitlines()[1].split()[2])
    os.kill(pid, signal.SIGKILL)
    await until(lambda: log.read_text().count("begin g ") == 2)
    # Popen returned to it before: told to end in this moment it might not have its handler yet
    await until(lambda: said.count('{"process": "g", "event": "ready"}') == 2)
    stop.set()
    await running
    ended = [line.split()[1] for line in log.read_text().splitlines() if line.startswith("end")]
    assert ended == ["w", "g", "s"]


async def test_one_that_cannot_be_started_ends_all(tmp_path: Path) -> None:
    log, said = tmp_path / "log", []
    log.touch()
    broken = member("b", Rank.WORKER, "import sys; sys.exit('no good')")
    fleet = Fleet([serving(log, "g", Rank.GATEWAY), broken], said.append)
    with pytest.raises(UnavailableError) as caught:
        await fleet.run(asyncio.Event())
    assert caught.value.code == "member-ended"
    assert "b ended with status 1" in caught.value.message
    assert log.read_text().splitlines()[-1] == "end g"
    assert {"process": "b", "event": "no good"} in [json.loads(line) for line in said]


async def test_one_that_does_not_heed_is_killed() -> None:
    deaf = (
        "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "print('ready', os.getpid(), flush=True); time.sleep(600)"
    )
    stop, said = asyncio.Event(), []
    fleet = Fleet([member("d", Rank.WORKER, deaf, grace_seconds=0.3)], said.append)
    with structlog.testing.capture_logs() as logged:
        await fleet.run(stop, on_ready={Rank.WORKER: stop.set})
    assert [one["member"] for one in logged if one["event"] == "fleet.killed"] == ["d"]
    with pytest.raises(ProcessLookupError):
        os.kill(int(json.loads(said[0])["event"].split()[1]), 0)


class Unread:
    """Standard error whose reader has gone."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    def flush(self) -> None:
        raise OSError(errno.EIO, "Input/output error")


async def test_a_lost_reader_of_the_log_ends_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    log.touch()
    monkeypatch.setattr(sys, "stderr", Unread())
    before = structlog.get_config()
    log_to_stderr()
    stop = asyncio.Event()
    fleet = Fleet([serving(log, "g", Rank.GATEWAY), serving(log, "w", Rank.WORKER)])
    try:
        await fleet.run(stop, on_ready={Rank.WORKER: stop.set})
    finally:
        structlog.configure(**before)
    ended = [line for line in log.read_text().splitlines() if line.startswith("end")]
    assert ended == ["end w", "end g"]


LEAVES_A_CHILD = """
import os, sys, time
child = os.fork()
if child == 0:
    time.sleep(600)
    os._exit(0)
with open(sys.argv[1], "a") as log:
    log.write(f"{os.getpid()} {child}\\n")
print("ready", flush=True)
time.sleep(600)
"""


async def test_a_descendant_that_holds_its_pipes_does_not_keep_a_member_from_its_next_life(
    tmp_path: Path,
) -> None:
    log, stop, served = tmp_path / "log", asyncio.Event(), asyncio.Event()
    log.touch()
    one = member("w", Rank.WORKER, LEAVES_A_CHILD, str(log))
    running = asyncio.ensure_future(
        Fleet([one], lambda _: None).run(stop, on_ready={Rank.WORKER: served.set})
    )
    try:
        await asyncio.wait_for(served.wait(), 60)
        os.kill(int(log.read_text().split()[0]), signal.SIGKILL)
        await until(lambda: log.read_text().count("\n") == 2)
        stop.set()
        await asyncio.wait_for(running, 60)
    finally:
        for line in log.read_text().splitlines():
            os.kill(int(line.split()[1]), signal.SIGKILL)


async def test_a_process_is_waited_for_when_what_looked_after_it_has_failed(tmp_path: Path) -> None:
    keeper = _Keeper(serving(tmp_path / "log", "w", Rank.WORKER), lambda _: None)
    process: Any = SimpleNamespace(returncode=None)
    keeper._process = process
    failed = asyncio.ensure_future(asyncio.wait_for(asyncio.Event().wait(), 0))
    waiting = asyncio.ensure_future(keeper.gone(failed))  # type: ignore[arg-type]
    await asyncio.sleep(0.2)
    assert failed.done()
    assert not waiting.done()
    process.returncode = 0
    await asyncio.wait_for(waiting, 60)
    with pytest.raises(TimeoutError):
        await failed


def failing(monkeypatch: pytest.MonkeyPatch, *calls: int) -> list[int]:
    """Those forks fail, counted from 1."""
    made, real = [], asyncio.create_subprocess_exec

    async def begin(*arguments: Any, **more: Any) -> Any:
        made.append(len(made) + 1)
        if made[-1] in calls:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        return await real(*arguments, **more)

    monkeypatch.setattr("asyncio.create_subprocess_exec", begin)
    return made


async def test_a_fork_that_fails_is_a_life_that_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = failing(monkeypatch, 2, 3)
    log, stop, served = tmp_path / "log", asyncio.Event(), asyncio.Event()
    log.touch()
    running = asyncio.ensure_future(
        Fleet([serving(log, "g", Rank.GATEWAY)], lambda _: None).run(
            stop, on_ready={Rank.GATEWAY: served.set}
        )
    )
    await asyncio.wait_for(served.wait(), 60)
    os.kill(int(log.read_text().split()[2]), signal.SIGKILL)
    await until(lambda: log.read_text().count("begin") == 2)
    stop.set()
    await running
    assert made == [1, 2, 3, 4]


async def test_a_first_fork_that_fails_ends_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, 1)
    with pytest.raises(UnavailableError) as caught:
        await Fleet([serving(tmp_path / "log", "g", Rank.GATEWAY)]).run(asyncio.Event())
    assert caught.value.code == "member-ended"
    assert caught.value.message == "g cannot be started: resource temporarily unavailable"


def test_a_stale_file_names_nobody(tmp_path: Path) -> None:
    """Only a process of the session that the member began is told to end by its number."""
    file = tmp_path / "postmaster.pid"
    session = os.getsid(0)
    assert _named(None, session) is None
    assert _named(str(file), session) is None
    for text in ("", "\n", "x", "0", "-1", str(10**30), str(2**31 - 1)):
        file.write_text(text)
        assert _named(str(file), session) is None, text
    file.write_text(f"{os.getpid()}\n/var/lib\n")
    assert _named(str(file), session) == os.getpid()
    assert _named(str(file), session + 1) is None


@pytest.mark.parametrize("comes_up", [False, True])
async def test_the_first_key_is_made_when_it_can_be_shown(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *,
    comes_up: bool,
) -> None:
    class Coming:
        def __init__(self, members: Any) -> None:
            pass

        async def run(self, stop: Any, *, on_ready: Any) -> None:
            await on_ready[Rank.SERVICE]()
            if not comes_up:
                raise UnavailableError("member-ended", "no")
            await on_ready[Rank.WORKER]()

    monkeypatch.setattr("ringfence.cli.fleet.Fleet", Coming)
    environment = {"RINGFENCE_STATE_DIR": str(tmp_path)}
    state: Any = SimpleNamespace(platform_of=platform)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with contextlib.suppress(UnavailableError):
            await _run(state, listener, [], [], environment, asyncio.Event(), json=False)
    async with platform(load_config(environment)).opened() as database:
        async with database.writing() as connection:
            made = await keys.every(connection)
    assert len(made) == comes_up
    assert ("rfk_" in capsys.readouterr().out) == comes_up


def test_members_are_told_when_their_supervisor_is_killed(tmp_path: Path) -> None:
    """By the kernel: nothing of the supervisor's runs after SIGKILL."""
    log = tmp_path / "log"
    log.touch()
    code = f"""
import asyncio, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_fleet import serving
from ringfence.fleet.plan import Rank
from ringfence.fleet.supervisor import Fleet
asyncio.run(Fleet([serving(Path(sys.argv[1]), "g", Rank.GATEWAY)]).run(asyncio.Event()))
"""
    supervisor = subprocess.Popen([sys.executable, "-c", code, str(log)], stderr=subprocess.DEVNULL)
    try:
        asyncio.run(until(lambda: "begin g" in log.read_text()))
    finally:
        supervisor.kill()
        supervisor.wait()
    asyncio.run(until(lambda: "end g" in log.read_text()))
