"""Host names of a policy: one spelling each, and nothing that could be read in two ways. PURE.

A name is exact ASCII letters, digits and hyphens (RFC 1123 §2.1), lower case, without a trailing
dot; or `*.` and such a name at or below a registrable domain (the public suffix list, its private
part included, so that `*.github.io` is as vague as `*.com`). The wildcard stands for exactly one
label, as in a certificate (RFC 9525 §6.3). Everything else is refused and the normal form named:
two of the known bypasses of such lists are a NUL in the name (sandbox-runtime before 0.0.43) and
an address that only some readers take for one (`127.1`, `0x7f.1`; WHATWG URL §3.5).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from functools import cache, lru_cache

from publicsuffixlist import PublicSuffixList

MODEL_HOST = "api.anthropic.com"
"""In a policy this name stands for the model route, wherever the operator's settings lead it."""

_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_LOCAL = frozenset({"localhost", "local", "localdomain", "onion", "invalid"})


def host_problem(text: str, *, wildcards: bool = True) -> str | None:
    """Why `text` is not a host of a policy, and what to write instead; None when it is one."""
    if text.startswith("*.") and not wildcards:
        return "a wildcard is not allowed here; name each host"
    problem = _problem(text)
    form = normal_form(text) if problem else None
    return f"{problem}: {form}" if form else problem


def _problem(text: str) -> str | None:
    if not text.startswith("*."):
        return _exact_problem(text)
    if re.fullmatch(r"[a-z0-9-]+(?:\.[a-z0-9-]+)*", text[2:]) and registrable(text[2:]) is None:
        return f"{text} would match domains of anybody; name a host below a domain you mean"
    return _exact_problem(text[2:]) or _provider_problem(text)


@lru_cache(maxsize=256)
def is_host(text: str) -> bool:
    """Whether `text` is an exact host name in normal form."""
    return _exact_problem(text) is None


def normal_form(text: str) -> str | None:
    """The host that was probably meant, in normal form; None when there is none.

    Idempotent: the normal form of a normal form is itself.
    """
    star = "*." if text.startswith("*.") else ""
    name = text[len(star) :].strip().rstrip(".").lower()
    if "://" in name:
        name = re.split(r"[/?#]", name.split("://", 1)[1])[0].rsplit("@", 1)[-1]
        name = re.sub(r":[0-9]*\Z", "", name).rstrip(".")
    if not name.isascii():
        try:
            name = name.encode("idna").decode("ascii").lower().rstrip(".")
        except UnicodeError:
            return None
    whole = star + name
    return whole if _problem(whole) is None else None


def spelled(host: str) -> str:
    """A host as people read it beside its normal form; the form alone when they are the same."""
    labels = [
        label[4:].encode("ascii").decode("punycode") if label.startswith("xn--") else label
        for label in host.split(".")
    ]
    written = ".".join(labels)
    return host if written == host else f"{host} ({written})"


def matches(pattern: str, host: str) -> bool:
    """Whether a policy's `pattern` covers `host`. Total; a host that is not normal never matches.

    Both sides are compared byte for byte: normalising is the caller's, and refusing is safer.
    """
    # the shape first: most of a policy's hosts differ, and a name is read only when one fits
    if pattern.startswith("*."):
        return host.partition(".")[2] == pattern[2:] and is_host(host)
    return pattern == host and is_host(host)


def registrable(host: str) -> str | None:
    """The registrable domain at or above `host`; None for a public suffix or a bare name."""
    domain = _suffixes().privatesuffix(host)
    return str(domain) if domain else None


@cache
def _suffixes() -> PublicSuffixList:
    # an unknown top level is its own suffix, so `*.internal` stays vague too
    return PublicSuffixList(accept_unknown=True)


def _provider_problem(pattern: str) -> str | None:
    if matches(pattern, MODEL_HOST):
        return f"{pattern} covers the model provider's own hosts; name {MODEL_HOST} or another host"
    return None


def _exact_problem(text: str) -> str | None:
    problem = _character_problem(text) or _address_problem(text)
    if problem:
        return problem
    labels = text.split(".")
    if len(text) > 253 or any(not _LABEL.fullmatch(label) for label in labels):
        return "not a host name: labels of letters, digits and inner hyphens, 63 at most each"
    if len(labels) < 2:
        return "a name without a dot means another host on each network; write the full name"
    if labels[-1] in _LOCAL:
        return f"names below {labels[-1]} stay on the host that asks; they are never reached"
    for label in labels:
        if label.startswith("xn--") and not _punycode(label):
            return f"{label} is not valid punycode"
    return None


def _character_problem(text: str) -> str | None:
    if not text:
        return "empty; write a host name"
    for fault, message in _FAULTS:
        if fault(text):
            return message
    return None


_FAULTS: tuple[tuple[Callable[[str], object], str], ...] = (
    (lambda text: not text.strip(".*"), "match-all; name each host"),
    (lambda text: "*" in text, "a wildcard may only be the whole first label, as *.example.com"),
    (lambda text: not text.isascii(), "write the ASCII form (punycode)"),
    (lambda text: "%" in text, "holds a percent sign, which no host name has"),
    (lambda text: "_" in text, "holds an underscore, which no host name has"),
    (lambda text: re.search(r"[\x00-\x20\x7f]", text), "holds a blank or a control character"),
    (lambda text: "/" in text or "@" in text, "write the host alone, without scheme, user or path"),
    (lambda text: text != text.lower(), "write it in lower case"),
    (lambda text: text.endswith("."), "write it without the trailing dot"),
)


def _address_problem(text: str) -> str | None:
    if ":" in text or "[" in text or "]" in text:
        return "an address or a second port; write a host name, or host:port"
    if _NUMBER.fullmatch(text.rpartition(".")[2]):
        return "an IP address in one of its spellings; write the host's name"
    return None


def _punycode(label: str) -> bool:
    try:
        decoded = label[4:].encode("ascii").decode("punycode")
        if decoded.isascii() or decoded.encode("punycode").decode() != label[4:]:
            return False
        # one spelling each (RFC 5891, 5.4): what a resolver would fold is another name
        return unicodedata.normalize("NFKC", decoded).lower() == decoded and all(
            unicodedata.category(character)[0] in "LMN" or character == "-" for character in decoded
        )
    except (UnicodeError, ValueError, OverflowError):
        return False
