"""Which probe answers which attack: the rows of the suite, and what other systems fell to.

A row without an answer is a hole in the proof, so that tests hold every row to one; what no fence
stops is answered by its reason.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources

from ringfence.check import acts, artefacts, hostside
from ringfence.check.catalogue import precedents
from ringfence.check.probes.definition import Probe, built_in


@dataclass(frozen=True, kw_only=True, slots=True)
class Covered:
    """One attack.

    Attributes:
        row: its id in the suite, or `P` and its number among the precedents.
        ids: checks that try it. decides: who gives the verdict, or why nobody can.
    """

    row: str
    attack: str
    ids: tuple[str, ...]
    decides: str


def suite() -> tuple[Covered, ...]:
    """The attacks that probes are measured against, in their order."""
    text = (resources.files("ringfence.check.probes") / "suite.json").read_text("utf-8")
    probes = {probe.check.id: probe for probe in built_in()}
    return tuple(_row(row, probes.get(row["id"])) for row in json.loads(text))


def _row(row: Mapping[str, str], probe: Probe | None) -> Covered:
    ids = (probe.check.id,) if probe is not None else ()
    return Covered(row=row["id"], attack=row["title"], ids=ids, decides=_decides(probe))


def _decides(probe: Probe | None) -> str:
    if probe is None:
        return ""
    if probe.residual:
        return f"nobody: {probe.residual}"
    if probe.check.id in acts.JUDGED:
        return "a real claude, seen from outside"
    if probe.check.id in artefacts.JUDGES:
        return "the host, of what comes out of a review"
    if probe.host:
        judged = {*hostside.JUDGES, *hostside.LAST, *hostside.ALONE}
        return "the host" if probe.check.id in judged else ""
    return "the probe inside, canaries and its twin"


def fell() -> tuple[Covered, ...]:
    """What other systems fell to."""
    return tuple(
        Covered(
            row=f"P{number}",
            attack=f"{row.attack} ({row.precedent})",
            ids=row.ids,
            decides=row.elsewhere or "its checks",
        )
        for number, row in enumerate(precedents(), start=1)
    )
