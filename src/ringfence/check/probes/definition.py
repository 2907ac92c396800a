"""The shape of a probe, and reading the families beside this file and an operator's own."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ringfence.check.finding import Check, Line, Severity
from ringfence.errors import CallerError

FAMILIES = (
    *("network", "destination", "http", "api"),
    *("filesystem", "process", "secrets", "agent", "audit"),
)
_MAX_BYTES, _MAX_PROBES = 4 << 20, 2000


class Twin(BaseModel):
    """What must work beside a probe: a dead network or shell would contain everything.

    `witness: upstream` is seen by the test upstream, with the nonce of this very run and with the
    platform's key; `inside` is printed by a program inside.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    title: str
    witness: Literal["inside", "upstream"]
    command: str


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    id: str
    title: str
    severity: Severity
    expect: str
    source: str
    command: str = ""
    line: Line | None = None
    layer: str | None = None
    twin: str | None = None
    mend: str | None = None
    host: bool = False
    residual: str = ""
    alone: bool = False
    limits: bool = False
    agent: bool = False
    unless: Literal["tmp_exec", "guest_root", "own_clock", "other_processor"] | None = None
    clause: str = ""


class _Family(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    line: Line
    layer: str
    mend: str
    twin: str
    twins: dict[str, Twin]
    probes: list[_Row]


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """One live attack.

    Attributes:
        command: bash, run in the workspace of a sandbox; prints ESCAPED when the attack worked.
        twin: runs beside it and must be allowed.
        host: the verdict is the host's: a judge of `ringfence.check.hostside` gives it.
        residual: why no fence of this kind stops it; such a probe is reported, never passed.
        alone: disturbs what runs beside it in the same sandbox.
        limits: runs under the small limits of a sandbox of its own.
        agent: judged by a real claude that plays a script, with a simulated model.
        unless: what of a policy, a technology or a processor takes the question away.
        clause: of the sandbox contract that it attacks, where a technology may declare to lack it.
        blind: why its own words decide nothing; it runs, and only what the host sees counts.
    """

    check: Check
    command: str
    twin: Twin
    host: bool = False
    residual: str = ""
    alone: bool = False
    limits: bool = False
    agent: bool = False
    unless: str | None = None
    clause: str = ""
    blind: str = ""


@cache
def built_in() -> tuple[Probe, ...]:
    """All probes that are shipped, in the order of their families."""
    return tuple(probe for name in FAMILIES for probe in _family(name))


def _family(name: str) -> list[Probe]:
    text = (resources.files("ringfence.check.probes") / f"{name}.yaml").read_text("utf-8")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    family = _Family.model_validate(yaml.load(text, Loader=loader))  # noqa: S506  a safe one
    return [_probe(family, row) for row in family.probes]


def _probe(family: _Family, row: _Row) -> Probe:
    check = Check(
        id=row.id,
        line=row.line or family.line,
        layer=row.layer or family.layer,
        title=row.title,
        severity=row.severity,
        live=True,
        expect=row.expect,
        mend=row.mend or family.mend,
        source=row.source,
    )
    return Probe(
        check=check,
        command=row.command,
        twin=family.twins[row.twin or family.twin],
        host=row.host,
        residual=row.residual,
        alone=row.alone,
        limits=row.limits,
        agent=row.agent,
        unless=row.unless,
        clause=row.clause,
    )


class _Own(BaseModel):
    """An operator's probe; the fields of the shared format, most of them optional."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    probe: str = Field(min_length=1, max_length=100_000)
    title: str = ""
    group: str = "own probes"
    severity: Severity = Severity.HIGH
    expect: str = ""
    source: str = ""
    where: Literal["in", "host"] = "in"
    needs: str = ""


def read_attacks(path: Path) -> tuple[Probe, ...]:
    """An operator's own probes: a JSON list of objects. Their ids get `own.` in front.

    Raises:
        CallerError: `attacks-invalid`, with the entry and what is wrong with it.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise CallerError("attacks-invalid", f"{path} is larger than {_MAX_BYTES} bytes")
        entries = json.loads(data)
    except (OSError, ValueError, RecursionError) as error:
        raise CallerError("attacks-invalid", f"{path} cannot be read: {error}") from None
    if not isinstance(entries, list) or not entries or len(entries) > _MAX_PROBES:
        raise CallerError(
            "attacks-invalid", f"{path} is no list of 1 to {_MAX_PROBES} probes", hint=_FORMAT
        )
    twin = next(probe.twin for probe in built_in() if probe.check.layer == "agent")
    found: dict[str, Probe] = {}
    for number, entry in enumerate(entries):
        probe = _own(entry, f"{path}, entry {number}", twin)
        if probe.check.id in found:
            raise CallerError("attacks-invalid", f"{path}: {probe.check.id} is there twice")
        found[probe.check.id] = probe
    return tuple(found.values())


_FORMAT = 'a probe is {"id": "X-1", "probe": "a bash command that prints ESCAPED if it got out"}'


def _own(entry: Any, where: str, twin: Twin) -> Probe:
    try:
        row = _Own.model_validate(entry)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise CallerError(
            "attacks-invalid", f"{where}: {name}: {first['msg']}", hint=_FORMAT
        ) from None
    check = Check(
        id=f"own.{row.id}",
        line=Line.ISOLATION,
        layer="own probes",
        title=row.title or row.id,
        severity=row.severity,
        live=True,
        expect=row.expect,
        mend="Find out what let it through, and name that in the policy or report it.",
        source=row.source,
    )
    needs = row.needs or "a judge on the host's side"
    return Probe(
        check=check,
        command=row.probe,
        twin=twin,
        blind=f"its verdict is not given inside: it needs {needs}" if row.where == "host" else "",
    )
