"""The order in which tests are run by several workers: what takes long begins early.

`--dist worksteal` cuts the list of tests into as many pieces as there are workers, and who is done
takes half of what another has left, from its end. So each piece begins with its share of the slow
files, the slowest first, and ends with quick ones: the last minutes are many small tests, which
every worker can take, and a fixture that a whole file shares is not made by two of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

import pytest

SLOW: dict[str, int] = {
    "tests/attack/test_probes.py": 120,
    "tests/integration/test_image_build.py": 110,
    "tests/e2e/test_platform.py": 100,
    "tests/e2e/test_run.py": 100,
    "tests/e2e/test_docs.py": 90,
    "tests/e2e/test_microvm.py": 90,
    "tests/contract/test_sandbox_gvisor.py": 80,
    "tests/integration/test_gvisor.py": 80,
    "tests/attack/test_weak.py": 60,
    "tests/contract/test_queue_temporal.py": 60,
    "tests/contract/test_sandbox_container.py": 60,
    "tests/e2e/test_check.py": 60,
    "tests/e2e/test_liar.py": 60,
    "tests/e2e/test_quickstart.py": 60,
    "tests/e2e/test_warm.py": 60,
    "tests/integration/test_container.py": 60,
    "tests/integration/test_sandbox_microvm.py": 60,
    "tests/attack/test_runtime_probes.py": 40,
    "tests/contract/test_queue_embedded.py": 40,
    "tests/contract/test_sandbox_bubblewrap.py": 40,
    "tests/contract/test_sandbox_image.py": 40,
    "tests/contract/test_sandbox_runtime.py": 40,
    "tests/e2e/test_cli.py": 40,
    "tests/e2e/test_images.py": 40,
    "tests/e2e/test_lies.py": 40,
    "tests/integration/test_image_root.py": 40,
    "tests/integration/test_queue_outage.py": 40,
    "tests/integration/test_worker_turns.py": 40,
    "tests/attack/test_egress_probes.py": 30,
    "tests/attack/test_host_side.py": 30,
    "tests/attack/test_kernel.py": 30,
    "tests/attack/test_wrecked.py": 30,
    "tests/e2e/test_container.py": 30,
    "tests/e2e/test_deaths.py": 30,
    "tests/e2e/test_demo.py": 30,
    "tests/e2e/test_gvisor.py": 30,
    "tests/e2e/test_platform_resources.py": 30,
    "tests/e2e/test_policy.py": 30,
    "tests/e2e/test_runtime.py": 30,
    "tests/e2e/test_seed_examples.py": 30,
    "tests/e2e/test_wire.py": 30,
    "tests/integration/test_gateway_fuzz.py": 30,
    "tests/integration/test_sandbox_host.py": 30,
    "tests/e2e/test_hosting.py": 25,
    "tests/e2e/test_api.py": 20,
    "tests/e2e/test_defer.py": 20,
    "tests/e2e/test_isolation.py": 20,
    "tests/e2e/test_mcp_http.py": 20,
    "tests/e2e/test_modes.py": 20,
    "tests/e2e/test_serve.py": 20,
    "tests/e2e/test_simulator.py": 20,
}
"""Seconds of processor time, roughly, by file; what is not named takes less than the least."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In a worker of xdist, when what is not to run is out of the list."""
    if worker := getattr(config, "workerinput", None):
        files = [item.nodeid.partition("::")[0] for item in items]
        items[:] = [items[at] for at in arranged(files, worker["workercount"], SLOW)]


def arranged(files: Sequence[str], workers: int, seconds: Mapping[str, int]) -> list[int]:
    """Places of the tests in their new order; `files` names that of each test, in the present one.

    Tests of a file stay together and in order, those of a quick one unless a piece ends in it.
    """
    groups = [(name, [at for at, _ in group]) for name, group in groupby(enumerate(files), _name)]
    slow = sorted((one for one in groups if one[0] in seconds), key=lambda one: -seconds[one[0]])
    quick = [at for name, places in groups if name not in seconds for at in places]
    load = [0] * workers
    pieces: list[list[int]] = [[] for _ in range(workers)]
    for name, places in slow:
        least = load.index(min(load))
        load[least] += seconds[name]
        pieces[least] += places
    found: list[int] = []
    cut = 0
    for number, piece in enumerate(pieces):
        # as the scheduler cuts
        cut += (len(files) - cut) // (workers - number)
        found += piece
        room = max(0, cut - len(found))
        found += quick[:room]
        del quick[:room]
    return found


def _name(one: tuple[int, str]) -> str:
    return one[1]
