"""The contract of a sandbox, one test a clause; every backend passes it unchanged.

Subclass `SandboxContract`, give it a `backend` fixture, and pytest collects the clauses. Every
denial has an allowed twin in the same clause or beside it, so that a place in which nothing works
cannot pass for a safe one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ringfence.errors import CallerError, DeniedError, RingfenceError, UnavailableError
from ringfence.model import WorkspaceMode
from ringfence.policy.compiled import Limits, SandboxProfile
from ringfence.sandbox.protocol import (
    Backend,
    ChangeKind,
    Control,
    Sandbox,
    SandboxSpec,
)

_ID = "sb_" + "0" * 25
_SECONDS = 60


class SandboxContract:
    """Clauses. Override `backend`; narrow `accepted` to what the host cannot enforce."""

    @pytest.fixture
    def backend(self, tmp_path: Path) -> Backend:
        """The technology under test."""
        raise NotImplementedError("a subclass names the backend")

    @pytest.fixture
    def place(self, tmp_path: Path) -> Path:
        """A 0700 directory with a workspace in it, as under a person's home."""
        (tmp_path / "workspace").mkdir()
        (tmp_path / "workspace" / "file.txt").write_text("content\n")
        (tmp_path / "state").mkdir(mode=0o700, exist_ok=True)
        tmp_path.chmod(0o700)
        return tmp_path

    def accepted(self, backend: Backend) -> frozenset[str]:
        """Limits that this host does not enforce, as the backend itself says."""
        limits = {Control.MEMORY, Control.CPU, Control.PIDS, Control.WORKSPACE_DISK}
        return frozenset(
            state.control.value
            for state in backend.probe(SandboxProfile(workspace_mode=WorkspaceMode.DIRECT))
            if state.control in limits and not state.enforced
        )

    def spec(self, backend: Backend, place: Path, number: int = 0, **profile: Any) -> SandboxSpec:
        """One sandbox to start, with fields of the profile replaced."""
        base = SandboxProfile(
            accept_unenforced=self.accepted(backend),
            limits=Limits(memory_mb=256, pids=64, disk_mb=64, cpus=1.0, file_mb=32),
        )
        return SandboxSpec(
            sandbox_id=f"{_ID}{number}",
            profile=replace(base, **profile),
            workspace=place / "workspace",
            state_dir=place / "state",
        )

    @asynccontextmanager
    async def started(self, backend: Backend, spec: SandboxSpec) -> Any:
        """A sandbox that is closed whatever happens."""
        sandbox = await backend.start(spec)
        try:
            yield sandbox
        finally:
            await sandbox.close()

    def run(self, work: Callable[[], Awaitable[None]]) -> None:
        """Run a clause under a time limit of its own."""

        async def limited() -> None:
            async with asyncio.timeout(_SECONDS):
                await work()

        asyncio.run(limited())

    def inside(self, backend: Backend, spec: SandboxSpec, command: str) -> tuple[int, str]:
        """Exit status and output of one shell command in a fresh sandbox."""
        result: list[tuple[int, str]] = []

        async def work() -> None:
            async with self.started(backend, spec) as sandbox:
                result.append(await shell(sandbox, command))

        self.run(work)
        return result[0]

    # running programs

    def test_exit_status_and_output(self, backend: Backend, place: Path) -> None:
        """Exit statuses pass through; output arrives whole."""
        spec = self.spec(backend, place)
        assert self.inside(backend, spec, "echo hello; exit 7") == (7, "hello\n")
        assert self.inside(backend, spec, "head -c 3000000 /dev/zero | wc -c")[1] == "3000000\n"

    def test_stdin_and_stderr(self, backend: Backend, place: Path) -> None:
        """Standard input ends when it is closed; the tail of standard error is kept."""

        async def work() -> None:
            async with self.started(backend, self.spec(backend, place)) as sandbox:
                process = await sandbox.exec(["sh", "-c", "cat; echo oops >&2"])
                await process.write(b"line\n")
                await process.close_stdin()
                output = b""
                while chunk := await process.read():
                    output += chunk
                assert await process.wait() == 0
                assert output == b"line\n"
                assert await process.stderr() == b"oops\n"

        self.run(work)

    def test_a_program_that_does_not_exist(self, backend: Backend, place: Path) -> None:
        """127, as shells say, and never a hang."""

        async def work() -> None:
            async with self.started(backend, self.spec(backend, place)) as sandbox:
                process = await sandbox.exec(["/no/such/program"])
                assert await process.wait() == 127

        self.run(work)

    def test_the_environment_is_only_what_is_given(
        self, backend: Backend, place: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Nothing of the host's environment is inside."""
        monkeypatch.setenv("HOST_SECRET", "canary")

        async def work() -> None:
            async with self.started(backend, self.spec(backend, place)) as sandbox:
                process = await sandbox.exec(["env"], environment={"GIVEN": "yes"})
                output = b""
                while chunk := await process.read():
                    output += chunk
                assert b"GIVEN=yes" in output
                assert b"canary" not in output
                assert b"HOME=/home/agent" in output

        self.run(work)

    def test_the_environment_is_for_nobody_else(self, backend: Backend, place: Path) -> None:
        """No command line shows it, neither to other users of the host nor inside."""
        canary = f"canary-{os.getpid()}"

        async def work() -> None:
            async with self.started(backend, self.spec(backend, place)) as sandbox:
                command = "cat /proc/[0-9]*/cmdline | tr '\\0' '\\n'; echo up; sleep 60"
                process = await sandbox.exec(
                    ["bash", "-c", command], environment={"GIVEN": canary, "TASK": str(place)}
                )
                output = b""
                while not output.endswith(b"up\n"):
                    output += await process.read()
                for text in (canary, str(place)):
                    assert text.encode() not in output
                    assert not any(text.encode() in line for line in _command_lines())
                await process.kill()

        self.run(work)

    def test_two_execs_share_the_place(self, backend: Backend, place: Path) -> None:
        """/tmp, the home and the workspace stay between execs of one sandbox."""

        async def work() -> None:
            async with self.started(backend, self.spec(backend, place)) as sandbox:
                await shell(sandbox, "echo 1 > /tmp/x; echo 2 > ~/x; echo 3 > x")
                assert await shell(sandbox, "cat /tmp/x ~/x x") == (0, "1\n2\n3\n")

        self.run(work)

    # who it is

    def test_uid_1000_without_capabilities(self, backend: Backend, place: Path) -> None:
        """No capability in any set, no new privileges, a seccomp filter, uid 1000."""
        code, output = self.inside(
            backend,
            self.spec(backend, place),
            "id -u; grep -E '^(Cap|NoNew|Seccomp:)' /proc/self/status",
        )
        assert code == 0
        fields = dict(line.split(":\t") for line in output.splitlines()[1:])
        assert output.splitlines()[0] == "1000"
        assert {value for name, value in fields.items() if name.startswith("Cap")} == {"0" * 16}
        assert fields["NoNewPrivs"] == "1"
        assert fields["Seccomp"] == "2"

    def test_never_the_hosts_root(self, backend: Backend, place: Path) -> None:
        """/proc/sys cannot be written, whoever started us (facts: security finding 1)."""
        code, output = self.inside(
            backend,
            self.spec(backend, place),
            "for f in /proc/sys/kernel/core_pattern /proc/sys/vm/overcommit_memory; do "
            "( : >> $f ) 2>/dev/null && echo WRITABLE; cat $f >/dev/null && echo readable; done",
        )
        assert "WRITABLE" not in output
        assert output.count("readable") == 2
        assert code == 0

    def test_no_new_namespaces(self, backend: Backend, place: Path) -> None:
        """Unshare fails; the same program without it works."""
        spec = self.spec(backend, place)
        assert self.inside(backend, spec, "unshare -Ur true")[0] != 0
        assert self.inside(backend, spec, "true")[0] == 0

    # files

    def test_the_root_is_read_only(self, backend: Backend, place: Path) -> None:
        """Outside workspace, home and /tmp nothing can be written."""
        code, output = self.inside(
            backend,
            self.spec(backend, place),
            "for d in / /usr /etc /opt /run /var /proc /sys /home /dev; do "
            "( echo x > $d/x ) 2>/dev/null && echo $d; done; "
            "for d in /tmp /home/agent /workspace /var/tmp /dev/shm; do echo x > $d/x || echo no $d; done",
        )
        assert (code, output) == (0, "")

    def test_the_callers_umask_decides_nothing(self, backend: Backend, place: Path) -> None:
        """A shut umask outside leaves the synthetic files readable inside."""
        before = os.umask(0o077)
        try:
            code, output = self.inside(
                backend, self.spec(backend, place), "cat /etc/passwd | wc -l; echo x > /tmp/x"
            )
        finally:
            os.umask(before)
        assert (code, output) == (0, "3\n")

    def test_tmp_has_a_size(self, backend: Backend, place: Path) -> None:
        """Past the disk limit there is ENOSPC; below it there is room."""
        spec = self.spec(backend, place)
        code, output = self.inside(
            backend, spec, "for i in 1 2 3 4; do head -c 25M /dev/zero > /tmp/$i || echo full; done"
        )
        assert "full" in output
        assert self.inside(backend, spec, "head -c 20M /dev/zero > /tmp/1")[0] == 0
        assert code == 0

    def test_tmp_is_noexec(self, backend: Backend, place: Path) -> None:
        """Neither exec nor the loader runs a program from /tmp; from the workspace both do."""
        spec = self.spec(backend, place)
        loader = "$(ls /lib64/ld-linux-*.so.* /lib/ld-linux-*.so.* 2>/dev/null | head -1)"
        script = f"cp /bin/true DIR/t && chmod +x DIR/t && DIR/t && {loader} DIR/t"
        for directory in ("/tmp", "/dev/shm", "/home/agent", "/var/tmp"):
            assert self.inside(backend, spec, script.replace("DIR", directory))[0] != 0
        assert self.inside(backend, spec, script.replace("DIR", "/workspace"))[0] == 0
        lifted = self.spec(backend, place, tmp_exec=True)
        assert self.inside(backend, lifted, script.replace("DIR", "/tmp"))[0] == 0

    def test_blocked_paths_are_absent(self, backend: Backend, place: Path) -> None:
        """A readable host path is visible, a blocked one below it is not; /etc is synthetic."""
        shared = place / "shared"
        (shared / "secret").mkdir(parents=True)
        (shared / "doc.txt").write_text("doc\n")
        (shared / "secret" / "key").write_text("canary\n")
        spec = self.spec(
            backend,
            place,
            readable=(str(shared),),
            blocked=(str(shared / "secret"), "/etc", "/root"),
        )
        code, output = self.inside(
            backend,
            spec,
            f"cat {shared}/doc.txt; cat {shared}/secret/key; cat /etc/shadow /etc/machine-id; "
            f"ls /root; echo x > {shared}/doc.txt; cat /etc/passwd | wc -l",
        )
        assert output == "doc\n3\n"
        assert code == 0

    def test_the_hosts_files_are_absent(self, backend: Backend, place: Path) -> None:
        """What no list names is not there."""
        canary = place / "canary"
        canary.write_text("canary")
        assert self.inside(backend, self.spec(backend, place), f"cat {canary}")[0] != 0

    def test_hidden_files_are_masked(self, backend: Backend, place: Path) -> None:
        """Secrets by pattern, a git configuration by content, sockets and FIFOs by kind."""
        work = place / "workspace"
        (work / ".env").write_text("canary")
        (work / ".ssh").mkdir()
        (work / ".ssh" / "id").write_text("canary")
        (work / ".git").mkdir()
        (work / ".git" / "config").write_text("[remote]\nurl = https://u:canary@h/x\n")
        os.mkfifo(work / "fifo")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(work / "s"))
        listener.listen(1)
        spec = self.spec(backend, place, hidden=(".env", ".ssh"))

        async def clause() -> None:
            async with self.started(backend, spec) as sandbox:
                command = "cat .env .ssh/id .git/config fifo; cat file.txt; ls .ssh; " + connect(
                    "s"
                )
                assert await shell(sandbox, command) == (1, "content\n")
                names = {".env", ".ssh", ".git/config", "fifo", "s"}
                assert set(sandbox.hidden) == names

        try:
            self.run(clause)
        finally:
            listener.close()

    def test_links_lead_nowhere(self, backend: Backend, place: Path) -> None:
        """A link of the workspace resolves inside, where its target is not."""
        canary = place / "canary"
        canary.write_text("canary")
        (place / "workspace" / "link").symlink_to(canary)
        (place / "workspace" / "good").symlink_to("file.txt")
        spec = self.spec(backend, place)
        assert self.inside(backend, spec, "cat link")[0] != 0
        assert self.inside(backend, spec, "cat good") == (0, "content\n")

    def test_a_mask_stays_on_its_file(self, backend: Backend, place: Path) -> None:
        """Renaming a folder above it shows nothing, not even to the next program."""
        (place / "workspace" / "a").mkdir()
        (place / "workspace" / "a" / ".env").write_text("canary")
        (place / "workspace" / "a" / "seen").write_text("seen\n")
        spec = self.spec(backend, place, workspace_mode=WorkspaceMode.DIRECT, hidden=(".env",))

        async def work() -> None:
            async with self.started(backend, spec) as sandbox:
                await shell(sandbox, "mv a b; mkdir a")
                assert await shell(sandbox, "cat b/.env; cat a/.env; cat b/seen") == (0, "seen\n")

        self.run(work)
        assert not (place / "workspace" / "a" / ".env").exists()

    def test_blocked_paths_hold_through_links(self, backend: Backend, place: Path) -> None:
        """By whatever name a mount would have shown them; what lies beside them is shown."""
        shared = place / "shared"
        (shared / "secret").mkdir(parents=True)
        (shared / "doc.txt").write_text("doc\n")
        (shared / "secret" / "key").write_text("canary\n")
        (place / "to-secret").symlink_to(shared / "secret")
        (place / "to-shared").symlink_to(shared)
        (place / "workspace" / "private").mkdir()
        (place / "workspace" / "private" / "key").write_text("canary\n")
        spec = self.spec(
            backend,
            place,
            readable=(str(place / "to-secret"), str(place / "to-shared")),
            blocked=(str(shared / "secret"), str(place / "workspace" / "private"), "/bin/uname"),
        )
        _, output = self.inside(
            backend,
            spec,
            f"cat {place}/to-secret/key {place}/to-shared/secret/key private/key; "
            f"/bin/uname; /usr/bin/uname; cat {place}/to-shared/doc.txt file.txt",
        )
        assert output == "doc\ncontent\n"

    def test_our_own_state_is_absent(self, backend: Backend, place: Path) -> None:
        """The vault's key lies in the state directory, which a workspace may hold."""
        (place / "state" / "key").write_text("canary")
        spec = replace(self.spec(backend, place), workspace=place)
        command = "cat state/key; ls state; cat workspace/file.txt"
        assert self.inside(backend, spec, command) == (0, "content\n")
        below = place / "state" / "below"
        below.mkdir()
        with pytest.raises(CallerError):
            asyncio.run(backend.start(replace(spec, workspace=below)))
        place.chmod(0o755)
        shown = self.spec(backend, place, readable=(str(place),))
        command = f"cat {place}/state/key; cat {place}/workspace/file.txt"
        assert self.inside(backend, shown, command) == (0, "content\n")

    def test_the_host_itself_is_no_workspace(self, backend: Backend, place: Path) -> None:
        """A root directory, or one of the kernel's, is refused with a word of its own."""
        for path in ("/", "/proc", "/etc", "/dev/shm/.."):
            with pytest.raises(CallerError) as caught:
                asyncio.run(backend.start(replace(self.spec(backend, place), workspace=Path(path))))
            assert caught.value.code == "workspace-refused"

    def test_sockets_made_later_take_no_connection(self, backend: Backend, place: Path) -> None:
        """In review and readonly mode, and below readable paths; sockets made inside do."""
        shared = place / "shared"
        shared.mkdir()
        own = 'python3 -c \'import socket; s = socket.socket(1); s.bind("/tmp/s"); s.listen(); '
        own += 'socket.socket(1).connect("/tmp/s")\''
        for mode in (WorkspaceMode.REVIEW, WorkspaceMode.READONLY):
            spec = self.spec(backend, place, workspace_mode=mode, readable=(str(shared),))

            async def clause(spec: SandboxSpec = spec) -> None:
                async with self.started(backend, spec) as sandbox:
                    paths = (place / "workspace" / "late", shared / "late")
                    listeners = [_listen(path) for path in paths]
                    try:
                        assert (await shell(sandbox, connect("late")))[0] != 0
                        assert (await shell(sandbox, connect(f"{shared}/late")))[0] != 0
                        assert (await shell(sandbox, own))[0] == 0
                    finally:
                        for listener, path in zip(listeners, paths, strict=True):
                            listener.close()
                            path.unlink()

            self.run(clause)

    def test_sockets_of_writable_paths_are_masked(self, backend: Backend, place: Path) -> None:
        """Those that are there at the start; files beside them can be written."""
        cache = place / "cache"
        (cache / "deep").mkdir(parents=True)
        listener = _listen(cache / "deep" / "s")
        spec = self.spec(backend, place, writable=(str(cache),))
        try:
            assert self.inside(backend, spec, connect(f"{cache}/deep/s"))[0] != 0
        finally:
            listener.close()
        assert self.inside(backend, spec, f"ls {cache}; echo x > {cache}/new")[0] == 0
        assert (cache / "new").read_text() == "x\n"

    # workspace modes

    def test_review_leaves_changes_and_the_host_as_it_was(
        self, backend: Backend, place: Path
    ) -> None:
        """Added, modified, deleted; files and links; nothing is written to the host."""
        (place / "workspace" / "gone").mkdir()
        (place / "workspace" / "gone" / "a").write_text("a")

        async def work() -> None:
            async with self.started(backend, self.spec(backend, place)) as sandbox:
                code, _ = await shell(
                    sandbox,
                    "echo more >> file.txt; echo new > new; ln -s /etc/passwd link; rm -r gone; "
                    "touch untouched; rm untouched; chmod +x new",
                )
                assert code == 0
                await sandbox.stop()
                changes = await sandbox.changes()
            found = {change.path: change for change in changes.items}
            assert set(found) == {"file.txt", "new", "link", "gone/a"}
            assert found["file.txt"].kind is ChangeKind.MODIFIED
            assert found["file.txt"].after == b"content\nmore\n"
            assert found["new"].mode == 0o100755
            assert (found["link"].mode, found["link"].after) == (0o120000, b"/etc/passwd")
            assert found["gone/a"].kind is ChangeKind.DELETED

        self.run(work)
        assert (place / "workspace" / "file.txt").read_text() == "content\n"
        assert sorted(p.name for p in (place / "workspace").iterdir()) == ["file.txt", "gone"]

    def test_review_holds_what_the_agent_shut(self, backend: Backend, place: Path) -> None:
        """`chmod 0` takes nothing out of the patch, nor does a FIFO break it."""

        async def work() -> None:
            async with self.started(backend, self.spec(backend, place)) as sandbox:
                await shell(
                    sandbox,
                    "mkdir d e; echo x > d/f; chmod 0 d; echo y > g; chmod 0 g; echo z > e/h; "
                    "chmod 400 e; mkfifo pipe; echo w > i",
                )
                await sandbox.stop()
                changes = await sandbox.changes()
            assert {change.path for change in changes.items} == {"d/f", "g", "e/h", "i"}
            assert [path for path, _ in changes.refused] == ["pipe"]

        self.run(work)

    def test_review_does_not_undo_the_persons_own_work(self, backend: Backend, place: Path) -> None:
        """A file that the host changed during the run is not what the agent began with."""
        (place / "workspace" / "other").write_text("1\n")

        async def work() -> None:
            async with self.started(backend, self.spec(backend, place)) as sandbox:
                await shell(sandbox, "echo agent >> file.txt; echo agent >> other")
                (place / "workspace" / "file.txt").write_text("the person's\n")
                await sandbox.stop()
                changes = await sandbox.changes()
            found = {change.path: change for change in changes.items}
            assert found["other"].before == b"1\n"
            assert found["file.txt"].before in {None, b"content\n"}
            assert found["file.txt"].after == b"content\nagent\n"

        self.run(work)

    def test_a_folder_that_cannot_be_looked_through(self, backend: Backend, place: Path) -> None:
        """It stops no start, and shows nothing that a mask should have covered."""
        shut = place / "workspace" / "shut"
        shut.mkdir()
        (shut / ".env").write_text("canary")
        shut.chmod(0o100)
        spec = self.spec(backend, place, hidden=(".env",))
        try:
            assert self.inside(backend, spec, "cat shut/.env; cat file.txt") == (0, "content\n")
        finally:
            shut.chmod(0o700)

    def test_direct_writes_as_the_owner(self, backend: Backend, place: Path) -> None:
        """Files land on the host and belong to whom the workspace belongs."""
        spec = self.spec(backend, place, workspace_mode=WorkspaceMode.DIRECT)
        assert self.inside(backend, spec, "echo x > new; mkdir d; echo y > d/y")[0] == 0
        owner = (place / "workspace").stat().st_uid
        for path in (place / "workspace" / "new", place / "workspace" / "d" / "y"):
            assert path.stat().st_uid == owner

    def test_readonly_refuses(self, backend: Backend, place: Path) -> None:
        """Reads work, writes do not."""
        spec = self.spec(backend, place, workspace_mode=WorkspaceMode.READONLY)
        assert self.inside(backend, spec, "cat file.txt; echo x > new") != (0, "content\n")
        assert self.inside(backend, spec, "cat file.txt") == (0, "content\n")
        assert not (place / "workspace" / "new").exists()

    # network

    def test_there_is_a_loopback_and_nothing_else(self, backend: Backend, place: Path) -> None:
        """One interface, no route, no abstract socket of the host; the own loopback works."""
        code, output = self.inside(
            backend,
            self.spec(backend, place),
            "tail -n +3 /proc/net/dev | cut -d: -f1 | tr -d ' '; tail -n +2 /proc/net/route",
        )
        assert (code, output) == (0, "lo\n")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind("\0ringfence-contract")
        listener.listen(1)
        try:
            spec = self.spec(backend, place)
            assert self.inside(backend, spec, connect("\\0ringfence-contract"))[0] != 0
        finally:
            listener.close()

    def test_the_egress_directory(self, backend: Backend, place: Path) -> None:
        """The socket is reachable when given, read-only, and after it was made anew."""
        directory = place / "egress"
        directory.mkdir(mode=0o755)
        path = directory / "egress.sock"
        listener = _listen(path)
        spec = replace(self.spec(backend, place), egress_dir=directory)
        dial = connect("/run/ringfence/egress.sock")

        async def work() -> None:
            nonlocal listener
            async with self.started(backend, spec) as sandbox:
                assert (await shell(sandbox, dial))[0] == 0
                assert (await shell(sandbox, "rm /run/ringfence/egress.sock"))[0] != 0
                assert (await shell(sandbox, "echo x > /run/ringfence/x"))[0] != 0
                listener.close()
                path.unlink()
                assert (await shell(sandbox, dial))[0] != 0
                listener = _listen(path)
                assert (await shell(sandbox, dial))[0] == 0

        try:
            self.run(work)
        finally:
            listener.close()

    # limits

    def test_what_cannot_be_enforced_stops_the_start(self, backend: Backend, place: Path) -> None:
        """Unless the policy accepts it by name."""
        missing = self.accepted(backend)
        direct = replace(
            self.spec(backend, place).profile,
            workspace_mode=WorkspaceMode.DIRECT,
            accept_unenforced=frozenset(),
        )
        if not missing:
            pytest.skip("this host enforces everything")
        spec = replace(self.spec(backend, place), profile=direct)
        with pytest.raises(UnavailableError) as caught:
            asyncio.run(backend.start(spec))
        assert caught.value.code == "control-unenforceable"
        assert caught.value.hint

    def test_a_memory_hog_dies(self, backend: Backend, place: Path) -> None:
        """Over the limit it is killed, below it runs."""
        if Control.MEMORY.value in self.accepted(backend):
            pytest.skip("this host does not limit memory for us")
        spec = self.spec(backend, place)
        hog = "python3 -c 'x = bytearray(SIZE << 20); print(len(x))'"
        assert self.inside(backend, spec, hog.replace("SIZE", "600"))[0] != 0
        assert self.inside(backend, spec, hog.replace("SIZE", "60"))[0] == 0

    def test_a_fork_storm_is_stopped(self, backend: Backend, place: Path) -> None:
        """Past the limit fork fails, and the sandbox still ends."""
        if Control.PIDS.value in self.accepted(backend):
            pytest.skip("this host does not limit processes for us")
        storm = (
            "python3 -c '\nimport os, time\nn = 0\ntry:\n while n < 500:\n  if os.fork() == 0:\n"
            "   time.sleep(30); os._exit(0)\n  n += 1\nexcept OSError: pass\nprint(n)'; true"
        )
        _, output = self.inside(backend, self.spec(backend, place), storm)
        assert 5 < int(output) < 64

    def test_limits_are_read_back(self, backend: Backend, place: Path) -> None:
        """What is claimed is in the kernel: no control is enforced by words."""

        async def work() -> None:
            async with self.started(backend, self.spec(backend, place)) as sandbox:
                claimed = {s.control for s in sandbox.controls if s.enforced}
                assert {Control.SECCOMP, Control.NETWORK, Control.DISK} <= claimed

        self.run(work)

    # copying

    def test_copying_in_and_out(self, backend: Backend, place: Path) -> None:
        """Content goes both ways and belongs to the agent."""

        async def work() -> None:
            async with self.started(backend, self.spec(backend, place)) as sandbox:
                await sandbox.copy_in({"/home/agent/a/b": b"in", "/workspace/w": b"w"})
                assert await shell(sandbox, "cat ~/a/b w; echo out > ~/a/c; rm ~/a/b") == (0, "inw")
                assert await sandbox.copy_out("/home/agent/a/c") == b"out\n"

        self.run(work)

    def test_copying_out_follows_nothing(self, backend: Backend, place: Path) -> None:
        """Links, FIFOs, `..` and masked files are refused; a regular file is not."""
        (place / "workspace" / ".env").write_text("canary")

        async def work() -> None:
            spec = self.spec(backend, place, hidden=(".env",))
            async with self.started(backend, spec) as sandbox:
                await shell(sandbox, "ln -s /etc/passwd l; ln -s / d; mkfifo f; ln -s .env e")
                for path in ("l", "d/etc/passwd", "f", "../etc/passwd", ".env", "./x", "e"):
                    with pytest.raises((DeniedError, OSError)):
                        await sandbox.copy_out(f"/workspace/{path}")
                with pytest.raises(DeniedError):
                    await sandbox.copy_out("/etc/passwd")
                assert await sandbox.copy_out("/workspace/file.txt") == b"content\n"

        self.run(work)

    def test_copying_in_follows_nothing(self, backend: Backend, place: Path) -> None:
        """A link that the agent planted does not lead a file of ours out."""

        async def work() -> None:
            spec = self.spec(backend, place, workspace_mode=WorkspaceMode.DIRECT)
            async with self.started(backend, spec) as sandbox:
                await shell(sandbox, f"ln -s {place} d")
                with pytest.raises((RingfenceError, OSError)):
                    await sandbox.copy_in({"/workspace/d/planted": b"x"})
            assert not (place / "planted").exists()

        self.run(work)

    def test_copying_in_does_not_wait_for_a_fifo(self, backend: Backend, place: Path) -> None:
        """A FIFO where a file of ours has to come is refused at once, read by someone or not."""

        async def work() -> None:
            async with self.started(backend, self.spec(backend, place)) as sandbox:
                reader = await sandbox.exec(
                    ["bash", "-c", "mkfifo /tmp/f /tmp/g; (cat /tmp/g & echo up); sleep 60"]
                )
                assert await reader.read() == b"up\n"
                for path in ("/tmp/f", "/tmp/g"):
                    async with asyncio.timeout(5):
                        with pytest.raises((DeniedError, OSError)):
                            await sandbox.copy_in({path: b"x"})
                await sandbox.copy_in({"/tmp/h": b"x"})
                assert await sandbox.copy_out("/tmp/h") == b"x"
                await reader.kill()

        self.run(work)

    # ends

    def test_kill_takes_all_descendants(self, backend: Backend, place: Path) -> None:
        """Also those that left their session and their parent."""

        async def work() -> None:
            async with self.started(backend, self.spec(backend, place)) as sandbox:
                marker = f"rf-contract-{os.getpid()}"
                process = await sandbox.exec(
                    [
                        "bash",
                        "-c",
                        f"(setsid bash -c 'exec -a {marker} sleep 300' &); echo up; sleep 300",
                    ]
                )
                assert await process.read() == b"up\n"
                for _ in range(100):
                    if _alive(marker):
                        break
                    await asyncio.sleep(0.02)
                assert _alive(marker)
                await process.kill()
                assert not _alive(marker)

        self.run(work)

    def test_the_end_of_the_program_is_the_end_of_all(self, backend: Backend, place: Path) -> None:
        """What is left in the background dies with the program."""

        async def work() -> None:
            async with self.started(backend, self.spec(backend, place)) as sandbox:
                marker = f"rf-background-{os.getpid()}"
                code, _ = await shell(
                    sandbox, f"(setsid bash -c 'exec -a {marker} sleep 300' &) ; true"
                )
                assert code == 0
                assert not _alive(marker)

        self.run(work)

    def test_a_descriptor_sent_out_delays_no_end(self, backend: Backend, place: Path) -> None:
        """Stdio that the inmate left in a socket outside, where nobody takes it."""
        directory = place / "egress"
        directory.mkdir(mode=0o755)
        listener = _listen(directory / "egress.sock")
        send = (
            "import socket; s = socket.socket(1); s.connect('/run/ringfence/egress.sock'); "
            "socket.send_fds(s, [b'x'], [1, 2]); print('sent', flush=True)"
        )

        async def work() -> None:
            spec = replace(self.spec(backend, place), egress_dir=directory)
            async with self.started(backend, spec) as sandbox:
                process = await sandbox.exec(["python3", "-c", send])
                async with asyncio.timeout(10):
                    assert await process.read() == b"sent\n"
                    assert await process.read() == b""
                    assert await process.wait() == 0
                    await sandbox.stop()

        try:
            self.run(work)
        finally:
            listener.close()

    def test_stop_and_close_are_idempotent(self, backend: Backend, place: Path) -> None:
        """And after stop nothing can be started."""

        async def work() -> None:
            sandbox = await backend.start(self.spec(backend, place))
            await sandbox.stop()
            await sandbox.stop()
            with pytest.raises(UnavailableError):
                await sandbox.exec(["true"])
            await sandbox.close()
            await sandbox.close()

        self.run(work)

    def test_stdio_cannot_be_reopened(self, backend: Backend, place: Path) -> None:
        """A sibling finds sockets in /proc/PID/fd: ENXIO; a pipe of its own can be reopened."""
        code, output = self.inside(
            backend,
            self.spec(backend, place),
            "for f in 0 1 2; do ( : > /proc/1/fd/$f ) 2>&1; ( : > /proc/$$/fd/$f ) 2>&1; done | "
            "grep -c -E 'No such device|Permission denied'; sleep 5 | sleep 5 & "
            "sleep 0.2; : > /proc/$!/fd/0 && echo pipe",
        )
        assert output.endswith("pipe\n"), output
        assert int(output.splitlines()[0]) >= 5
        assert code == 0

    def test_two_sandboxes_do_not_meet(self, backend: Backend, place: Path) -> None:
        """Neither files nor processes nor ports of the other."""

        async def work() -> None:
            one = self.spec(backend, place)
            two = self.spec(backend, place, number=1)
            async with self.started(backend, one) as first, self.started(backend, two) as second:
                await shell(first, "echo canary > /tmp/x; echo canary > ~/x; echo canary > x")
                process = await first.exec(["sleep", "30"])
                _, output = await shell(second, "cat /tmp/x ~/x x; ls /proc | grep -c '^[0-9]'")
                assert "canary" not in output
                assert int(output) < 8
                await process.kill()

        self.run(work)

    def test_freezing(self, backend: Backend, place: Path) -> None:
        """Frozen processes stand still, thawed ones go on (requirement I)."""

        async def work() -> None:
            async with self.started(backend, self.spec(backend, place)) as sandbox:
                process = await sandbox.exec(["sh", "-c", "while :; do echo x; sleep 0.02; done"])
                assert await process.read(1)
                await sandbox.freeze()
                await sandbox.thaw()
                async with asyncio.timeout(5):
                    assert await process.read(1)
                await process.kill()

        self.run(work)


async def shell(sandbox: Sandbox, command: str) -> tuple[int, str]:
    """Run a shell command; (exit status, standard output)."""
    process = await sandbox.exec(["bash", "-c", command])
    await process.close_stdin()
    output = bytearray()
    while chunk := await process.read():
        output += chunk
    return await process.wait(), output.decode("utf-8", "replace")


def connect(path: str) -> str:
    """A shell command that exits 0 when a unix socket takes a connection."""
    return f"python3 -c 'import socket; socket.socket(1).connect(\"{path}\")' 2>/dev/null"


def _listen(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    path.chmod(stat.S_IRUSR | stat.S_IWUSR | 0o066)
    listener.listen(8)
    return listener


def _command_lines() -> list[bytes]:
    """Those of all processes of the host but our own."""
    lines = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                lines.append((entry / "cmdline").read_bytes())
    return lines


def _alive(marker: str) -> bool:
    return any(line.split(b"\0")[0] == marker.encode() for line in _command_lines())
