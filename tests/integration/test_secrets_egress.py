"""Secrets on their way from real sources to an upstream, through real processes: they rotate, their
source goes away and comes back, and nobody else sees them.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from leaks import in_files, in_processes
from openbao import ROOT, Openbao, Relay
from ringfence.record.read import AuditReader
from secrets_rig import HOST, Placed, placed

FILE_CANARY, BAO_CANARY, SEALED_CANARY, UNIT_CANARY = (
    "cnry-file-0123456789-abcdef",
    "cnry-bao-0123456789-abcdef",
    "cnry-sealed-0123456789-abcdef",
    "cnry-systemd-0123456789-abcdef",
)


def a_file(directory: Path, value: str) -> Path:
    path = directory / "token"
    fresh = directory / "fresh"
    fresh.write_text(value)
    fresh.chmod(0o600)
    fresh.replace(path)
    return path


async def until_ends(pid: int, seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] == "Z":
                return True
        except FileNotFoundError:
            return True
        await asyncio.sleep(0.05)
    return False


async def test_a_mounted_file_is_read_at_use_and_again_after_ids_were_dropped(
    tmp_path: Path,
) -> None:
    tmp_path.chmod(0o700)  # egress's own uid could not read it
    path = a_file(tmp_path, FILE_CANARY)
    settings = {
        "credentials": {"gh": {"source": f"file://{path}", "hosts": [HOST], "paths": ["GET /x"]}},
        "max_age_seconds": 0.2,
    }
    async with placed(settings) as at:
        sandbox = await at.open()
        keeper = at.keeper
        at.upstream.accepted = {FILE_CANARY}
        status, _, body = await at.get(sandbox)
        assert status == 200
        assert body == b"you showed Bearer [redacted]"
        assert at.upstream.seen == [("/x", f"Bearer {FILE_CANARY}")]
        # as the operator bounds it, whatever the policy says
        assert (await at.get(sandbox, "/y"))[:2] == (403, "credential-not-for-path")
        assert len(at.upstream.seen) == 1
        new = FILE_CANARY[::-1]
        a_file(tmp_path, new)
        await asyncio.sleep(0.3)
        at.upstream.accepted = {new}
        status, _, body = await at.get(sandbox)
        assert (status, body) == (200, b"you showed Bearer [redacted]")
        path.unlink()
        await asyncio.sleep(0.3)
        assert (await at.get(sandbox))[:2] == (403, "credential-absent")
        a_file(tmp_path, new)
        await asyncio.sleep(1.2)
        assert (await at.get(sandbox))[0] == 200
    assert await until_ends(keeper)


POLICY = 'path "secret/data/egress/*" { capabilities = ["read"] }'


class Bao:
    """An OpenBao behind a relay, and the settings that lead to it."""

    def __init__(self, server: Openbao, directory: Path) -> None:
        self.server, self.relay = server, Relay(server.port)
        server.policy("egress", POLICY)
        self.token_file = directory / "vault-token"
        self.token_file.touch(0o600)
        self.token_file.write_text(server.token("egress", ttl="1h"))
        self.path = f"egress/{directory.name}"

    def put(self, value: str) -> None:
        self.server.put(self.path, token=value)

    def settings(self, **more: Any) -> dict[str, Any]:
        return {
            "credentials": {"gh": {"source": f"vault://secret/{self.path}#token"}},
            "vault": {
                "address": f"https://127.0.0.1:{self.relay.port}",
                "ca_file": str(self.server.ca_file),
                "token_file": str(self.token_file),
            },
            "timeout_seconds": 30.0,
            **more,
        }


@pytest.fixture
def bao(openbao_server: Openbao, tmp_path: Path) -> Iterator[Bao]:
    one = Bao(openbao_server, tmp_path)
    yield one
    one.relay.close()


async def test_while_the_vault_is_away_values_last_and_then_the_answer_is_unavailable(
    bao: Bao,
) -> None:
    bao.put(BAO_CANARY)
    async with placed(bao.settings(max_age_seconds=0.2, stale_seconds=2.0)) as at:
        sandbox = await at.open()
        at.upstream.accepted = {BAO_CANARY}
        for _ in range(20):  # a value that took its time to come is over when it is there
            if (await at.get(sandbox))[0] == 200:
                break
        assert (await at.get(sandbox))[0] == 200
        with bao.relay.cut():
            await asyncio.sleep(0.3)
            assert (await at.get(sandbox))[0] == 200
            await asyncio.sleep(2.2)
            status, reason, body = await at.get(sandbox)
            assert (status, reason) == (503, "credential-unavailable")
            assert BAO_CANARY.encode() not in body
            seen = len(at.upstream.seen)
            assert (await at.get(sandbox))[0] == 503
            assert len(at.upstream.seen) == seen  # nothing goes out without it
        for _ in range(100):
            if (await at.get(sandbox))[0] == 200:
                break
            await asyncio.sleep(0.2)
        assert (await at.get(sandbox))[0] == 200


async def rotate(at: Placed, bao: Bao, *, rounds: int, clients: int, outage: bool) -> list[Any]:
    """Change the value under load; the upstream takes old and new while it is changed."""
    sandbox = await at.open()
    value = f"{BAO_CANARY}-0"
    bao.put(value)
    at.upstream.accepted = {value}
    over, failed, done = threading.Event(), [], []

    def load() -> None:
        client = at.client(sandbox)
        while not over.is_set():
            answer = client.get()
            (done if answer[0] == 200 else failed).append(answer)
            time.sleep(0.005)
        client.close()

    threads = [threading.Thread(target=load) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        while len(at.upstream.seen) < 2 * clients:
            await asyncio.sleep(0.02)
        for number in range(1, rounds + 1):
            new = f"{BAO_CANARY}-{number}"
            at.upstream.accepted = {value, new}
            await asyncio.to_thread(bao.put, new)
            before = len(at.upstream.seen)
            # by what is shown, not by the clock: the machine may be slow
            for _ in range(1200):
                last = [shown for _, shown in at.upstream.seen[before:][-3 * clients :]]
                if len(last) >= 3 * clients and set(last) == {f"Bearer {new}"}:
                    break
                await asyncio.sleep(0.05)
            else:
                raise AssertionError("the new value was never used")
            at.upstream.accepted = {new}
            value = new
            if outage and number % 3 == 0:
                with bao.relay.cut():
                    await asyncio.sleep(1.5)
    finally:
        over.set()
        for thread in threads:
            await asyncio.to_thread(thread.join, 60)
    assert len(done) > rounds * clients
    shown = {text for _, text in at.upstream.seen}
    assert shown == {f"Bearer {BAO_CANARY}-{number}" for number in range(rounds + 1)}
    return failed


async def test_a_value_changes_under_load_and_no_request_fails(bao: Bao) -> None:
    async with placed(bao.settings(max_age_seconds=0.3)) as at:
        assert await rotate(at, bao, rounds=2, clients=3, outage=False) == []


@pytest.mark.storm
async def test_many_changes_and_outages_under_load_fail_no_request(bao: Bao) -> None:
    async with placed(bao.settings(max_age_seconds=0.5)) as at:
        assert await rotate(at, bao, rounds=15, clients=12, outage=True) == []


async def test_no_value_is_seen_by_anybody_outside_egress(
    bao: Bao, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One canary of each source that root has; what opens the vault counts, too."""
    from ringfence.vault.keys import VaultPaths
    from ringfence.vault.seal import set_credential

    bao.put(BAO_CANARY)
    path = a_file(tmp_path, FILE_CANARY)
    settings = bao.settings(max_age_seconds=0.2)
    settings["credentials"] |= {
        "file": {"source": f"file://{path}"},
        "sealed": {"source": "sealed://own"},
        "unit": {"source": "credential://unit"},
        "lost": {"source": "file:///nowhere/at/all"},
    }
    (tmp_path / "systemd").mkdir()
    (tmp_path / "systemd" / "unit").touch(0o600)
    (tmp_path / "systemd" / "unit").write_text(UNIT_CANARY)
    (tmp_path / "systemd" / "unit").chmod(0o400)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path / "systemd"))
    values = {BAO_CANARY, FILE_CANARY, SEALED_CANARY, UNIT_CANARY}
    canaries = [*values, bao.token_file.read_text()]
    async with placed(settings) as at:
        set_credential(VaultPaths(at.state), "own", SEALED_CANARY, (HOST,))
        at.upstream.accepted = values
        bodies = []
        for name in ("gh", "file", "sealed", "unit"):
            status, _, body = await at.get(await at.open(f"sb_{name}", name))
            assert status == 200
            bodies.append(body)
        status, reason, body = await at.get(await at.open("sb_lost", "lost"))
        assert (status, reason) == (403, "credential-absent")
        at.upstream.accepted = set()  # an error of the upstream repeats it, too
        bodies += [body, (await at.get(at.state / "sb_gh.sock"))[2]]
        assert {text for _, text in at.upstream.seen} == {f"Bearer {one}" for one in values}
        ours = {at.egress.pid, at.keeper}
        looked = in_processes(canaries)
        assert ours <= looked  # of these, too: neither environment nor command line holds one
        for pid in ours:
            limits = Path(f"/proc/{pid}/limits").read_text()
            line = next(one for one in limits.splitlines() if one.startswith("Max core file size"))
            assert line.split()[4:6] == ["0", "0"], line
        # not dumpable, and so root's (proc(5)); of the keeper, which is root's here, a test below
        assert Path(f"/proc/{at.egress.pid}/environ").stat().st_uid == 0
        assert in_files(at.state, canaries) == []
        shown = repr(at.notices).encode() + b"".join(bodies)
        assert not [one for one in canaries if one.encode() in shown]
        assert of_kind(at, "credential.resolved")
        assert of_kind(at, "credential.unresolved")
    assert in_files(at.state, canaries) == []


