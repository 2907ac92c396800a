"""Two policies → what becomes possible and what no longer is. PURE."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ringfence.policy.compile import compile_policy, failover_of, isolation_of, role_of
from ringfence.policy.document import PolicyDocument
from ringfence.policy.rights import (
    Right,
    covers,
    denials,
    limits,
    named_hosts,
    printable,
    rights,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class LimitChange:
    """One number that changed; None is unbounded."""

    key: str
    before: float | None
    after: float | None

    @property
    def wider(self) -> bool:
        """Whether the second policy permits more."""
        if self.before is None or self.after is None:
            return self.after is None
        return self.after > self.before


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """What the second policy permits beside the first.

    Attributes:
        gained: rights of the second that nothing in the first covers. lost: the other way.
        no_longer_denied, newly_denied: lines of deny, blocked and hidden.
        limits: numbers that changed.
        changed: lines that changed and neither widen nor narrow, such as `model.fallback`.
    """

    gained: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    no_longer_denied: tuple[str, ...] = ()
    newly_denied: tuple[str, ...] = ()
    limits: tuple[LimitChange, ...] = ()
    changed: tuple[str, ...] = ()

    @property
    def widens(self) -> bool:
        """Whether anything becomes possible that was not."""
        return bool(
            self.gained or self.no_longer_denied or any(change.wider for change in self.limits)
        )

    @property
    def empty(self) -> bool:
        """Whether the two permit the same."""
        denied = self.no_longer_denied or self.newly_denied
        return not (self.gained or self.lost or denied or self.limits or self.changed)

    def to_json(self) -> dict[str, object]:
        """Shape of `ringfence policy diff --json`."""
        return {
            "widens": self.widens,
            "gained": list(self.gained),
            "lost": list(self.lost),
            "no_longer_denied": list(self.no_longer_denied),
            "newly_denied": list(self.newly_denied),
            "limits": [
                {"key": c.key, "before": c.before, "after": c.after, "wider": c.wider}
                for c in self.limits
            ],
            "changed": list(self.changed),
        }

    def render(self) -> str:
        """Lines for people: `+` becomes possible, `-` no longer is, `~` is neither."""
        if self.empty:
            return "The two policies permit the same.\n"
        lines = [f"+ {text}" for text in self.gained]
        lines += [f"+ no longer: {text}" for text in self.no_longer_denied]
        lines += [f"- {text}" for text in self.lost]
        lines += [f"- now: {text}" for text in self.newly_denied]
        lines += [
            f"{'+' if c.wider else '-'} {c.key}: {_number(c.before)} -> {_number(c.after)}"
            for c in self.limits
        ]
        lines += [f"~ {text}" for text in self.changed]
        return "\n".join(lines) + "\n"


def diff(before: PolicyDocument, after: PolicyDocument) -> Difference:
    """What `after` permits that `before` does not, and the other way."""
    first, second = compile_policy(before), compile_policy(after)
    named = named_hosts(first) | named_hosts(second)
    had, has = rights(first, named), rights(second, named)
    denied, denies = denials(first), denials(second)
    bounds, bounds_ = limits(first), limits(second)
    facts, facts_ = _facts(before), _facts(after)
    return Difference(
        gained=_texts(right.area + ": " + right.text for right in _beyond(has, had)),
        lost=_texts(right.area + ": " + right.text for right in _beyond(had, has)),
        no_longer_denied=_texts(right.text for right in _beyond(denied, denies)),
        newly_denied=_texts(right.text for right in _beyond(denies, denied)),
        limits=tuple(
            LimitChange(key=key, before=bounds[key], after=bounds_[key])
            for key in bounds
            if bounds[key] != bounds_[key]
        ),
        changed=_texts(
            f"{key}: {facts[key]} -> {facts_[key]}" for key in facts if facts[key] != facts_[key]
        ),
    )


def _facts(document: PolicyDocument) -> dict[str, str]:
    """What matters to a reader and permits nothing by itself."""
    return {
        "tools.role": role_of(document)[0],
        "model.fallback": document.model.fallback or "none",
        "model.failover": failover_words(document),
        "hosting.pattern": document.hosting.pattern,
        "isolation.backend": isolation_of(document),
        "isolation.threat_model": document.isolation.threat_model or "none",
    }


def failover_words(document: PolicyDocument) -> str:
    """Where requests go that are not answered, in order, and what is done at the end."""
    legs = [
        f"{leg.model or 'the same model'} at {leg.provider or document.model.provider}"
        for leg in failover_of(document)
    ]
    return ", ".join([*legs, document.model.exhausted])


def _beyond(these: Iterable[Right], others: tuple[Right, ...]) -> Iterator[Right]:
    """Those of `these` that nothing of `others` covers."""
    return (right for right in these if not any(covers(other, right) for other in others))


def _texts(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(printable(text) for text in texts))


def _number(value: float | None) -> str:
    return "unlimited" if value is None else f"{value:g}"
