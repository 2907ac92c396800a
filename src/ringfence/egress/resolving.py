"""Values that come from sources: resolved at use, kept for their time, overwritten when it is over.

One question at a time for each credential, whoever waits for it. A source that does not answer
leaves what it gave before in use until its lease ends; one that says no takes it away at once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Protocol

from ringfence.config.secrets import CredentialSettings
from ringfence.egress.credentials import Bounds, CredentialError, LoginSecret, Secret
from ringfence.egress.keeping import Given
from ringfence.egress.lifetime import NEVER, Ages, Doubting, Lifetime, lifetime, pause
from ringfence.errors import UnavailableError

REDACT_SECONDS = 600.0
"""How long a value that was replaced is still removed from answers: an upstream may repeat what it
was sent before. Then it is overwritten here, too."""
_DOUBT_SECONDS = 2.0
"""A value younger than this is not asked for again because an upstream answered 401: anybody inside
can have a 401, and an upstream can answer nothing else. Twice as long for each doubt, whatever it
brought: a login brings another value each time. At most the time after which the source is asked
anyway; as short as before when for that long nothing was refused."""
_LOGIN_DOUBT_SECONDS, _LOGIN_DOUBT_MOST = 60.0, 480.0
"""The second and the longest of what a login gave: to ask for that is to assume a role."""
_OLDER = 32
"""Of one credential, values that were replaced and are still removed from answers. None of them is
dropped before its time: with so many the source is asked only when the value in use has ended, and
then when there is room again.
"""
_LOGIN_SECONDS = 43_200.0
"""The longest that a role may be assumed for: of a login its own end decides."""
_PATIENCE_SECONDS = 1.0
"""How long a request waits for a source when there is a value to go on with. A source that failed
the last time is not waited for then."""

Record = Callable[..., None]
"""`record("credential.resolved", name=…)`, never with a value."""


class Asks(Protocol):
    """What the keeper's link does."""

    async def ask(self, name: str, *, doubted: bool = False) -> Given:
        """See `KeeperLink.ask`."""


