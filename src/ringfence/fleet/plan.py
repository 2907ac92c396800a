"""What a fleet is made of, and how long it waits before it starts a member again. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from ringfence.config.plain import PLAIN

STEADY_SECONDS = 10.0
"""Whoever served so long could live: its next pause is the first again."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 30.0


class Rank(IntEnum):
    """Started upwards, ended downwards: a gateway shows its callers how the last turn ends, and
    all of them need the services.
    """

    SERVICE = 0
    GATEWAY = 1
    WORKER = 2


@dataclass(frozen=True, kw_only=True)
class Member:
    """One process.

    Attributes:
        name: in the log.
        ready: text of an output line by which it says that it serves. ready_first: it begins a
            line of standard output; else it may stand anywhere in a line of either stream.
        environment: all of it.
        descriptors: what it inherits.
        grace_seconds: from being told to end until it is killed.
        pid_file: whose first line names the process that is told to end, where that is not the
            one that was started. signal: what that one is told.
    """

    name: str
    rank: Rank
    argv: Sequence[str]
    ready: str
    environment: Mapping[str, str]
    descriptors: tuple[int, ...] = ()
    grace_seconds: float = 60.0
    pid_file: str | None = None
    signal: int = 15
    ready_first: bool = False

    def says_ready(self, line: str, *, out: bool) -> bool:
        """Whether a line, of standard output or not, is the one by which it says so."""
        if self.ready_first:
            return out and line.startswith(self.ready)
        return self.ready in line


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """How many, and of what; `arguments` are those that gateways and workers share.

    Attributes:
        environment: the caller's; each member gets of it what it needs.
        buckets: who reads buckets whose keys are not in the settings.
    """

    gateways: int
    workers: int
    slots: int
    drain: float
    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    buckets: frozenset[Rank] = frozenset()


_NAMED = frozenset(
    {
        *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "TERM", "TZ", "LANG", "LANGUAGE", "TMPDIR"),
        *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "VIRTUAL_ENV"),
        *("DBUS_SESSION_BUS_ADDRESS", "CREDENTIALS_DIRECTORY", "GLIBC_TUNABLES"),
    }
)
_BEGUN = ("LC_", "XDG_", "PYTHON", "LD_", "MALLOC_", "SSL_CERT_", "PG", "KRB5", "RINGFENCE_")
"""What a program of the host's finds its way by, what PostgreSQL's client reads, our settings. The
rest of the caller's environment no member needs; whose keys are in it nobody here can know.
"""
_CALLERS = frozenset({"RINGFENCE_URL", "RINGFENCE_API_KEY", PLAIN})
"""Of whoever asks a gateway."""
_WORKERS_ALONE = frozenset(
    {
        "ANTHROPIC_API_KEY",
        *("RINGFENCE_SESSION_STORE", "RINGFENCE_BLOB_STORE", "RINGFENCE_S3"),
        *("RINGFENCE_LIMITS", "RINGFENCE_SECRETS"),
    }
)
"""The key of the model, where transcripts and snapshots lie, where the model's limits are counted,
and the way to the secrets of a team's own store. Files are not among them: gateways keep those in a
directory.
"""
_GATEWAYS_ALONE = frozenset({"RINGFENCE_WEBHOOKS"})
"""They sign what the servers of operators are told."""
_BUCKETS = "AWS_"
"""What the client of a bucket reads where the settings hold no key for it."""


def _for(rank: Rank, numbers: Numbers) -> dict[str, str]:
    """A setting's parts and spellings are the setting, as `load_config` reads them."""
    own, others = _WORKERS_ALONE, _GATEWAYS_ALONE
    if rank is Rank.GATEWAY:
        own, others = others, own
    found = {}
    for name, value in numbers.environment.items():
        setting = name.upper().partition("__")[0]
        general = setting in _NAMED or setting.startswith(_BEGUN)
        buckets = name.startswith(_BUCKETS) and rank in numbers.buckets
        if setting in own or buckets or (general and setting not in others | _CALLERS):
            found[name] = value
    return found


def members(program: Sequence[str], numbers: Numbers, listener: int) -> list[Member]:
    """Gateways on one listening descriptor, and workers, each with what it needs of the
    environment.
    """
    gateways = [
        Member(
            name=f"gateway-{number}",
            rank=Rank.GATEWAY,
            argv=(*program, "serve", "--fd", str(listener), *numbers.arguments),
            ready="http://",
            ready_first=True,
            environment=_for(Rank.GATEWAY, numbers),
            descriptors=(listener,),
        )
        for number in range(1, numbers.gateways + 1)
    ]
    tail = ("--slots", str(numbers.slots), "--drain", str(numbers.drain), *numbers.arguments)
    workers = [
        Member(
            name=f"worker-{number}",
            rank=Rank.WORKER,
            argv=(*program, "worker", *tail),
            ready='"worker.ready"',
            environment=_for(Rank.WORKER, numbers),
            # its drain, and then what it takes to end its sandboxes and write the last events
            grace_seconds=numbers.drain + 60.0,
        )
        for number in range(1, numbers.workers + 1)
    ]
    return [*gateways, *workers]


def pause_after(served: float, before: float) -> float:
    """Seconds until a member that served for so long is started again, `before` being the last
    such pause: it doubles while the member cannot live, and begins anew when it could.
    """
    if served >= STEADY_SECONDS or before <= 0:
        return _FIRST_PAUSE
    return min(_LONGEST_PAUSE, before * 2)


def log_line(name: str, line: str) -> str:
    """A member's line as one JSON object that says whose it is."""
    if line.startswith("{") and line.endswith("}") and len(line) > 2:
        return f'{{"process": {json.dumps(name)}, {line[1:]}'
    return json.dumps({"process": name, "event": line})
