"""The embedded queue passes the queue contract."""

from __future__ import annotations

from pathlib import Path

import pytest

from ringfence.model import RunStatus
from ringfence.queue.embedded import EmbeddedQueue
from ringfence.queue.protocol import Queue
from ringfence.states import ENDS
from ringfence.testing.queue_contract import Engine, QueueContract, TenantLimits


class TestEmbedded(QueueContract, TenantLimits):
    @pytest.fixture
    def engine(self, tmp_path: Path) -> Engine:
        path = tmp_path / "queue" / "queue.sqlite"
        return Engine(
            target="ringfence.queue.embedded:EmbeddedQueue", arguments={"path": str(path)}
        )

    async def outcome(self, queue: Queue, run_id: str) -> RunStatus | None:
        assert isinstance(queue, EmbeddedQueue)
        run = await queue.find(run_id)
        return run.status if run is not None and run.status in ENDS else None
