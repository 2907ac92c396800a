"""Every check there is, in one list: for `--list`, for `--only`, for the docs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import resources
from typing import Any

import yaml

from ringfence.check import promised, providers, secrets, static, versions
from ringfence.check.finding import Check
from ringfence.check.probes.definition import built_in
from ringfence.errors import CallerError


def catalogue() -> tuple[Check, ...]:
    """All built-in checks, static ones first."""
    return (
        *static.policy_checks(),
        *static.feature_checks(),
        *promised.checks(),
        *static.control_checks(),
        *secrets.checks(),
        *providers.checks(),
        *versions.checks(),
        *(probe.check for probe in built_in()),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Precedent:
    """An attack that worked elsewhere, and the checks that try it here.

    Attributes:
        ids: checks of the catalogue. elsewhere: what else answers it: a test, a design.
    """

    attack: str
    precedent: str
    ids: tuple[str, ...]
    elsewhere: str = ""


def precedents() -> tuple[Precedent, ...]:
    """What other systems fell to."""
    text = (resources.files("ringfence.check.probes") / "precedents.yaml").read_text("utf-8")
    rows: list[dict[str, Any]] = yaml.safe_load(text)
    return tuple(
        Precedent(
            attack=row["attack"],
            precedent=row["precedent"],
            ids=tuple(row.get("ids", ())),
            elsewhere=row.get("elsewhere", ""),
        )
        for row in rows
    )


@dataclass(frozen=True, slots=True)
class Selection:
    """`--only`: ids, or patterns with `*`; empty selects everything."""

    patterns: tuple[str, ...] = ()

    def takes(self, check_id: str) -> bool:
        """Whether a check is selected."""
        return not self.patterns or any(fnmatchcase(check_id, one) for one in self.patterns)


EVERYTHING = Selection()


def select(patterns: Sequence[str], known: Sequence[str]) -> Selection:
    """Raise CallerError `check-unknown` for a pattern that selects nothing: a check that was
    misspelt would otherwise be one that never failed.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise CallerError(
                "check-unknown",
                f"no check is called {pattern!r}",
                hint="ringfence check --list",
            )
    return Selection(tuple(patterns))
