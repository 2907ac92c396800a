"""What egress knows of each sandbox, and what all of them share."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol
from urllib.parse import urlsplit

from ringfence.channel.messages import (
    EgressDenied,
    Message,
    ProviderConfig,
    WitnessViolated,
)
from ringfence.egress.address import Resolver
from ringfence.egress.aside import Aside, heavy
from ringfence.egress.credentials import Credentials
from ringfence.egress.model import (
    Admitted,
    Judged,
    Refusal,
    Report,
    RunState,
    ToolUseSeen,
    Violation,
    judge,
)
from ringfence.egress.model.carry import fit, fits
from ringfence.egress.model.residency import serves
from ringfence.egress.redact import Needles, Redactor
from ringfence.egress.tls import Authority
from ringfence.egress.turns import Turns
from ringfence.egress.upstream import Pool
from ringfence.errors import UnavailableError
from ringfence.policy.compiled import EgressRules
from ringfence.record.client import RecorderClient

MODEL_HOST = "model.internal"
PUBLIC_MODEL_HOST = "api.anthropic.com"
_MAX_NOTICES = 500
_MAX_FREE = 20_000
"""Model requests of one sandbox that cost nothing, and that the worker hears of: whoever is inside
can have any number of them. Those that cost something it hears of however many there are."""


_TOKENS = (
    *("input_tokens", "output_tokens"),
    *("cache_creation_input_tokens", "cache_read_input_tokens"),
)


@dataclass(frozen=True, slots=True)
class Target:
    """Where an exchange goes.

    Attributes:
        literal: host is an address, and dialled as it stands.
        ours: the operator's settings name it: it may resolve to a private network.
    """

    host: str
    port: int
    tls: bool
    prefix: str = ""
    literal: bool = False
    ours: bool = False

    @property
    def host_header(self) -> str:
        """As the upstream expects it: the port only when it is not the scheme's."""
        default = 443 if self.tls else 80
        return self.host if self.port == default else f"{self.host}:{self.port}"


def provider_target(provider: ProviderConfig) -> Target:
    """Where a provider's base URL leads; literal addresses come from settings alone."""
    return _target(provider.base_url)


@lru_cache(maxsize=64)
def _target(base_url: str) -> Target:
    parts = urlsplit(base_url)
    tls = parts.scheme == "https"
    host = parts.hostname or ""
    literal = host.replace(".", "").isdigit() or ":" in host or host == "localhost"
    port, prefix = parts.port or (443 if tls else 80), parts.path.rstrip("/")
    return Target(host, port, tls, prefix, literal, ours=host != PUBLIC_MODEL_HOST)


@dataclass(frozen=True, slots=True)
class Leg:
    """Where one try of a model request goes: a provider of the settings, and the model there, by
    the name that the Messages API gives it.
    """

    provider: str
    model: str


