"""Findings about a definition that loads. PURE. Ids are stable and listed in `CATALOGUE`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ringfence.images.definition import ImageDefinition, bare_name

CATALOGUE: dict[str, tuple[Literal["warning", "info"], str]] = {
    "IMG001": ("info", "A package without a version: a rebuild may give another image."),
    "IMG002": ("warning", "A set-user-id program: its bit is taken away, so that it cannot work."),
    "IMG003": ("warning", "A server or daemon: nothing inside starts it, and no one can reach it."),
    "IMG004": ("warning", "No claude inside: only `ringfence exec` can use the image."),
    "IMG005": ("warning", "git or ripgrep is missing: tools of the agent will fail."),
}

_SETUID = frozenset({"sudo", "su-exec", "doas", "gosu", "uidmap", "fuse", "fuse3", "pkexec"})
_SERVERS = frozenset({"openssh-server", "cron", "dbus", "systemd", "docker.io", "nginx", "apache2"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One line of `image lint`."""

    id: str
    subject: str

    @property
    def severity(self) -> str:
        """`warning` fails `lint --strict`; `info` is a fact worth knowing."""
        return CATALOGUE[self.id][0]

    @property
    def message(self) -> str:
        """The sentence of the catalogue."""
        return CATALOGUE[self.id][1]


def lint(definition: ImageDefinition) -> list[Finding]:
    """Every finding, in the order of the catalogue."""
    return sorted(_findings(definition), key=lambda finding: (finding.id, finding.subject))


def _findings(definition: ImageDefinition) -> Iterator[Finding]:
    packages = definition.packages
    unpinned = [name for name in packages.pip if "==" not in name]
    unpinned += [name for name in packages.npm if "@" not in name[1:]]
    if definition.source == "debian":  # a host has one version of each, the installed one
        unpinned += [name for name in packages.apt if "=" not in name]
    names = {bare_name(name) for name in packages.apt}
    yield from (Finding(id="IMG001", subject=name) for name in unpinned)
    yield from (Finding(id="IMG002", subject=name) for name in names & _SETUID)
    yield from (Finding(id="IMG003", subject=name) for name in names & _SERVERS)
    if not definition.claude:
        yield Finding(id="IMG004", subject="claude")
    else:
        yield from (Finding(id="IMG005", subject=name) for name in {"git", "ripgrep"} - names)