KEEPER = """
import ctypes, os, sys
import ringfence.keeper, ringfence.vault.keeper, ringfence.wiring
if os.geteuid() == 0:
    os.setgroups([])
    os.setresgid(1_999_999, 1_999_999, 1_999_999)
    os.setresuid(1_999_999, 1_999_999, 1_999_999)
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # as after an exec: a change of ids ends it
print(flush=True)
sys.stdin.readline()
sys.exit(ringfence.keeper.main(sys.argv[1:]))
"""


def test_a_keepers_memory_is_open_to_nobody_of_its_own_uid() -> None:
    """Whose the files of a process are below /proc says whether it is dumpable, of any uid but
    root. It drops ids when all is imported: they may not read the interpreter's directories.
    """
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            keeper = subprocess.Popen(
                [sys.executable, "-P", "-c", KEEPER, str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                cwd="/",
            )
        assert keeper.stdin is not None
        assert keeper.stdout is not None
        place = Path(f"/proc/{keeper.pid}")
        try:
            assert keeper.stdout.readline() == b"\n"
            uids = next(one for one in (place / "status").read_text().splitlines() if one.startswith("Uid:"))  # fmt: skip
            uid = int(uids.split()[1])
            assert uid != 0
            assert (place / "environ").stat().st_uid == uid  # before it shuts itself
            keeper.stdin.write(b"\n")
            keeper.stdin.flush()
            end = time.monotonic() + 60
            while (place / "environ").stat().st_uid != 0:
                assert time.monotonic() < end
                assert keeper.poll() is None
                time.sleep(0.02)
        finally:
            ours.shutdown(socket.SHUT_RDWR)  # it ends with its other end
            keeper.communicate(timeout=60)
    assert keeper.returncode == 0


async def test_a_401_brings_the_new_value_and_a_storm_of_them_hammers_nobody(
    tmp_path: Path,
) -> None:
    """A value that would be used for an hour; it is two seconds old at least when it is doubted."""
    path = a_file(tmp_path, FILE_CANARY)
    settings = {"credentials": {"gh": {"source": f"file://{path}"}}, "max_age_seconds": 3600.0}
    async with placed(settings) as at:
        sandbox = await at.open()
        at.upstream.accepted = {FILE_CANARY}
        assert (await at.get(sandbox))[0] == 200
        new = FILE_CANARY[::-1]
        a_file(tmp_path, new)
        at.upstream.accepted = {new}
        await asyncio.sleep(2.1)
        assert (await at.get(sandbox))[:2] == (401, "")
        assert (await at.get(sandbox))[0] == 200
        at.upstream.accepted = set()

        def storm() -> set[int]:
            client, end, seen = at.client(sandbox), time.monotonic() + 5, set()
            while time.monotonic() < end:
                seen.add(client.get()[0])
                time.sleep(0.01)
            client.close()
            return seen

        before = len(of_kind(at, "credential.resolved"))
        assert await asyncio.to_thread(storm) == {401}
        assert len(at.upstream.seen) > 50
        await asyncio.sleep(0.2)
        assert len(of_kind(at, "credential.resolved")) - before <= 2


async def test_without_a_keeper_values_last_as_long_as_they_may_and_nothing_falls_back(
    tmp_path: Path,
) -> None:
    """The starter is killed, too: nobody is left who could start another."""
    path = a_file(tmp_path, FILE_CANARY)
    settings = {
        "credentials": {"gh": {"source": f"file://{path}"}, "other": {"source": f"file://{path}"}},
        "max_age_seconds": 0.2,
    }
    async with placed(settings) as at:
        sandbox, never = await at.open(), await at.open("sb_2", "other")
        at.upstream.accepted = {FILE_CANARY}
        assert (await at.get(sandbox))[0] == 200
        keeper = at.keeper
        os.kill(at.starter, 9)
        await asyncio.sleep(0.3)
        assert (await at.get(sandbox))[0] == 200  # the keeper serves on without it
        os.kill(keeper, 9)
        await asyncio.sleep(0.3)
        assert (await at.get(sandbox))[0] == 200
        seen = len(at.upstream.seen)
        assert (await at.get(never))[:2] == (503, "credential-unavailable")
        assert len(at.upstream.seen) == seen


def many(path: Path, count: int) -> dict[str, Any]:
    """Settings of credentials that are each asked for once: whoever asks needs a keeper."""
    source = {"source": f"file://{path}"}
    return {"credentials": {f"c{number}": source for number in range(count)}}


async def killed(at: Placed, *, kills: int, clients: int) -> list[Any]:
    """SIGKILL to one keeper after another under load; answers other than 200. The starter is held
    while they die, so that in each gap there are requests that wait.
    """
    names = sorted(at.names)
    todo = [await at.open(f"sb_{name}", name) for name in names]
    at.upstream.accepted = {FILE_CANARY}
    failed, done, each = [], [], len(names) // (kills + 1)

    async def load() -> None:
        while todo:
            answer = await at.get(todo.pop())
            (done if answer[0] == 200 else failed).append(answer)

    loading = [asyncio.ensure_future(load()) for _ in range(clients)]
    for number in range(1, kills + 1):
        await until(lambda least=number * each - clients: len(done) + len(failed) >= least)
        keeper, starter = at.keeper, at.starter
        os.kill(starter, signal.SIGSTOP)
        os.kill(keeper, 9)
        await asyncio.sleep(0.3)
        os.kill(starter, signal.SIGCONT)
        await asyncio.to_thread(at.keeper_after, keeper)
    await asyncio.gather(*loading)
    assert len(done) + len(failed) == len(names)
    assert {shown for _, shown in at.upstream.seen} == {f"Bearer {FILE_CANARY}"}
    await until(lambda: len(of_kind(at, "keeper.ended")) == kills)
    assert all(b"signal 9" in one for one in of_kind(at, "keeper.ended"))
    return failed


async def until(holds: Callable[[], bool], seconds: float = 90.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        await asyncio.sleep(0.02)


def audit_of(at: Placed) -> list[bytes]:
    """Each record once: in the files of SQLite one may stand several times."""
    with AuditReader(at.state / "audit") as reader:
        return [body for _, body in reader.bodies()]


def of_kind(at: Placed, kind: str) -> list[bytes]:
    return [body for body in audit_of(at) if f'"type":"{kind}"'.encode() in body]


async def test_a_keeper_that_is_killed_under_load_is_started_again_and_no_request_fails(
    tmp_path: Path,
) -> None:
    async with placed(many(a_file(tmp_path, FILE_CANARY), 24)) as at:
        assert await killed(at, kills=2, clients=4) == []
        last = at.keeper
    assert await until_ends(last)  # of those that follow each ends with egress, too


@pytest.mark.storm
async def test_keepers_that_are_killed_all_the_time_are_started_ever_more_slowly(
    tmp_path: Path,
) -> None:
    async with placed(many(a_file(tmp_path, FILE_CANARY), 210)) as at:
        begun = time.monotonic()
        assert await killed(at, kills=6, clients=12) == []
        assert time.monotonic() - begun >= 0.5 + 1 + 2 + 4 + 8


async def test_a_keeper_that_is_gone_for_too_long_is_a_clear_answer_and_comes_back(
    tmp_path: Path,
) -> None:
    """Its starter is stopped, as on a host that swaps: the request waits for its time."""
    settings = {**many(a_file(tmp_path, FILE_CANARY), 1), "timeout_seconds": 0.1}
    async with placed(settings) as at:
        sandbox, keeper, starter = await at.open("sb_1", "c0"), at.keeper, at.starter
        at.upstream.accepted = {FILE_CANARY}
        os.kill(starter, signal.SIGSTOP)
        try:
            os.kill(keeper, 9)
            assert (await at.get(sandbox))[:2] == (503, "credential-unavailable")
            assert at.upstream.seen == []
        finally:
            os.kill(starter, signal.SIGCONT)
        for _ in range(100):
            if (await at.get(sandbox))[0] == 200:
                break
            await asyncio.sleep(0.2)
        assert (await at.get(sandbox))[0] == 200


def test_sources_are_asked_without_a_value(bao: Bao, tmp_path: Path) -> None:
    """`vault sources check` and `ringfence check`, by the keeper that tells none."""
    from types import SimpleNamespace

    from typer.testing import CliRunner

    from ringfence.check.finding import Outcome
    from ringfence.check.secrets import judge
    from ringfence.cli import vault
    from ringfence.config.secrets import SecretSettings
    from ringfence.egress.keeping import KeeperLink
    from ringfence.egress.sources import look

    bao.put(BAO_CANARY)
    values = bao.settings()
    values["credentials"]["gone"] = {"source": "file:///nowhere/at/all"}
    settings = SecretSettings.model_validate(values)
    config = SimpleNamespace(secrets=settings, providers={})
    state = SimpleNamespace(config=config, state_dir=tmp_path)
    done = CliRunner().invoke(vault.app, ["sources", "check", "--json"], obj=state)
    assert done.exit_code == 4
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    assert rows["gh"]["ok"]
    assert rows["gh"]["version"] == "1"
    assert (rows["gone"]["ok"], rows["gone"]["code"]) == (False, "secret-absent")
    listed = CliRunner().invoke(vault.app, ["sources", "list"], obj=state)
    assert values["credentials"]["gh"]["source"] in listed.stdout
    assert BAO_CANARY not in done.output + listed.output

    async def given() -> bytes:
        link = await KeeperLink.start(settings.model_dump(mode="json"), str(tmp_path), tells=False)
        try:
            return bytes((await link.ask("gh")).value)
        finally:
            await link.close()

    assert asyncio.run(given()) == b""
    states = asyncio.run(look(settings, tmp_path))
    assert judge(states).outcome is Outcome.FAIL
    assert "gone: secret-absent" in judge(states).evidence
    assert "name where it is" in judge(states).evidence  # each with its own mend
    assert judge([one for one in states if one.good]).outcome is Outcome.PASS
    assert judge([]).outcome is Outcome.NOT_AVAILABLE
    assert ROOT not in repr(states)

    def said(name: str) -> Any:
        again = CliRunner().invoke(vault.app, ["sources", "check", "--json"], obj=state)
        assert again.exit_code == 4
        return next(row for row in json.loads(again.stdout) if row["name"] == name)

    with bao.relay.cut():
        row = said("gh")
    assert (row["code"], row["hint"]) == (
        "secret-unreachable",
        "see that vault can be reached from this host",
    )
    bao.server.call("POST", "auth/token/revoke", {"token": bao.token_file.read_text()})
    row = said("gh")
    assert row["code"] == "secret-denied"
    assert "has ended" in row["message"]
    assert row["hint"] == f"write a new token to {bao.token_file}"


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
async def test_git_clones_over_https_with_a_password_that_it_never_has(tmp_path: Path) -> None:
    """The real git on both sides, HTTP's Basic scheme between egress and the server."""
    path = a_file(tmp_path, FILE_CANARY)
    settings = {"credentials": {"gh": {"source": f"file://{path}"}}}
    basic = base64.b64encode(f"x-access-token:{FILE_CANARY}".encode()).decode()
    async with placed(settings) as at:
        at.upstream.repositories.mkdir()
        here = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "GIT_TERMINAL_PROMPT": "0"}
        here |= {f"GIT_{who}_{what}": "x@y.z" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}  # fmt: skip

        def git(*words: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                ["git", *words],
                env=here,
                cwd=tmp_path,
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )

        assert git("init", "-q", "work").returncode == 0
        assert git("-C", "work", "commit", "-qm", "one", "--allow-empty").returncode == 0
        repository = str(at.upstream.repositories / "site.git")
        assert git("clone", "-q", "--bare", "work", repository).returncode == 0
        right = await at.open(user="x-access-token", template="Basic {}")
        wrong = await at.open("sb_2")  # as Bearer, which this server does not take
        at.upstream.accepted = {basic}
        for sandbox, good in ((right, True), (wrong, False)):
            relay = Relay(sandbox)
            flags = [
                f"http.proxy=http://127.0.0.1:{relay.port}",
                f"http.sslCAInfo={at.state / 'ca' / 'ca.pem'}",
            ]
            words = [word for flag in flags for word in ("-c", flag)]
            done = await asyncio.to_thread(
                git, *words, "clone", "-q", f"https://{HOST}/site.git", f"copy-{good}"
            )
            relay.close()
            assert (done.returncode == 0) is good, done.stderr
            assert FILE_CANARY not in done.stdout + done.stderr
        log = git("-C", "copy-True", "log", "--format=%s")
        assert log.stdout == "one\n"
        assert {shown for _, shown in at.upstream.seen} == {
            f"Basic {basic}",
            f"Bearer {FILE_CANARY}",
        }
        path.unlink()
        assert in_files(tmp_path, [FILE_CANARY, basic]) == []
