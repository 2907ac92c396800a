"""Every probe of probes.json against a live sandbox and the real egress process.

`in` probes print their own verdict; `host` probes are judged in test_host_side.py, by what the
host sees. A probe whose helper breaks is a failure, not a pass.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from attacked import BACKENDS
from fence import CANARY, KEY, Fence

PROBES = json.loads((Path(__file__).parent / "probes.json").read_text())
INSIDE = [probe for probe in PROBES if probe["where"] == "in"]

NO_VERDICT = {"NET-19", "DST-18", "DST-20", "HTTP-30"}
"""They always print contained; the host's side is checked in test_host_side.py."""


REFUSED_BY_ITS_KERNEL = {
    ("gvisor", "NET-19"): "[Errno 22] Invalid argument",  # descriptors pass no socket of the host
    ("gvisor", "PROC-32"): "list index out of range",  # there is no such line to be read
}
"""Probes that break, because what they reach for is not there: the words in which they do."""


@pytest.fixture(scope="module", params=BACKENDS)
def fence(request: pytest.FixtureRequest) -> Iterator[Fence]:
    fence = Fence(request.param)
    fence.start()
    try:
        yield fence
        fence.assert_only_what_was_granted_came_out()
    finally:
        fence.stop()


def test_the_positive_control(fence: Fence) -> None:
    """An allowed request passes and carries the platform's key: a dead network is no fence."""
    output, _ = fence.probe(
        "python3 -c 'from h import *; r=tun(req()); print(r.decode(\"latin-1\"))'"
    )
    assert "x-upstream: 1" in output, output
    assert "x-injected: 1" in output, output


@pytest.mark.parametrize("probe", INSIDE, ids=[probe["id"] for probe in INSIDE])
def test_probe_is_contained(fence: Fence, probe: dict[str, str]) -> None:
    before = len(fence.host_hits)
    command = probe["probe"]
    if fence.isolation == "gvisor":
        # every file through the gofer: the host's own programs would take minutes
        command = command.replace("--exclude-dir=proc", "--exclude-dir=proc --exclude-dir=usr")
        # its directory still lists what a mask covers: that it opens for nobody has its own test
        command = command.replace("/dev/(null|", "/dev/(fuse|null|")
    output, code = fence.probe(command)
    assert not any(line.startswith("ESCAPED") for line in output.splitlines()), output
    assert CANARY not in output
    assert KEY not in output
    assert len(fence.host_hits) == before, "a canary of the host was reached"
    if words := REFUSED_BY_ITS_KERNEL.get((fence.isolation, probe["id"])):
        assert words in output
    else:
        assert "Traceback (most recent call last)" not in output, f"broken probe: {output}"
    assert "(timeout)" not in output, f"no verdict in time: {output}"


def test_no_probe_is_forgotten() -> None:
    assert len(PROBES) >= 144
    assert {probe["where"] for probe in PROBES} == {"in", "host"}
    assert os.environ.get("STRICT") is None
