"""Claude, bare and in the fence, against a server that only notes when it is first asked."""

from __future__ import annotations

import asyncio
import os
import socket
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from claude_agent_sdk import ClaudeAgentOptions, ClaudeSDKClient

from ringfence.agent.command_line import environment
from ringfence.agent.permissions import DenyApprover
from ringfence.config import Config, Provider, WarmSettings
from ringfence.model import RunRequest
from ringfence.policy.compile import compile_policy
from ringfence.policy.compiled import CompiledPolicy
from ringfence.policy.load import from_mapping
from ringfence.wiring import launcher
from ringfence.worker.control import RunControl
from ringfence.worker.launch import attempt, bundled_claude
from ringfence.worker.station import Station


class Door:
    """Accepts, reads, never answers; `asked` holds the time of each model request."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self.asked: list[float] = []
        self.came = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        """Base URL of a provider that never answers."""
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._open.append(connection)
            threading.Thread(target=self._read, args=(connection,), daemon=True).start()

    def _read(self, connection: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            data = connection.recv(65536)
            if not data:
                return
            head += data
        if b"POST" in head and b"/v1/messages" in head.split(b"\r\n")[0]:
            self.asked.append(time.perf_counter())
            self.came.set()
        else:
            connection.sendall(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n")

    def close(self) -> None:
        """Hang up on everyone."""
        self._listener.close()
        for connection in self._open:
            connection.close()


@contextmanager
def door() -> Iterator[Door]:
    """A Door for the block."""
    one = Door()
    try:
        yield one
    finally:
        one.close()


def policy(isolation: str = "bubblewrap") -> CompiledPolicy:
    """The strict preset, with what an ordinary user cannot enforce accepted."""
    accepted = [] if os.geteuid() == 0 else ["memory", "cpu", "pids"]
    return compile_policy(
        from_mapping(
            {
                "preset": "strict",
                "accept_unenforced": accepted,
                "isolation": {"backend": isolation},
            }
        )
    )


@asynccontextmanager
async def station(
    url: str, isolation: str = "bubblewrap", *, warm: WarmSettings | None = None
) -> AsyncIterator[tuple[Station, Path]]:
    """A worker's station in a scratch directory, and a workspace of a few files."""
    with tempfile.TemporaryDirectory(prefix="ringfence-bench-") as scratch:
        workspace = Path(scratch) / "workspace"
        workspace.mkdir()
        for number in range(20):
            (workspace / f"file{number}.py").write_text("x = 1\n" * 50)
        config = Config(
            state_dir=Path(scratch) / "state",
            providers={"anthropic": Provider(base_url=url, credential=None)},
            runtime=Path(prefix) if (prefix := os.environ.get("RINGFENCE_RUNTIME")) else None,
            warm=warm or WarmSettings(),
        )
        async with launcher(config).station(DenyApprover(), isolation) as one:
            yield one, workspace


async def fenced(
    one: Station, workspace: Path, control: RunControl, isolation: str = "bubblewrap"
) -> None:
    """One run whose model never answers; ends when `control` says so."""
    request = RunRequest(prompt="Say hi.", workspace=str(workspace))
    await attempt(one, policy(isolation), request, control=control, on_message=lambda _: None)


async def bare(url: str, workspace: Path, config_dir: Path, came: threading.Event) -> None:
    """The same claude as the SDK starts it, with the same tools and switches."""
    grants = policy().tools
    inherited = environment(grants)
    for name in ("ANTHROPIC_UNIX_SOCKET", "CLAUDE_CODE_TMPDIR", "HTTPS_PROXY", "HTTP_PROXY"):
        inherited.pop(name, None)
    options = ClaudeAgentOptions(
        tools=list(grants.offered),
        cwd=workspace,
        cli_path=bundled_claude(),
        setting_sources=[],
        env={
            **{name: value for name, value in inherited.items() if "proxy" not in name.lower()},
            "ANTHROPIC_BASE_URL": url,
            "CLAUDE_CONFIG_DIR": str(config_dir),
        },
    )
    async with ClaudeSDKClient(options) as client:
        await client.query("Say hi.")
        await asyncio.to_thread(came.wait, 30)