def now() -> float:
    """Seconds, those of a host that slept among them: leases end while it sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(slots=True)
class _Kept:
    """One credential. older: replaced, and still to be redacted, with the time of its end. doubted:
    an upstream refused the value, and its source has not been asked since; doubts: how often in a
    row; refused: when the last time.
    """

    scheme: str
    make: Callable[[Given], Secret]
    ages: Ages
    doubting: Doubting
    secret: Secret | None = None
    version: str = ""
    life: Lifetime = NEVER
    since: float = 0.0
    failures: int = 0
    not_before: float = 0.0
    failed: UnavailableError | None = None
    flight: asyncio.Task[None] | None = None
    doubted: bool = False
    doubts: int = 0
    refused: float = 0.0
    older: list[tuple[float, Secret]] = field(default_factory=list)


class Resolving:
    """All credentials whose values the settings place outside.

    Attributes:
        generation: changes whenever the set of values that redaction looks for does; `changed`
            is called then, so that nobody keeps what was made of the values before.
    """

    def __init__(
        self,
        keeper: Asks,
        credentials: Mapping[str, CredentialSettings],
        ages: Ages,
        record: Record,
        clock: Callable[[], float] = now,
        changed: Callable[[], None] = lambda: None,
        logins: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """`logins`: names of what the keeper logs in for, and what kind each is. What such a login
        gave lasts as long as it says: a role is not assumed every minute.
        """
        self._keeper, self._record, self._clock = keeper, record, clock
        self._heard = changed
        seldom = Doubting(_DOUBT_SECONDS, _DOUBT_SECONDS * 2, ages.most)
        self._kept = {
            name: _Kept(one.reference.scheme, partial(_secret, one), ages, seldom)
            for name, one in credentials.items()
        }
        whole = Ages(most=max(ages.most, _LOGIN_SECONDS), stale=ages.stale)
        seldom = Doubting(_DOUBT_SECONDS, _LOGIN_DOUBT_SECONDS, _LOGIN_DOUBT_MOST)
        self._kept |= {name: _Kept(kind, _login, whole, seldom) for name, kind in logins.items()}
        self.generation = 0

    def __repr__(self) -> str:
        """Names only."""
        return f"Resolving({sorted(self._kept)})"

    def names(self) -> frozenset[str]:
        """Which credentials these are."""
        return frozenset(self._kept)

    async def get(self, name: str) -> Secret:
        """The value to use now. Raises CredentialError."""
        kept, at = self._kept[name], self._clock()
        if kept.secret is not None and at < kept.life.fresh:
            if at >= kept.life.ahead and self._may_ask(kept, at):
                self._fly(name, kept)
            return kept.secret
        if kept.flight is not None or self._may_ask(kept, at):
            flight = self._fly(name, kept)
            usable = kept.secret is not None and at < kept.life.end
            if not (usable and kept.failures):
                # whoever hangs up leaves the question to the others
                await asyncio.wait([flight], timeout=_PATIENCE_SECONDS if usable else None)
        if kept.secret is not None and self._clock() < kept.life.end:
            return kept.secret
        self._forget(kept)
        code = kept.failed.code if kept.failed is not None else "secret-unreachable"
        if code == "secret-unreachable":
            raise CredentialError("credential-unavailable", 503)
        raise CredentialError(code.replace("secret-", "credential-"))

    def doubt(self, name: str) -> None:
        """An upstream answered 401 to it: its source is asked, once however many were refused, and
        whoever comes next waits for that.
        """
        kept, at = self._kept.get(name), self._clock()
        if kept is None or kept.secret is None:
            return
        # by the time alone: a good answer in between is what a hostile upstream would give, too
        kept.doubts = 0 if at - kept.refused >= kept.doubting.most else kept.doubts
        kept.refused = at
        if kept.doubted or kept.flight is not None:
            return
        if at - kept.since < kept.doubting.wait(kept.doubts):
            return
        kept.doubted, kept.doubts = True, kept.doubts + 1
        kept.life = replace(kept.life, fresh=min(kept.life.fresh, at))
        if self._may_ask(kept, at):
            self._fly(name, kept)

    def held(self, names: Iterable[str]) -> list[Secret]:
        """What redaction looks for, of the named ones: values in use and those just replaced."""
        found = []
        for name in names:
            kept = self._kept.get(name)
            if kept is not None:
                found += [secret for _, secret in kept.older]
                found += [kept.secret] if kept.secret is not None else []
        return found

    def close(self) -> None:
        """Overwrite everything."""
        for kept in self._kept.values():
            if kept.flight is not None:
                kept.flight.cancel()
            for _, secret in kept.older:
                secret.wipe()
            if kept.secret is not None:
                kept.secret.wipe()
            kept.older, kept.secret = [], None
        self._changed()

    @staticmethod
    def _may_ask(kept: _Kept, at: float) -> bool:
        return at >= kept.not_before and len(kept.older) < _OLDER

    def _fly(self, name: str, kept: _Kept) -> asyncio.Task[None]:
        if kept.flight is None:
            kept.flight = asyncio.get_running_loop().create_task(self._ask(name, kept))
        return kept.flight

    async def _ask(self, name: str, kept: _Kept) -> None:
        asked, scheme = self._clock(), kept.scheme
        doubted, kept.doubted = kept.doubted, False
        try:
            given = await self._keeper.ask(name, doubted=doubted)
            secret = kept.make(given)
        except UnavailableError as error:
            kept.failures += 1
            kept.failed, kept.not_before = error, self._clock() + pause(kept.failures)
            if error.code == "secret-unreachable":
                kept.doubted = doubted
            else:
                self._forget(kept)
            self._record("credential.unresolved", name=name, scheme=scheme, reason=error.code)
        else:
            rotated = self._take(kept, secret, given, asked)
            self._record(
                "credential.resolved",
                name=name,
                scheme=scheme,
                version=given.version,
                lease_seconds=given.lease_seconds,
                rotated=rotated,
            )
        finally:
            kept.flight = None

    def _take(self, kept: _Kept, secret: Secret, given: Given, asked: float) -> bool:
        """Whether it replaced another."""
        before = kept.secret
        rotated = before is not None and not before.same(secret)
        if rotated and before is not None:
            self._age(kept, before)
        elif before is not None:
            before.wipe()
        kept.secret, kept.version, kept.since = secret, given.version, self._clock()
        kept.life = lifetime(asked, given.lease_seconds, kept.ages)
        kept.failures, kept.failed, kept.not_before = 0, None, 0.0
        if rotated or before is None:
            self._changed()
        return rotated

    def _changed(self) -> None:
        self.generation += 1
        self._heard()

    def _age(self, kept: _Kept, secret: Secret) -> None:
        kept.older.append((self._clock() + REDACT_SECONDS, secret))
        asyncio.get_running_loop().call_later(REDACT_SECONDS, self._outlive, kept)

    def _outlive(self, kept: _Kept) -> None:
        over = [secret for end, secret in kept.older if end <= self._clock() + 1.0]
        kept.older = [one for one in kept.older if one[1] not in over]
        for secret in over:
            secret.wipe()
        self._changed()

    def _forget(self, kept: _Kept) -> None:
        """It goes nowhere any more; answers that are on their way may still repeat it."""
        if kept.secret is not None:
            self._age(kept, kept.secret)
            kept.secret = None
            self._changed()


def _login(given: Given) -> Secret:
    """What a login gave goes to its provider's host alone: nothing else asks for it."""
    try:
        secret = LoginSecret(given.value)
        secret.fields()
    except ValueError:
        raise UnavailableError("secret-unfit", "the login gave no object of values") from None
    return secret


def _secret(settings: CredentialSettings, given: Given) -> Secret:
    bounds = Bounds(paths=settings.paths, header=settings.header, query=settings.query)
    try:
        return Secret(given.value, settings.hosts, sealed_hosts=given.hosts, bounds=bounds)
    except ValueError:
        raise UnavailableError("secret-unfit", "no header may carry it") from None
