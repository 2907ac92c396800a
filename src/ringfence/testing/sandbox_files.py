"""Clauses of the sandbox contract on what is there to see, and what leads out."""

from __future__ import annotations

import asyncio
import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from ringfence.errors import CallerError
from ringfence.model import WorkspaceMode
from ringfence.sandbox.protocol import (
    INSIDE_PROXY_PORT,
    Backend,
    Control,
    SandboxSpec,
)
from ringfence.testing.sandbox_base import (
    SandboxClauses,
    connect,
    listen_at,
    shell,
)


class FileClauses(SandboxClauses):
    """Files and sockets inside."""

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
        claimed = self.claims(backend, Control.TMP_NOEXEC)
        for directory in ("/tmp", "/dev/shm", "/home/agent", "/var/tmp") if claimed else ():
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

    def test_a_sessions_files_are_read_only(self, backend: Backend, place: Path) -> None:
        """At their place inside, and on the host as they were; without any nothing is there."""
        files = place / "state" / "session-files" / "one"
        (files / "uploads").mkdir(parents=True)
        (files / "uploads" / "a.csv").write_text("1,2\n")
        (files / "uploads" / "a.csv").chmod(0o444)
        for directory in (files, files / "uploads"):
            directory.chmod(0o755)
        command = (
            "cd /mnt/session || exit 7; cat uploads/a.csv; chmod 0666 uploads/a.csv; "
            "echo x >> uploads/a.csv; rm -f uploads/a.csv; touch new uploads/new; "
            "mv uploads moved; ls . uploads"
        )
        bare = self.spec(backend, place)
        spec = replace(bare, session_files=files)
        code, output = self.inside(backend, spec, f"({command}) 2>/dev/null")
        assert (code, output) == (0, "1,2\n.:\nuploads\n\nuploads:\na.csv\n")
        assert (files / "uploads" / "a.csv").read_text() == "1,2\n"
        assert self.inside(backend, bare, f"({command}) 2>/dev/null") == (7, "")

    def test_a_blocked_path_is_absent_by_every_name(self, backend: Backend, place: Path) -> None:
        """A link beside it, a link to it, and the workspace are other names of the same files."""
        shared, link = place / "shared", place / "link"
        (shared / "secret").mkdir(parents=True)
        (shared / "doc.txt").write_text("doc\n")
        (shared / "secret" / "key").write_text("canary\n")
        link.symlink_to(shared)
        (place / "workspace" / "inner").mkdir()
        (place / "workspace" / "inner" / "key.pub").write_text("canary\n")
        names = f"{link}/secret/key {shared}/secret/key /workspace/inner/key.pub"
        for shown, blocked in ((link, shared / "secret"), (shared, link / "secret")):
            spec = self.spec(
                backend,
                place,
                readable=(str(shown),),
                blocked=(str(blocked), str(place / "workspace" / "inner")),
                shown=("*.pub",),
            )
            output = self.inside(backend, spec, f"cat {shown}/doc.txt; cat {names}")[1]
            assert output == "doc\n"
        spec = self.spec(backend, place, readable=(str(link),), blocked=(str(shared),))
        assert self.inside(backend, spec, f"cat {link}/doc.txt; echo end")[1] == "end\n"

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

    def test_a_link_with_a_secrets_name(self, backend: Backend, place: Path) -> None:
        """What it leads to is masked too; one that leads nowhere, or to a folder, stops no start."""
        work = place / "workspace"
        (work / "settings").write_text("canary")
        (work / "keys").mkdir()
        (work / "keys" / "a").write_text("canary")
        (work / ".git").mkdir()
        (work / "shared").write_text("url = https://u:canary@h\n")
        links = {".env": "b", "b": "settings", ".ssh": "keys", ".npmrc": "/no"}
        for name, target in {**links, ".git/config": "../shared"}.items():
            (work / name).symlink_to(target)
        spec = self.spec(backend, place, hidden=(".env", ".ssh", ".npmrc"))
        _, output = self.inside(
            backend,
            spec,
            "cat .env b settings .ssh/a keys/a .npmrc .git/config shared; cat file.txt",
        )
        assert output == "content\n"

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
                    listeners = [listen_at(path) for path in paths]
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
        listener = listen_at(cache / "deep" / "s")
        spec = self.spec(backend, place, writable=(str(cache),))
        try:
            assert self.inside(backend, spec, connect(f"{cache}/deep/s"))[0] != 0
        finally:
            listener.close()
        assert self.inside(backend, spec, f"ls {cache}; echo x > {cache}/new")[0] == 0
        assert (cache / "new").read_text() == "x\n"

    # network

    def test_there_is_a_loopback_and_nothing_else(self, backend: Backend, place: Path) -> None:
        """One interface, no route, no abstract socket of the host; the own loopback works."""
        code, output = self.inside(
            backend,
            self.spec(backend, place),
            "tail -n +3 /proc/net/dev | cut -d: -f1 | tr -d ' '; tail -n +2 /proc/net/route",
        )
        assert (code, output) == (0, "lo\n")
        name = f"ringfence-contract-{os.getpid()}"  # the host has one list of them
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(f"\0{name}")
        listener.listen(1)
        try:
            spec = self.spec(backend, place)
            assert self.inside(backend, spec, connect(f"\\0{name}"))[0] != 0
        finally:
            listener.close()

    def test_the_egress_directory(self, backend: Backend, place: Path) -> None:
        """The socket is reachable when given, read-only, and after it was made anew."""
        directory = place / "egress"
        directory.mkdir(mode=0o755)
        path = directory / "egress.sock"
        listener = listen_at(path)
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
                listener = listen_at(path)
                assert (await shell(sandbox, dial))[0] == 0

        try:
            self.run(work)
        finally:
            listener.close()

    def test_the_proxy_listener(self, backend: Backend, place: Path) -> None:
        """A port of the sandbox's own loopback is accepted on outside; no other one is there."""
        dial = "exec 3<>/dev/tcp/127.0.0.1/PORT && echo hello >&3 && cat <&3"

        async def work() -> None:
            async with self.started(backend, self.spec(backend, place)) as sandbox:
                if sandbox.proxy_listener is None:
                    pytest.skip("this backend brings tools to egress in another way")
                listener = socket.socket(fileno=os.dup(sandbox.proxy_listener))
                listener.setblocking(False)
                dialling = asyncio.ensure_future(
                    shell(sandbox, dial.replace("PORT", str(INSIDE_PROXY_PORT)))
                )
                try:
                    loop = asyncio.get_running_loop()
                    peer, _ = await loop.sock_accept(listener)
                    with peer:
                        assert await loop.sock_recv(peer, 64) == b"hello\n"
                        await loop.sock_sendall(peer, b"world\n")
                    assert await dialling == (0, "world\n")
                    assert (await shell(sandbox, dial.replace("PORT", "3129")))[0] != 0
                finally:
                    listener.close()

        self.run(work)
