"""Where a client of ours may send a key over plain http. Pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from urllib.parse import urlsplit

from ringfence.errors import CallerError

PLAIN = "RINGFENCE_PLAIN_HTTP"
"""The environment's variable with the hosts, comma-separated, that a key may go to in the clear.
Hosts and no yes: an address that is mistyped, or changed later, is not among them.
"""


def refuse_plain(url: str, environment: Mapping[str, str]) -> None:
    """Pass https, http to this machine, and http to a host that the operator named.

    Raises:
        CallerError: `usage`.
    """
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
    except ValueError:
        raise CallerError("usage", f"{url[:64]!r} is no address") from None
    named = {one.strip().lower() for one in environment.get(PLAIN, "").split(",")}
    if parts.scheme == "https" or _here(host) or (host and host in named):
        return
    raise CallerError(
        "usage",
        f"a key is not sent over plain http to {host[:64] or 'no host'}: whoever is on the way "
        "could read it",
        hint=f"use https://, or set {PLAIN}={host[:64] or 'HOST'} where the network is your own",
    )


def _here(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    # who connects to "any address" reaches his own machine: `ringfence up --host 0.0.0.0` prints it
    return address.is_loopback or address.is_unspecified
