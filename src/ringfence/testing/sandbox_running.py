"""Clauses of the sandbox contract on programs, what they may do, and how they end."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from pathlib import Path

import pytest

from ringfence.errors import UnavailableError
from ringfence.model import WorkspaceMode
from ringfence.sandbox.protocol import (
    Backend,
    Control,
)
from ringfence.testing.sandbox_base import (
    BEATING,
    REQUIRED,
    SandboxClauses,
    beats,
    command_lines,
    descriptors,
    listen_at,
    shell,
)


class RunningClauses(SandboxClauses):
    """Programs inside."""

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

    def test_a_program_that_ended_holds_nothing_open(self, backend: Backend, place: Path) -> None:
        """Any number of programs run in a sandbox, one after the other; what they said is read."""

        async def work() -> None:
            async with self.started(backend, self.spec(backend, place)) as sandbox:
                held = []
                for _ in range(4):
                    assert await shell(sandbox, "echo said; echo oops >&2") == (0, "said\n")
                    held.append(descriptors())
                # the first may bring what the others use again
                assert held[3] <= held[1]

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
                    assert not any(text.encode() in line for line in command_lines())
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
            "id -u; grep -E '^(Cap|Seccomp:)' /proc/self/status; "
            'python3 -c \'import ctypes; print("NoNewPrivs:", ctypes.CDLL(None).prctl(39, 0, 0, 0, 0), sep="\\t")\'',
        )
        assert code == 0
        fields = dict(line.split(":\t") for line in output.splitlines()[1:])
        assert output.splitlines()[0] == "1000"
        assert {value for name, value in fields.items() if name.startswith("Cap")} == {"0" * 16}
        assert fields["NoNewPrivs"] == "1"
        if self.claims(backend, Control.SECCOMP):
            assert fields["Seccomp"] == "2"

    def test_never_the_hosts_root(self, backend: Backend, place: Path) -> None:
        """/proc/sys cannot be written, whoever started us (facts: security finding 1)."""
        code, output = self.inside(
            backend,
            self.spec(backend, place),
            "for f in /proc/sys/kernel/core_pattern /proc/sys/vm/overcommit_memory "
            "/proc/sysrq-trigger; do [ -e $f ] || continue; "
            "( : >> $f ) 2>/dev/null && echo WRITABLE; done; cat /proc/version",
        )
        assert "WRITABLE" not in output
        assert output.startswith("Linux")
        assert code == 0

    def test_no_new_namespaces(self, backend: Backend, place: Path) -> None:
        """Unshare fails where that is claimed; the same program without it works."""
        spec = self.spec(backend, place)
        if self.claims(backend, Control.USER_NAMESPACE):
            assert self.inside(backend, spec, "unshare -Ur true")[0] != 0
        assert self.inside(backend, spec, "true")[0] == 0

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
            "   time.sleep(300); os._exit(0)\n  n += 1\nexcept OSError: pass\nprint(n)'; true"
        )
        _, output = self.inside(backend, self.spec(backend, place), storm)
        # a kernel of its own may count late while it is busy: the host's count, which another clause
        # reads back, is the one that holds
        assert 5 < int(output) < (64 if self.shares_a_kernel else 128)

    def test_limits_are_read_back(self, backend: Backend, place: Path) -> None:
        """The started sandbox claims what the probe did, and all that a policy cannot do without."""

        async def work() -> None:
            async with self.started(backend, self.spec(backend, place)) as sandbox:
                claimed = {state.control.value for state in sandbox.controls if state.enforced}
                assert {control.value for control in REQUIRED} - self.accepted(backend) <= claimed
                probed = backend.probe(self.spec(backend, place).profile)
                assert {state.control.value for state in probed if state.enforced} <= claimed

        self.run(work)

    def test_the_processor_is_shared_out(self, backend: Backend, place: Path) -> None:
        """Half a processor is half of the time, however many processes ask for it."""
        if Control.CPU.value in self.accepted(backend):
            pytest.skip("this host does not limit processor time for us")
        if not self.shares_a_kernel:
            pytest.skip("what it believes is no measure; its own tests measure from outside")
        spin = (
            "python3 -c '\nimport os, time\nb = os.times()\n"
            "end = time.monotonic() + 2\nchild = os.fork()\n"
            "while time.monotonic() < end: pass\nif not child: os._exit(0)\nos.wait()\n"
            "t = os.times(); print(t.user - b.user + t.system - b.system + t.children_user + "
            "t.children_system)'"
        )
        limits = replace(self.spec(backend, place).profile.limits, cpus=0.5)
        _, output = self.inside(backend, self.spec(backend, place, limits=limits), spin)
        assert 0.1 < float(output) < 1.6

    # ends

    def test_kill_takes_all_descendants(self, backend: Backend, place: Path) -> None:
        """Also those that left their session and their parent."""

        async def work() -> None:
            async with self.started(backend, self.spec(backend, place)) as sandbox:
                process = await sandbox.exec(["bash", "-c", f"{BEATING}; echo up; sleep 300"])
                assert await process.read() == b"up\n"
                assert await beats(sandbox, self.patience)
                await process.kill()
                assert not await beats(sandbox, self.patience)

        self.run(work)

    def test_the_end_of_the_program_is_the_end_of_all(self, backend: Backend, place: Path) -> None:
        """What is left in the background dies with the program."""

        async def work() -> None:
            async with self.started(backend, self.spec(backend, place)) as sandbox:
                # it has beaten then; it may die between emptying the file and writing to it
                assert (await shell(sandbox, f"{BEATING}"))[0] == 0
                assert not await beats(sandbox, self.patience)

        self.run(work)

    def test_a_descriptor_sent_out_delays_no_end(self, backend: Backend, place: Path) -> None:
        """Stdio that the inmate left in a socket outside, where nobody takes it."""
        directory = place / "egress"
        directory.mkdir(mode=0o755)
        listener = listen_at(directory / "egress.sock")
        send = (
            "import socket\ns = socket.socket(1); s.connect('/run/ringfence/egress.sock')\n"
            "try: socket.send_fds(s, [b'x'], [1, 2])\n"
            "except OSError: print('refused', flush=True)\nelse: print('sent', flush=True)"
        )
        said = b"sent\n" if self.shares_a_kernel else b"refused\n"

        async def work() -> None:
            spec = replace(self.spec(backend, place), egress_dir=directory)
            async with self.started(backend, spec) as sandbox:
                process = await sandbox.exec(["python3", "-c", send])
                async with asyncio.timeout(10 * self.patience):
                    assert await process.read() == said
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
        """Neither files nor processes of the other; one's own are there."""

        async def work() -> None:
            one = self.spec(backend, place)
            two = self.spec(backend, place, number=1)
            async with self.started(backend, one) as first, self.started(backend, two) as second:
                await shell(first, "echo canary > /tmp/x; echo canary > ~/x; echo canary > x")
                process = await first.exec(["bash", "-c", "exec -a canary sleep 30"])
                look = "cat /tmp/x ~/x x; exec -a own sleep 30 & sleep 0.3; cat /proc/*/cmdline"
                _, output = await shell(second, f"bash -c '{look}'; pkill sleep; true")
                assert "own\x0030\x00" in output
                assert "canary\x0030\x00" not in output
                assert "canary\n" not in output
                await process.kill()

        self.run(work)

    def test_freezing(self, backend: Backend, place: Path) -> None:
        """Frozen processes stand still, where the host can; thawed ones go on (requirement I)."""

        async def work() -> None:
            async with self.started(backend, self.spec(backend, place)) as sandbox:
                process = await sandbox.exec(["bash", "-c", f"{BEATING}; echo up; sleep 300"])
                assert await process.read() == b"up\n"
                frozen = await sandbox.freeze()
                assert await beats(sandbox, self.patience) is not frozen
                await sandbox.thaw()
                assert await beats(sandbox, self.patience)
                await process.kill()

        self.run(work)
