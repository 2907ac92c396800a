"""Values of labels: few, whatever anybody calls a tool or a model. PURE; keeps what it saw.

Each value is kept for as long as the process lives, in it and in whoever scrapes it. So a name
from a table passes, a name that somebody else vouches for takes one of a number of places, and
all others are `other`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from ringfence.errors import CODES
from ringfence.policy.isolation import BOUNDARIES
from ringfence.policy.tools import KNOWN, canonical_tool

OTHER, NONE = "other", "none"
_MODELS, _RULES = 50, 64
_CALLERS = "mcp__caller__"
"""Custom tools, as `claude` calls them (`ringfence.agent.pending`, held by a test)."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@/-]{0,127}", re.ASCII)
_RULE = re.compile(r"[a-z][a-z0-9_. -]{0,63}", re.ASCII)
_INDEX = re.compile(r"\[[^\]]*\]")
_METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})
_OUTCOMES = frozenset({"deny", "defer", "success", "failure", "timeout", "interrupted", "unknown"})


class Places:
    """Names as they come, so many of them."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._names: set[str] = set()

    def of(self, name: str, *, new: bool = True) -> str:
        """The name, or `other`; without `new` only when it has a place."""
        if name in self._names:
            return name
        if not new or len(self._names) >= self._most:
            return OTHER
        self._names.add(name)
        return name


class Labels:
    """Of one process. `providers` are those of the settings."""

    def __init__(self, *, tenants: int, providers: Iterable[str] = ()) -> None:
        self._tenants = Places(tenants)
        self._environments = Places(tenants)
        self._models = Places(_MODELS)
        self._rules = Places(_RULES)
        self.providers = frozenset(providers)

    def tenant(self, name: str) -> str:
        """Tenants are the platform's; `none` for a run without one."""
        if not name:
            return NONE
        return self._tenants.of(name) if _NAME.fullmatch(name) else OTHER

    def environment(self, name: str) -> str:
        """An id of the platform; as many as tenants."""
        return self._environments.of(name) if _NAME.fullmatch(name) else OTHER

    def model(self, name: str, *, answered: bool) -> str:
        """A policy may allow any name, and an agent then invents some: one that a provider has
        answered for is a model's.
        """
        return self._models.of(name, new=answered) if _NAME.fullmatch(name) else OTHER

    def provider(self, name: str) -> str:
        """One of the settings."""
        return name if name in self.providers else OTHER

    def rule(self, name: str) -> str:
        """Of the policy, without its place in a list: a tenant writes long lists as it likes."""
        plain = _INDEX.sub("", name)
        return self._rules.of(plain) if _RULE.fullmatch(plain) else OTHER

    @staticmethod
    def tool(name: str) -> str:
        """A tool of the CLI; all others by who brings them."""
        if name.startswith(_CALLERS):
            return "custom"
        if name.startswith("mcp__"):
            return "mcp"
        canonical = canonical_tool(name)
        return canonical if canonical in KNOWN else OTHER

    @staticmethod
    def reason(code: str) -> str:
        """An error's code."""
        return (code if code in CODES else OTHER) if code else NONE

    @staticmethod
    def isolation(name: str) -> str:
        """A technology."""
        return name if name in BOUNDARIES else OTHER

    @staticmethod
    def outcome(word: str) -> str:
        """Of a tool call."""
        return word if word in _OUTCOMES else OTHER

    @staticmethod
    def method(name: str) -> str:
        """Of HTTP."""
        return name if name in _METHODS else OTHER

    @staticmethod
    def status(code: int) -> str:
        """Of HTTP; 0 without an answer."""
        return str(code) if code == 0 or 100 <= code <= 599 else OTHER
