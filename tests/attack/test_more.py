"""Probes beside those that `ringfence check` ships, in the format of an operator's own.

Each looks for another door of a class that a shipped probe attacks; `more.json` says which.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from attacked import make, needs
from fence import PROFILE

from ringfence.check.finding import Finding, Outcome
from ringfence.check.live import Attack
from ringfence.check.probes.definition import read_attacks

PROBES = {probe.check.id: probe for probe in read_attacks(Path(__file__).parent / "more.json")}
pytestmark = pytest.mark.storm


@pytest.fixture(scope="module", params=[needs("bubblewrap"), needs("crun")])
def findings(request: pytest.FixtureRequest) -> dict[str, Finding]:
    found: list[Finding] = []
    attack = Attack(
        request.param,
        lambda state: make(request.param, state),
        PROFILE,
        tuple(PROBES.values()),
        found.append,
    )
    asyncio.run(attack.run())
    return {finding.check.id: finding for finding in found}


@pytest.mark.timeout(600)  # all of them run within the first
@pytest.mark.parametrize("probe_id", list(PROBES))
def test_probe_is_contained(findings: dict[str, Finding], probe_id: str) -> None:
    """Its twin, which has to be allowed, ran beside it: else the outcome is an error."""
    finding = findings[probe_id]
    assert finding.outcome is Outcome.PASS, finding.evidence
