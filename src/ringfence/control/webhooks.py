"""Telling an operator's server what happened: signed, and to no address inside.

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
import os
import ssl
import stat
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

from ringfence.config import WebhookKind, WebhookSettings
from ringfence.egress.address import AddressError, Resolver, near, own_addresses, vet
from ringfence.errors import CallerError, words

DELAYS = (5.0, 30.0, 300.0, 1800.0, 7200.0, 18000.0)
"""Seconds between tries; after the last of them an event is given up."""
SECONDS = 15.0
"""That a try may take."""
_SWITCHED = 101
_SECRET = "whsec_"  # noqa: S105  the prefix of one
_MAX_KEYS = 4
_MIN_SECRET, _MAX_SECRET = 24, 64
"""Bytes of a key (standard-webhooks, Signature scheme)."""


class UntoldError(Exception):
    """No answer came; the message is the reason, for the operator's log."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """Where events go.

    Attributes:
        name: the operator's, of the settings.
        url: https, or http where `within`; no user, no fragment.
        keys: that sign, as bytes; see `signing_key`. More than one while they change.
        tenant: name of the only one that it is about; '' is all.
        within: whether the server may have a private or a loopback address.
    """

    name: str
    url: str
    keys: tuple[bytes, ...] = field(repr=False)
    tenant: str = ""
    kinds: tuple[WebhookKind, ...] = ()
    within: bool = False
    ca_file: Path | None = None


def target_of(name: str, settings: WebhookSettings) -> Target:
    """The target of an operator's setting, with its secret read.

    Raises:
        CallerError: `settings-invalid`; the secret itself is not in the message.
    """
    texts = [settings.secret.get_secret_value()] if settings.secret is not None else []
    if settings.secret_file is not None:
        texts = _lines(name, settings.secret_file)
    target = Target(
        name=name,
        url=settings.url,
        keys=tuple(signing_key(text) for text in texts),
        tenant=settings.tenant,
        kinds=tuple(dict.fromkeys(settings.kinds)),
        within=settings.within,
        ca_file=settings.ca_file,
    )
    _place(target)
    return target


def _lines(name: str, path: Path) -> list[str]:
    try:
        with path.open() as file:
            if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o027:
                raise CallerError(
                    "settings-invalid",
                    f"webhooks.{name}.secret_file: others can read or change {path}",
                    hint=f"chmod 0600 {path}",
                )
            found = file.read(65_536).split()
    except (OSError, UnicodeDecodeError) as error:
        raise CallerError(
            "settings-invalid", f"webhooks.{name}.secret_file: {words(error)}"
        ) from None
    if not 1 <= len(found) <= _MAX_KEYS:
        raise CallerError(
            "settings-invalid",
            f"webhooks.{name}.secret_file: one to {_MAX_KEYS} secrets, a line each",
        )
    return found


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


def message(
    *,
    identity: str,
    kind: str,
    session_id: str,
    tenant: str,
    created: str,
    body: Mapping[str, Any] | None = None,
) -> Message:
    """The event in its public shape. `created` is RFC 3339; a tenant is its own organization.
    `body`: what it is about where that is no session; its own fields, and the `id` of it.
    """
    owner = {"type": kind, "organization_id": tenant, "workspace_id": tenant}
    data = {"id": session_id, **(body or {}), **owner}
    event = {"id": identity, "type": "event", "created_at": created, "data": data}
    return Message(identity=identity, payload=json.dumps(event, separators=(",", ":")))


def signed(keys: Sequence[bytes], sent: Message, timestamp: int) -> dict[str, str]:
    """Headers of one try; `timestamp` is seconds since the epoch, when it is made."""
    text = f"{sent.identity}.{timestamp}.{sent.payload}".encode()
    made = [base64.b64encode(hmac.digest(key, text, hashlib.sha256)).decode() for key in keys]
    return {
        "webhook-id": sent.identity,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join(f"v1,{one}" for one in made),
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


async def tried(target: Target, sent: Message) -> int:
    """One try: the status.

    Raises:
        UntoldError: no answer came.
        CallerError: `settings-invalid` for a target that nothing may be sent to.
    """
    headers = {
        "user-agent": "ringfence-webhooks",
        **signed(target.keys, sent, int(time.time())),
    }
    return await posted(target, sent.payload, headers)


async def posted(target: Target, payload: str, headers: Mapping[str, str]) -> int:
    """Send a JSON text to a target's URL, once: the status. Raises as `tried` does."""
    place = _place(target)
    try:
        async with asyncio.timeout(SECONDS):
            return await _post(target, place, _request(place, payload, headers))
    except AddressError as error:
        raise UntoldError(str(error)) from None
    except TimeoutError:
        raise UntoldError("no answer in time") from None
    except ssl.SSLCertVerificationError as error:
        raise UntoldError(f"certificate: {error.verify_message}") from None
    except OSError as error:
        raise UntoldError(words(error)) from None
    except ValueError:
        raise UntoldError("no HTTP") from None


