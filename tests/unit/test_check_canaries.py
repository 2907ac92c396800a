"""A canary's hit is counted by whoever asks next, however late its thread is given the processor."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest

from ringfence.check.canaries import Canaries


@pytest.mark.parametrize("name", ["listener", "abstract socket"])
def test_what_reached_a_canary_is_seen_at_once(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = Canaries._is_own

    def slow(self: Canaries, peer: socket.socket, address: object) -> bool:
        time.sleep(0.3)
        return late(self, peer, address)

    monkeypatch.setattr(Canaries, "_is_own", slow)
    canaries = Canaries(tmp_path, "secret")
    child = 0
    try:
        assert canaries.hits() == ()
        child = os.fork()
        if child == 0:
            if name == "listener":
                end = socket.create_connection(canaries.tcp.getsockname())
            else:
                end = socket.socket(socket.AF_UNIX)
                end.connect("\0" + canaries.abstract_name)
            end.close()
            os._exit(0)
        os.waitpid(child, 0)
        assert canaries.hits() == (name,)
    finally:
        canaries.close()
