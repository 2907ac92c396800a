"""Settings of Anthropic's sandbox runtime → a policy, and what of them has no equivalent. PURE.

What cannot be said as strictly is left out and named, never widened: a policy denies what it does
not allow, so that a line left out is a right less. Paths of the host that start with `~` or `.` or
hold a wildcard depend on who starts the runtime and where; a policy names absolute ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ringfence.errors import CallerError
from ringfence.policy import hosts, paths


@dataclass(frozen=True, kw_only=True, slots=True)
class Imported:
    """Result.

    Attributes:
        policy: JSON-shaped document; it loads.
        notes: dotted name of a setting, and what became of it.
    """

    policy: dict[str, Any]
    notes: tuple[tuple[str, str], ...] = ()


@dataclass
class _Draft:
    policy: dict[str, Any] = field(default_factory=dict)
    notes: list[tuple[str, str]] = field(default_factory=list)

    def note(self, name: str, text: str) -> None:
        self.notes.append((name, text))


_NEVER = "always so: no policy can lift it"
_NO_EQUIVALENT = "no equivalent; left out"
_KNOWN: dict[str, str] = {
    "network.strictAllowlist": _NEVER,
    "network.requireHostMatch": _NEVER,
    "network.refuseOpaqueTunnels": "always so, but for hosts with opaque: true",
    "network.deniedResolvedAddresses": "private ones are always refused; your list is left out",
    "network.tlsTerminate": "always so, by the deployment's own authority",
    "network.allowUnixSockets": "no socket of the host is ever shown",
    "network.allowAllUnixSockets": "no socket of the host is ever shown",
    "network.allowLocalBinding": "the sandbox's own loopback can always be bound, the host's never",
    "network.httpProxyPort": "egress takes its place",
    "network.socksProxyPort": "egress takes its place; it speaks no SOCKS",
    "network.mitmProxy": "egress takes its place",
    "network.parentProxy": "an operator's setting (egress.connect), no policy's",
    "network.filterRequest": "write methods and paths under network.allowed_hosts",
    "network.deniedDomainReasons": "refusals say the rule and the reason by themselves",
    "filesystem.allowGitConfig": "workspace files that run later are held back by review mode",
    "filesystem.disabled": "files are always isolated",
    "credentials": "seal them with `ringfence vault set`, and name them under secrets",
    "enableWeakerNestedSandbox": "never weaker: where a control is missing, the start is refused",
    "allowNestedUserNamespaces": "never",
}
"""Settings with a place of their own in ringfence; all else that is not translated has none."""


def import_srt(settings: Mapping[str, Any]) -> Imported:
    """Translate one file.

    Raises:
        CallerError: `usage` when it does not have the shape of such a file.
    """
    network, filesystem = _section(settings, "network"), _section(settings, "filesystem")
    draft = _Draft({"version": 1, "isolation": {"backend": "runtime"}})
    draft.policy["network"] = _network(draft, network)
    draft.policy["filesystem"] = _filesystem(draft, filesystem)
    for name in _others(settings, network, filesystem):
        draft.note(name, _KNOWN.get(name, _NO_EQUIVALENT))
    return Imported(policy=draft.policy, notes=tuple(draft.notes))


_TRANSLATED = {
    *("network.allowedDomains", "network.deniedDomains"),
    *("filesystem.denyRead", "filesystem.allowRead"),
    *("filesystem.allowWrite", "filesystem.denyWrite"),
}


def _others(*sections: Mapping[str, Any]) -> Iterator[str]:
    settings, network, filesystem = sections
    names = [f"network.{key}" for key in network] + [f"filesystem.{key}" for key in filesystem]
    names += [key for key in settings if key not in {"network", "filesystem"}]
    return (name for name in names if name not in _TRANSLATED)


def _section(settings: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = settings.get(name, {}) if isinstance(settings, Mapping) else None
    if not isinstance(value, Mapping):
        raise CallerError("usage", f"this is no settings file of the sandbox runtime: {name}")
    return value


def _texts(section: Mapping[str, Any], name: str) -> list[str]:
    value = section.get(name) or []
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise CallerError("usage", f"{name} is not a list of texts")
    return list(dict.fromkeys(value))


def _network(draft: _Draft, section: Mapping[str, Any]) -> dict[str, Any]:
    name = "network.allowedDomains"
    denied = [host.lower() for host in _texts(section, "deniedDomains")]
    if unclear := [host for host in denied if hosts.host_problem(host)]:
        # what is denied is not known then, and so neither what is allowed
        text = f"{', '.join(unclear)} is no exact host and no wildcard of one: no host is allowed"
        draft.note("network.deniedDomains", text)
        return {"allowed_hosts": []}
    allowed = []
    for host in dict.fromkeys(text.lower() for text in _texts(section, "allowedDomains")):
        if problem := hosts.host_problem(host):
            draft.note(name, f"{host}: {problem}; left out")
        elif host in denied or any(_covers(pattern, host) for pattern in denied):
            draft.note(name, f"{host}: taken away by deniedDomains")
        elif below := [one for one in denied if _covers(host, one)]:
            # deny wins over a wildcard there; here a wildcard has no exceptions
            draft.note(name, f"{host}: it would allow {', '.join(below)}; name the hosts instead")
        else:
            allowed.append(host)
    if allowed:
        draft.note(name, "port 443 alone; another one is written as {host: …, port: …}")
    return {"allowed_hosts": allowed}


def _covers(pattern: str, host: str) -> bool:
    """Whether a wildcard matches a host, or any host of another wildcard."""
    return pattern == host or hosts.matches(pattern, host.removeprefix("*."))


def _filesystem(draft: _Draft, section: Mapping[str, Any]) -> dict[str, Any]:
    writable = list(_paths(draft, section, "allowWrite", writable=True))
    readable = list(_paths(draft, section, "allowRead", writable=False))
    shown = [*writable, *readable]
    # what is neither shown nor below it is absent without a line
    blocked = [
        path
        for path in _paths(draft, section, "denyRead", writable=None)
        if any(paths.below(path, one) and path != one for one in shown)
    ]
    for path in _texts(section, "denyWrite"):
        inside = path.startswith("/") and any(paths.below(path, one) for one in writable)
        text = "no exception below a writable path can be made" if inside else "it is not anyway"
        draft.note("filesystem.denyWrite", f"{path}: {text}")
    if "denyRead" in section:
        text = "the host is absent already: readable is only what filesystem.readable_paths names"
        draft.note("filesystem.denyRead", text)
    found = {
        "writable_paths": _without_exceptions(draft, writable, _texts(section, "denyWrite")),
        "readable_paths": [path for path in readable if path not in writable],
        "blocked_paths": blocked,
    }
    return {key: value for key, value in found.items() if value}


def _without_exceptions(draft: _Draft, writable: list[str], denied: list[str]) -> list[str]:
    """Those that hold no path which must not be written: the whole would be wider."""
    kept = []
    for path in writable:
        if any(paths.below(one.rstrip("/"), path) for one in denied if one.startswith("/")):
            draft.note("filesystem.allowWrite", f"{path}: denyWrite has a path in it; left out")
        else:
            kept.append(path)
    return kept


def _paths(
    draft: _Draft, section: Mapping[str, Any], name: str, *, writable: bool | None
) -> Iterator[str]:
    for path in _texts(section, name):
        if path in {".", "./"} and writable:
            text = "the workspace: review mode leaves a patch; filesystem.workspace: direct writes"
            draft.note(f"filesystem.{name}", text)
        elif not path.startswith("/") or set("*?[") & set(path):
            draft.note(f"filesystem.{name}", f"{path}: write absolute paths; left out")
        elif path.rstrip("/") in {"", "/tmp"}:  # noqa: S108  a name in a file
            draft.note(f"filesystem.{name}", f"{path}: the sandbox has its own")
        else:
            plain = path.rstrip("/")
            problem = (
                paths.path_problem(plain)
                if writable is None
                else paths.shown_problem(plain, writable=writable)
            )
            if problem:
                draft.note(f"filesystem.{name}", f"{path}: {problem}; left out")
            else:
                yield plain