class Connection(Protocol):
    """What a sandbox knows of one of its connections."""

    work: asyncio.Task[None] | None

    def abort(self) -> None:
        """Close at once; its work is cancelled."""


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What the process has once."""

    recorder: RecorderClient
    credentials: Credentials
    providers: Mapping[str, ProviderConfig]
    resolver: Resolver
    authority: Authority | None
    upstream_tls: ssl.SSLContext
    notify: Callable[[Message], None]
    tell: Callable[[dict[str, Any]], None]
    """Of a `ModelCalled`, by its fields: two go with each request, and the worker checks them."""
    wait_for_audit: bool = True
    linger: float = 0.0
    """Seconds that the record of an end may wait for company."""
    aside: Aside | None = None
    """Without one every body is read in the loop, as in tests."""
    sign: Callable[..., tuple[tuple[bytes, bytes], ...]] | None = None
    """Of `ringfence.egress.signing`, where a provider wants it."""
    turns: Turns | None = None
    """None in tests alone: a request then has one try."""


@dataclass(kw_only=True)
class SandboxState:
    """One sandbox: its rules, what it has used, what it is connected to."""

    sandbox_id: str
    run_id: str
    session_id: str
    rules: EgressRules
    shared: Shared
    run: RunState
    credentials: Credentials
    """The process's own and its tenant's; what no other sandbox has."""
    tenant: str = ""
    batch: bool = False
    pool: Pool = field(default_factory=Pool)
    servers: list[asyncio.Server] = field(default_factory=list)
    connections: set[Connection] = field(default_factory=set)
    bytes_out: int = 0
    body_bytes: int = 0
    frozen: bool = False
    violated: bool = False
    closed: bool = False
    notices: int = 0
    requests: int = 0
    free: int = 0
    mixed: bool = False
    """Whether another model than was asked for has answered here."""
    reading: asyncio.Lock = field(default_factory=asyncio.Lock)

    def __post_init__(self) -> None:
        """What every request needs and no request changes."""
        self._ids = {
            "run_id": self.run_id,
            "session_id": self.session_id,
            "sandbox_id": self.sandbox_id,
        }
        names = [rule.name for rule in self.rules.credentials]
        provider = self.shared.providers.get(self.rules.model.provider)
        # a request may go to another of them than the first
        each = self.shared.providers.values()
        names += [one.credential for one in each if one.credential is not None]
        self._untold: dict[str, dict[str, Any]] = {}
        self._waiters: list[asyncio.Future[None]] = []
        self._names = tuple(names)
        self._generation = 0
        self._hidden: Needles | None = None
        self.model_target = provider_target(provider) if provider is not None else None

    def way(self, leg: Leg) -> tuple[ProviderConfig, Target] | None:
        """The upstream of a leg; None for one that the settings do not have."""
        provider = self.shared.providers.get(leg.provider)
        return None if provider is None else (provider, provider_target(provider))

    def legs(self, model: str) -> list[Leg]:
        """Where a request for a model may go, in order. Where none serves it, the first is tried,
        and says why not.
        """
        rules = self.rules.model
        legs = [Leg(rules.provider, model)]
        if not rules.failover:
            return legs
        legs += [
            Leg(each.provider or rules.provider, each.model or model) for each in rules.failover
        ]
        served = [each for each in dict.fromkeys(legs) if self._serves(each)]
        return served or legs[:1]

    def _serves(self, leg: Leg) -> bool:
        """Whether a provider has the model, and the policy lets a request go there."""
        provider = self.shared.providers.get(leg.provider)
        return serves(self.rules.model, leg.provider, provider, leg.model)

    @property
    def shut(self) -> str:
        """Why nothing may go out any more; empty while something may."""
        if self.violated:
            return "witness-violated"
        return "sandbox-frozen" if self.frozen else ""

    @property
    def hidden(self) -> Needles:
        """Every value that may be in an answer to this sandbox, also one that was replaced."""
        if self._hidden is None or self._generation != self.credentials.generation:
            self._generation = self.credentials.generation
            self._hidden = Needles(self.credentials.values(self._names))
        return self._hidden

    def forget_hidden(self) -> None:
        """Values changed: one that is overwritten must not stay here until somebody asks."""
        self._hidden = None

    def redactor(self) -> Redactor:
        """For one answer: removes every credential that this sandbox's rules can inject."""
        return Redactor(lambda: self.hidden)

    def next_request(self) -> str:
        """A name for a model request, unique in its run."""
        self.requests += 1
        return f"req_{self.requests}"

    def called(self, request_id: str, **what: Any) -> None:
        """Tell the worker of a model request, when it begins and when it is over. With too many
        that were free, of one that was not when it is over, and of the others not at all.
        """
        told = {
            "type": "model_called",
            "sandbox_id": self.sandbox_id,
            "request_id": request_id,
            **what,
        }
        over = "over" in what
        if not over and self.free >= _MAX_FREE:
            self._untold[request_id] = told
            return
        if over:
            paid = _paid(what)
            self.free += not paid
            begun = self._untold.pop(request_id, None)
            if begun is not None and not paid:
                return
            if begun is not None:
                self.shared.tell(begun)
        self.shared.tell(told)

    async def judge(self, body: bytes) -> Judged:
        """What a model request's body alone decides. One that is hard to read is read aside, and
        of one sandbox one at a time: it takes no more than its own place there.
        """
        if self.shared.aside is None or not heavy(body):
            return judge(body, self.rules.model)
        async with self.reading:
            return await self.shared.aside.judge(body, self.rules.model)

    async def fit(self, admitted: Admitted, model: str) -> Admitted | Refusal:
        """A request as a leg's model takes it; read where `judge` reads it, and as rarely."""
        mixed, aside = self.mixed, self.shared.aside
        if fits(admitted, model, mixed=mixed) or aside is None or not heavy(admitted.body):
            return fit(admitted, model, mixed=mixed)
        async with self.reading:
            return await aside.fit(admitted, model, mixed=mixed)

    async def settled(self) -> None:
        """Until a model request of this sandbox ends."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        await waiter

    def settle(self) -> None:
        """A model request ended: who waits for the budget looks again, in order."""
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def record(self, kind: str, *, durable: bool, **fields: object) -> None:
        """Append an event; the caller may go on only when this returns."""
        waits = self.shared.wait_for_audit
        await self.shared.recorder.append_fields(
            {"type": kind, **self._ids, **fields},
            durable=durable and waits,
            linger=0.0 if waits else self.shared.linger,
        )

    def record_soon(self, kind: str, **fields: object) -> None:
        """Append without waiting, in order; a recorder that is gone is noticed by the next
        durable append, which refuses.
        """
        self._append(kind, fields, 0.0)

    def record_end(self, kind: str, **fields: object) -> None:
        """The same, of what has a beginning on record: it may wait for company."""
        self._append(kind, fields, self.shared.linger)

    def _append(self, kind: str, fields: dict[str, object], linger: float) -> None:
        try:
            self.shared.recorder.append_soon({"type": kind, **self._ids, **fields}, linger)
        except UnavailableError:
            self.frozen = True  # nothing more may pass unrecorded

    def denied(self, target: str, rule: str, reason: str) -> None:
        """Record and tell of a refusal."""
        self.record_soon("egress.refused", target=target[:256], rule=rule, reason=reason, count=1)
        if self.notices < _MAX_NOTICES:
            self.notices += 1
            self.shared.notify(
                EgressDenied(
                    sandbox_id=self.sandbox_id, reason=reason, target=target[:256], rule=rule
                )
            )

    def violation(self, violation: Violation) -> None:
        """The two witnesses disagree: nothing more goes out for this run."""
        self.violated = True
        self.record_soon(
            "witness.disagreed", tool_use_id=violation.tool_use_id, reason=violation.reason
        )
        self.shared.notify(
            WitnessViolated(
                sandbox_id=self.sandbox_id,
                reason=violation.reason,
                tool_use_id=violation.tool_use_id,
            )
        )

    def answered(
        self,
        request_id: str,
        report: Report,
        status: int,
        duration_ms: float,
        reason: str,
        *,
        billed: bool,
    ) -> None:
        """Record one model exchange and the tool calls it asked for."""
        usage = report.usage
        counted = {
            "input_tokens": usage.input_tokens,
            "output_tokens": usage.output_tokens,
            "cache_creation_input_tokens": usage.cache_creation_input_tokens,
            "cache_read_input_tokens": usage.cache_read_input_tokens,
            "cost_usd": usage.cost_usd,
        }
        for tool in report.tool_uses:
            self.record_soon(
                "tool.requested",
                tool_use_id=tool.id,
                name=tool.name,
                input_hmac=self.shared.recorder.hmac(canonical_input(tool)),
                complete=tool.complete,
            )
        self.record_end(
            "model.answered",
            request_id=request_id,
            model=report.model,
            status=status,
            duration_ms=round(duration_ms, 3),
            stop_reason=report.stop_reason,
            reason=reason,
            billed=billed,
            **counted,
        )
        if billed:
            told = {"model": report.model[:128], "stop_reason": report.stop_reason[:128]}
            self.called(request_id, over=True, status=status, **told, **counted)

    def close(self) -> list[asyncio.Task[None]]:
        """Stop listening, drop every connection; returns the work that is still to end."""
        self.closed = True
        for server in self.servers:
            server.close()
        working = [c.work for c in self.connections if c.work is not None and not c.work.done()]
        for connection in list(self.connections):
            connection.abort()
        self.pool.close()
        return working


def _paid(told: Mapping[str, Any]) -> bool:
    return any(told.get(name) for name in _TOKENS)


def canonical_input(tool: ToolUseSeen) -> bytes:
    """A tool's input as the worker hashes it too: sorted keys, no spaces; raw when it is torn."""
    try:
        value = json.loads(tool.input_json)
    except (ValueError, RecursionError):
        return tool.input_json
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode(
        "utf-8", "surrogatepass"
    )
