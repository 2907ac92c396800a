"""Clauses of the sandbox contract on the workspace: its modes, its changes, copying."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from ringfence.errors import DeniedError, RingfenceError
from ringfence.model import WorkspaceMode
from ringfence.sandbox.protocol import (
    Backend,
    ChangeKind,
)
from ringfence.testing.sandbox_base import (
    SandboxClauses,
    shell,
)


class WorkspaceClauses(SandboxClauses):
    """The workspace and what comes out of it."""

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
            refused = ["pipe"] if self.shares_a_kernel else []
            assert [path for path, _ in changes.refused] == refused

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
                    async with asyncio.timeout(5 * self.patience):
                        if self.shares_a_kernel:
                            with pytest.raises((DeniedError, OSError)):
                                await sandbox.copy_in({path: b"x"})
                        else:
                            await sandbox.copy_in({path: b"x"})
                await sandbox.copy_in({"/tmp/h": b"x"})
                assert await sandbox.copy_out("/tmp/h") == b"x"
                await reader.kill()

        self.run(work)
