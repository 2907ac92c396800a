"""Telling an operator's server what happened: signed, retried, and to no address inside.

Signing is that of standard-webhooks (version 1), which the official client's `webhooks.unwrap`
verifies. Targets are the operator's own settings, never a tenant's word; still their names are
resolved here, each time, and an address that is not public is refused unless the operator says
that the server stands within. Redirects are not followed: they would choose another target.

The event tells that a session waits, and nothing of what it waits for: whoever is told fetches it
with a key of their own.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import ipaddress
import json
import ssl
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal
from urllib.parse import SplitResult, urlsplit

from ringfence.egress.address import AddressError, Resolver, near, own_addresses, vet
from ringfence.errors import CallerError

DELAYS = (5.0, 30.0, 300.0, 1800.0, 7200.0, 18000.0)
"""Seconds between tries; after the last of them an event is given up."""
_SECONDS = 15.0
_SECRET = "whsec_"  # noqa: S105  the prefix of one
_MIN_SECRET, _MAX_SECRET = 24, 64
"""Bytes of a key (standard-webhooks, Signature scheme)."""

Kind = Literal["session.requires_action", "session.status_idled", "session.status_terminated"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """Where events go.

    Attributes:
        url: https, or http where `within`; no user, no fragment.
        key: of the signature, as bytes; see `signing_key`.
        within: whether the server may have a private or a loopback address.
    """

    url: str
    key: bytes
    within: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One event as it is sent. `identity` stays the same over all tries, so that whoever gets it
    twice can tell.
    """

    identity: str
    payload: str


def signing_key(secret: str) -> bytes:
    """The key of a `whsec_…` secret.

    Raises:
        CallerError: `settings-invalid`; the secret itself is not in the message.
    """
    try:
        key = base64.b64decode(secret.removeprefix(_SECRET), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if not secret.startswith(_SECRET) or not _MIN_SECRET <= len(key) <= _MAX_SECRET:
        raise CallerError(
            "settings-invalid",
            "a webhook's secret is `whsec_` and 24 to 64 bytes in base64",
            hint="whsec_$(head -c 32 /dev/urandom | base64)",
        )
    return key


def message(*, identity: str, kind: Kind, session_id: str, tenant: str, created: str) -> Message:
    """The event in its public shape. `created` is RFC 3339; a tenant is its own organization."""
    data = {"id": session_id, "type": kind, "organization_id": tenant, "workspace_id": tenant}
    event = {"id": identity, "type": "event", "created_at": created, "data": data}
    return Message(identity=identity, payload=json.dumps(event, separators=(",", ":")))


def signed(key: bytes, sent: Message, timestamp: int) -> dict[str, str]:
    """Headers of one try; `timestamp` is seconds since the epoch, when it is made."""
    text = f"{sent.identity}.{timestamp}.{sent.payload}".encode()
    signature = base64.b64encode(hmac.digest(key, text, hashlib.sha256)).decode()
    return {
        "webhook-id": sent.identity,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": f"v1,{signature}",
    }


def next_try(status: int | None, tries: int) -> float | None:
    """Seconds until the next try; None when there is none: it has arrived, or is given up.

    Args:
        status: what the server answered; None when it did not.
        tries: how many there were.
    """
    if status is not None and (200 <= status < 300 or status == 410):
        return None  # 410: the server wants no more of them (standard-webhooks)
    return DELAYS[tries - 1] if tries <= len(DELAYS) else None


async def deliver(
    target: Target,
    sent: Message,
    *,
    sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
) -> bool:
    """Send until it has arrived; False when it was given up.

    Raises:
        CallerError: `settings-invalid` for a target that nothing may be sent to.
    """
    place = _place(target)
    for tries in range(1, len(DELAYS) + 2):
        status = await _try(target, place, sent)
        delay = next_try(status, tries)
        if delay is None:
            return status is not None and 200 <= status < 300
        await sleep(delay)
    return False


def _place(target: Target) -> SplitResult:
    place = urlsplit(target.url)
    plain = place.scheme == "http" and target.within
    if not place.hostname or not (place.scheme == "https" or plain):
        raise CallerError("settings-invalid", "a webhook's target is an https URL")
    if place.username is not None or place.fragment or not target.url.isprintable():
        raise CallerError("settings-invalid", "a webhook's target has no user and no fragment")
    if " " in target.url or not target.url.isascii():
        raise CallerError("settings-invalid", "a webhook's target is a URL in normal form")
    return place


async def _try(target: Target, place: SplitResult, sent: Message) -> int | None:
    """One try: the status, or None when no answer came."""
    with suppress(OSError, TimeoutError, ssl.SSLError, AddressError, ValueError):
        async with asyncio.timeout(_SECONDS):
            return await _post(target, place, sent)
    return None


async def _post(target: Target, place: SplitResult, sent: Message) -> int:
    secure = place.scheme == "https"
    host = place.hostname or ""
    port = place.port or (443 if secure else 80)
    # the address that was looked at is the one that is dialled; the certificate is the name's
    address = await _address(host, port, within=target.within)
    reader, writer = await asyncio.open_connection(
        address,
        port,
        ssl=ssl.create_default_context() if secure else None,
        server_hostname=host if secure else None,
        limit=1 << 16,
    )
    try:
        writer.write(_request(target, place, sent))
        await writer.drain()
        line = await reader.readline()
        version, status, *_ = line.split(None, 2)
        if not version.startswith(b"HTTP/1."):
            raise ValueError("no HTTP")
        return int(status)
    finally:
        writer.close()
        with suppress(OSError, ssl.SSLError):
            await writer.wait_closed()


async def _address(host: str, port: int, *, within: bool) -> str:
    """The one address of a name, or of an address that was written as such. Raises AddressError."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return (await Resolver({}, {}).resolve(host, port, ours=within))[0]
    if not vet(host, own_addresses()) and not (within and near(host)):
        raise AddressError("address-not-public")
    return host


def _request(target: Target, place: SplitResult, sent: Message) -> bytes:
    body = sent.payload.encode()
    path = (place.path or "/") + (f"?{place.query}" if place.query else "")
    headers = {
        "host": place.netloc,
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
        "user-agent": "ringfence-webhooks",
        **signed(target.key, sent, int(time.time())),
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + body
