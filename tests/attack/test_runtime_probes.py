"""The attacks on the sandbox runtime: what it declares not to hold fails and says so, the rest holds.

Each program there starts a Node of its own: a part of the probes is tried always, all of them with
the storms.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fence import PROFILE

from backends import config, needs
from ringfence.check.finding import Finding, Outcome
from ringfence.check.live import Attack
from ringfence.check.probes.definition import Probe, built_in
from ringfence.sandbox.protocol import not_held
from ringfence.wiring import backends

pytestmark = needs("runtime")

DECLARED = {"PROC-40"}
OURS = {
    *("PROC-20", "PROC-50", "PROC-51", "PROC-52", "PROC-53", "PROC-54"),
    *("FS-41", "FS-42", "FS-50", "LIM-03"),
}
"""What the runtime alone leaves open: calls that its filter lets through, a /dev without a size,
an IPC namespace whose root has the agent's uid."""
SOME = {
    *("NET-01", "NET-06", "NET-08", "NET-15", "NET-24", "DST-01", "DST-16", "DST-27", "DST-33"),
    *("HTTP-04", "HTTP-09", "API-01", "API-10", "API-23", "FS-02", "FS-05", "FS-40", "FS-43"),
    *("PROC-01", "PROC-10", "PROC-41", "SEC-01", "SEC-10", "AGT-26", "AUD-01", "AUD-02", "LIM-02"),
}


def attacked(state: Path, probes: Sequence[Probe]) -> dict[str, Finding]:
    found: list[Finding] = []
    state.mkdir(mode=0o700)
    settings = config(state)
    attack = Attack(
        "runtime",
        lambda place: backends(settings.model_copy(update={"state_dir": place})).get("runtime"),
        PROFILE,
        probes,
        found.append,
        declared=not_held(backends(settings).get("runtime")),
    )
    asyncio.run(attack.run())
    return {finding.check.id: finding for finding in found}


def holds_but_for_what_it_declares(found: dict[str, Finding]) -> None:
    failed = {name for name, one in found.items() if one.outcome is Outcome.FAIL}
    expected = DECLARED & set(found)
    if PROFILE.accept_unenforced:
        expected |= {"LIM-01"} & set(found)
    wrong = {name: found[name].evidence for name in failed ^ expected}
    assert not wrong
    assert all("runtime declares it" in found[name].evidence for name in DECLARED & set(found))
    broken = {name: f.evidence for name, f in found.items() if f.outcome is Outcome.ERROR}
    assert not broken


@pytest.mark.timeout(300)
def test_some_of_every_layer(tmp_path: Path) -> None:
    wanted = SOME | DECLARED | OURS
    probes = [probe for probe in built_in() if probe.check.id in wanted]
    assert len(probes) == len(wanted)
    holds_but_for_what_it_declares(attacked(tmp_path / "state", probes))


@pytest.mark.storm
@pytest.mark.timeout(900)
def test_all(tmp_path: Path) -> None:
    holds_but_for_what_it_declares(attacked(tmp_path / "state", built_in()))
