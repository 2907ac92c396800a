"""What attempts share on one worker, and how its helpers' deaths are noticed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path

from ringfence.agent.messages import AgentMessage
from ringfence.agent.permissions import Approver, ToolGate
from ringfence.channel.link import EgressLink
from ringfence.channel.messages import AnyMessage, DeskMessage
from ringfence.config import Config
from ringfence.errors import UnavailableError
from ringfence.record.recorder import Recorder
from ringfence.record.session_base import SessionStore
from ringfence.sandbox.protocol import Sandbox
from ringfence.sandbox.registry import Backends
from ringfence.telemetry.hub import Telemetry
from ringfence.worker.breakers import Breakers
from ringfence.worker.memory import Memory
from ringfence.worker.seats import SeatPool
from ringfence.worker.warm import WarmPool

OnMessage = Callable[[AgentMessage], None]


class NoticeBoard:
    """Hands egress's notices to the attempt whose sandbox they name; what is about turns of model
    requests to `desk`; and all to `telemetry`, where there is one.
    """

    def __init__(self, telemetry: Telemetry | None = None) -> None:
        self._telemetry = telemetry
        self._readers: dict[str, Callable[[AnyMessage], None]] = {}
        self.desk: Callable[[DeskMessage], None] | None = None

    def post(self, message: AnyMessage) -> None:
        """Called by the link for every notice."""
        if self._telemetry is not None:
            self._telemetry.noticed(message)
        if isinstance(message, DeskMessage):
            if self.desk is not None:
                self.desk(message)
            return
        reader = self._readers.get(getattr(message, "sandbox_id", ""))
        if reader is not None:
            reader(message)

    @contextlib.contextmanager
    def reading(self, sandbox_id: str, reader: Callable[[AnyMessage], None]) -> Iterator[None]:
        """Receive a sandbox's notices while the block runs."""
        self._readers[sandbox_id] = reader
        try:
            yield
        finally:
            del self._readers[sandbox_id]


@dataclass(frozen=True, kw_only=True)
class Station:
    """What an attempt works with; made by the composition root, shared by attempts.

    `sessions` are those of the host itself; a tenant's attempt has a station with
    `sessions.for_tenant(…)` in their place (`dataclasses.replace`), and the `gate` of its agent.
    """

    config: Config
    backends: Backends
    recorder: Recorder
    egress: EgressLink
    notices: NoticeBoard
    sessions: SessionStore
    approver: Approver
    claude: Path | None
    ca_certificate: bytes | None
    seats: SeatPool
    warm: WarmPool | None = None
    memory: Memory | None = None
    breakers: Breakers | None = None
    telemetry: Telemetry | None = None
    gate: ToolGate | None = None

    def metering(self, sandbox: Sandbox) -> AbstractAsyncContextManager[None]:
        """Look at what a sandbox takes while the block runs, where anybody wants to know."""
        return contextlib.nullcontext() if self.memory is None else self.memory.metering(sandbox)

    async def lost(self) -> UnavailableError:
        """Wait until egress or the recorder is gone, and say which.

        Without either nothing may go on: `claude` alone would ask a dead socket again and again
        for minutes, with a sandbox that nobody watches.
        """
        loop = asyncio.get_running_loop()
        egress = loop.create_task(self.egress.ended())
        recorder = loop.create_task(self.recorder.ended())
        try:
            await asyncio.wait({egress, recorder}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            egress.cancel()
            recorder.cancel()
        # egress ends by itself without a recorder: the cause is named, not its effect
        name = "recorder" if recorder.done() and not recorder.cancelled() else "egress"
        return UnavailableError(
            f"{name}-unavailable",
            f"the {name} process has ended, and with it the run",
            hint="see its last words on standard error",
        )
