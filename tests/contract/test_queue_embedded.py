"""The embedded queue passes the queue contract."""

from __future__ import annotations

from pathlib import Path

import pytest

from ringfence.queue.protocol import CrashPoint
from ringfence.testing.queue_contract import Engine, QueueContract


class TestEmbedded(QueueContract):
    # a run starts in the transaction that leases it
    crash_points = frozenset(CrashPoint) - {CrashPoint.LEASED}

    @pytest.fixture
    def engine(self, tmp_path: Path) -> Engine:
        path = tmp_path / "queue" / "queue.sqlite"
        return Engine(
            target="ringfence.queue.embedded:EmbeddedQueue", arguments={"path": str(path)}
        )
