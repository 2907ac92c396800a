"""Two policies → what becomes possible and what no longer is. PURE."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ringfence.policy.compile import compile_policy
from ringfence.policy.document import PolicyDocument
from ringfence.policy.rights import Right, covers, denials, limits, printable, rights


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
    """

    gained: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    no_longer_denied: tuple[str, ...] = ()
    newly_denied: tuple[str, ...] = ()
    limits: tuple[LimitChange, ...] = ()

    @property
    def widens(self) -> bool:
        """Whether anything becomes possible that was not."""
        return bool(
            self.gained or self.no_longer_denied or any(change.wider for change in self.limits)
        )

    @property
    def empty(self) -> bool:
        """Whether the two permit the same."""
        return not (
            self.gained or self.lost or self.no_longer_denied or self.newly_denied or self.limits
        )

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
        }

    def render(self) -> str:
        """Lines for people: `+` becomes possible, `-` no longer is."""
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
        return "\n".join(lines) + "\n"


def diff(before: PolicyDocument, after: PolicyDocument) -> Difference:
    """What `after` permits that `before` does not, and the other way."""
    first, second = compile_policy(before), compile_policy(after)
    had, has = rights(first), rights(second)
    denied, denies = denials(first), denials(second)
    bounds, bounds_ = limits(first), limits(second)
    return Difference(
        gained=_texts(right.area + ": " + right.text for right in has if not _in(right, had)),
        lost=_texts(right.area + ": " + right.text for right in had if not _in(right, has)),
        no_longer_denied=_texts(text for text in denied if text not in denies),
        newly_denied=_texts(text for text in denies if text not in denied),
        limits=tuple(
            LimitChange(key=key, before=bounds[key], after=bounds_[key])
            for key in bounds
            if bounds[key] != bounds_[key]
        ),
    )


def _in(right: Right, others: tuple[Right, ...]) -> bool:
    return any(covers(other, right) for other in others)


def _texts(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(printable(text) for text in texts))


def _number(value: float | None) -> str:
    return "unlimited" if value is None else f"{value:g}"