def check_target(target: Target) -> None:
    """Raises CallerError `settings-invalid` for one that nothing may be sent to."""
    _place(target)


def _place(target: Target) -> SplitResult:
    try:
        place = urlsplit(target.url)
        port = place.port
    except ValueError:
        raise CallerError("settings-invalid", "a webhook's target is no URL") from None
    if port == 0:
        raise CallerError("settings-invalid", "a webhook's port is a number from 1 to 65535")
    plain = place.scheme == "http" and target.within
    if not place.hostname or not (place.scheme == "https" or plain):
        raise CallerError(
            "settings-invalid",
            "a webhook's target is an https URL",
            hint="its `url` in the settings; http:// only beside `within = true`",
        )
    if place.username is not None or place.fragment or not target.url.isprintable():
        raise CallerError("settings-invalid", "a webhook's target has no user and no fragment")
    if " " in target.url or not target.url.isascii():
        raise CallerError("settings-invalid", "a webhook's target is a URL in normal form")
    return place


async def _post(target: Target, place: SplitResult, request: bytes) -> int:
    secure = place.scheme == "https"
    host = place.hostname or ""
    port = place.port or (443 if secure else 80)
    # the address that was looked at is the one that is dialled; the certificate is the name's
    address = await _address(host, port, within=target.within)
    reader, writer = await asyncio.open_connection(
        address,
        port,
        ssl=_context(target) if secure else None,
        server_hostname=host if secure else None,
        limit=1 << 16,
    )
    try:
        writer.write(request)
        await writer.drain()
        return await _status(reader)
    finally:
        # what has arrived has: a server that does not take its leave must not be told again
        writer.transport.abort()


async def _status(reader: asyncio.StreamReader) -> int:
    """That of the final answer, which interim ones may come ahead of."""
    while True:
        version, status, *_ = (await reader.readline()).split(None, 2)
        if not version.startswith(b"HTTP/1."):
            raise ValueError("no HTTP")
        if not 100 <= int(status) < 200 or int(status) == _SWITCHED:
            return int(status)
        while (await reader.readline()).strip():
            pass


def _context(target: Target) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if target.ca_file is not None:
        context.load_verify_locations(cafile=target.ca_file)
    return context


async def _address(host: str, port: int, *, within: bool) -> str:
    """The one address of a name, or of an address that was written as such. Raises AddressError."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return (await Resolver({}, {}).resolve(host, port, ours=within))[0]
    if not vet(host, own_addresses()) and not (within and near(host)):
        raise AddressError("address-not-public")
    return host


def _request(place: SplitResult, payload: str, more: Mapping[str, str]) -> bytes:
    body = payload.encode()
    path = (place.path or "/") + (f"?{place.query}" if place.query else "")
    headers = {
        "host": place.netloc,
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
        **more,
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + body
