"""The port of secret sources: what each gives and how it says no.

Sources run in the keeper, a process of egress (`ringfence.vault.keeper`), and nowhere else. They
block: each call has a time limit of its own and is made from one of several threads.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Protocol

from ringfence.config.reference import Reference
from ringfence.errors import UnavailableError

MAX_BYTES = 64 << 10
"""Of what a source answers with: a value is 8 KiB at most, and may be one field of several."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Resolved:
    """A value as a source gave it.

    Attributes:
        value: printable ASCII without spaces, 8 to 8192 bytes.
        version: the source's own name for this value; says nothing about it. Another value has
            another version.
        lease_seconds: how long it is good for from now on; None where the source sets no end.
        hosts: where alone it may be sent, by whoever sealed it; empty leaves it to the settings.
    """

    value: bytes = field(repr=False)
    version: str
    lease_seconds: float | None = None
    hosts: tuple[str, ...] = ()


class SecretSource(Protocol):
    """One source; its references are of one scheme or two."""

    def resolve(self, reference: Reference, *, doubted: bool = False) -> Resolved:
        """The value now; nothing is kept that the source itself did not hand out for a time. What
        was kept is looked at when it is `doubted`: an upstream refused it. Anybody can have that
        said.

        Raises:
            UnavailableError: `secret-unreachable` when the source does not answer: the value that
                was had before may still be good. `secret-denied`, `secret-absent`,
                `secret-expired`, `secret-unfit`: it is not to be used any more.
        """

    def close(self) -> None:
        """Give back what the source handed out for as long as it is needed. Raises nothing."""


def unreachable(source: str, why: str, hint: str = "") -> UnavailableError:
    """The source does not answer, or not as one: time may mend it."""
    hint = hint or f"see that {source} can be reached from this host"
    return UnavailableError("secret-unreachable", f"{source}: {why}", hint=hint)


def denied(source: str, why: str, hint: str = "") -> UnavailableError:
    """The source knows us and says no, or does not know us."""
    return UnavailableError(
        "secret-denied", f"{source}: {why}", hint=hint or "see what this host may read there"
    )


def absent(reference: Reference, why: str = "there is no such secret") -> UnavailableError:
    """Nothing lies there."""
    return UnavailableError(
        "secret-absent",
        f"{reference}: {why}",
        hint="put it there, or name where it is: secrets.credentials.NAME.source",
    )


def expired(source: str, why: str) -> UnavailableError:
    """What we came with, or what we came for, is over."""
    return UnavailableError("secret-expired", f"{source}: {why}", hint="give it a new one")


def unfit(reference: Reference, why: str) -> UnavailableError:
    """What lies there is no value; it is not repeated."""
    return UnavailableError(
        "secret-unfit",
        f"{reference}: {why}",
        hint="keep the value alone there: 8 to 8192 printable ASCII characters without spaces",
    )


def value_of(reference: Reference, raw: object) -> bytes:
    """A value as a header can carry it; one line end behind it is the editor's, and no part of it.

    Raises:
        UnavailableError: `secret-unfit`.
    """
    if isinstance(raw, str):
        raw = raw.encode("utf-8", "surrogatepass")
    if not isinstance(raw, bytes):
        raise unfit(reference, "it is no text")
    value = raw.removesuffix(b"\n").removesuffix(b"\r")
    if not 8 <= len(value) <= 8192 or any(not 0x21 <= byte <= 0x7E for byte in value):
        raise unfit(reference, "it is not 8 to 8192 printable ASCII characters without spaces")
    return value


def field_of(reference: Reference, fields: dict[str, Any]) -> bytes:
    """One field of an object. Raises UnavailableError `secret-absent`, `secret-unfit`."""
    if reference.field not in fields:
        raise absent(reference, "it has no such field")
    return value_of(reference, fields[reference.field])


def text_or_field(reference: Reference, raw: bytes) -> bytes:
    """A value that is text, or the JSON object that holds the field. Raises as `field_of`."""
    if not reference.field:
        return value_of(reference, raw)
    try:
        fields = json.loads(raw)
    except (ValueError, RecursionError):
        raise unfit(reference, "it is no JSON, and a field of it is asked for") from None
    if not isinstance(fields, dict):
        raise unfit(reference, "it is no JSON object, and a field of it is asked for")
    return field_of(reference, fields)
