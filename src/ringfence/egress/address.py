"""Names to addresses: resolved once, every answer vetted, the one that is dialled pinned.

A name on the allowlist is a promise of its owner, not of the address it resolves to today: an
answer that points inside (loopback, private, link-local, metadata, this host itself) is refused
whole, so that a mixed answer cannot smuggle one in (DNS rebinding).
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

_METADATA = frozenset(
    {
        *("169.254.169.254", "169.254.170.2", "169.254.170.23", "168.63.129.16"),
        *("100.100.100.200", "192.0.0.192", "169.254.0.1"),
        *("fd00:ec2::254", "fd20:ce::254", "fd00:42::42"),
    }
)
_UNICAST6 = ipaddress.ip_network("2000::/3")
_UNROUTED = tuple(
    map(ipaddress.ip_network, ("192.0.0.0/24", "192.88.99.0/24", "2001:db8::/32", "3fff::/20"))
)
"""Special or retired blocks (RFC 6890, 7526, 9637) that older libraries call global."""
_LOCAL6 = ipaddress.ip_network("fc00::/7")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_TIMEOUT = 5.0
_KEPT_SECONDS = 30.0
_MAX_ANSWERS = 64


class AddressError(Exception):
    """A name that may not be dialled; the message is a reason tag."""


def vet(text: str, own: Iterable[str] = ()) -> bool:
    """Whether an address is out there, whatever it is wrapped in."""
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address):
        embedded = _embedded(address)
        if embedded is not None:
            return vet(str(embedded), own)
        # all that is allocated lies here: site-local fec0::/10, v4-compatible ::/96
        # and a network's own translators (RFC 8215), whose address inside is unknown, do not
        if address not in _UNICAST6:
            return False
    return (
        address.is_global
        and not address.is_multicast
        and not address.is_reserved
        and not any(address in block for block in _UNROUTED)
        and str(address) not in _METADATA
        and str(address) not in set(own)
    )


def near(text: str) -> bool:
    """Whether an address is one that an operator's own server may have: private or loopback, and
    still no metadata service, which answers at link-local and a few other places.
    """
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address):
        embedded = _embedded(address)
        if embedded is not None:
            return near(str(embedded))
        # a network's own translators (RFC 8215) are private, too, and can lead to metadata
        if address not in _LOCAL6 and not address.is_loopback:
            return False
    special = address.is_link_local or address.is_multicast or address.is_unspecified
    return address.is_private and not special and str(address) not in _METADATA


def _embedded(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address inside a v4-mapped, 6to4, Teredo or NAT64 one."""
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address.sixtofour is not None:
        return address.sixtofour
    if address.teredo is not None:
        return address.teredo[1]
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return None


def own_addresses() -> frozenset[str]:
    """Addresses of this host's interfaces: a public one of them is still us."""
    found = set()
    trie = Path("/proc/net/fib_trie")
    if trie.exists():
        last = ""
        for line in trie.read_text().splitlines():
            words = line.split()
            if "LOCAL" in words and "host" in words:
                found.add(last)
            elif words and words[0] == "|--":
                last = words[1]
    six = Path("/proc/net/if_inet6")
    if six.exists():
        for line in six.read_text().splitlines():
            found.add(str(ipaddress.IPv6Address(int(line.split()[0], 16))))
    return frozenset(found)


class Resolver:
    """Resolves for all sandboxes; `overrides` come from the operator's settings only."""

    def __init__(self, overrides: Mapping[str, list[str]], connect: Mapping[str, str]) -> None:
        self._overrides, self._connect = overrides, connect
        self._kept: dict[tuple[str, int, bool], tuple[float, tuple[str, int]]] = {}

    async def resolve(self, host: str, port: int, *, ours: bool = False) -> tuple[str, int]:
        """The one address to dial. Raises AddressError.

        `ours` is for a provider that the operator's settings name: it may stand on a private
        network. Nothing from inside chooses such a name.
        """
        forced = self._connect.get(f"{host}:{port}")
        if forced is not None:
            address, _, number = forced.rpartition(":")
            return address, int(number)
        if host in self._overrides:
            return _first_vetted(self._overrides[host], port, ours=ours)
        kept = self._kept.get((host, port, ours))
        if kept is not None and kept[0] > time.monotonic():
            return kept[1]
        chosen = _first_vetted(await _lookup(host, port, ours=ours), port, ours=ours)
        if len(self._kept) > 4096:
            self._kept.clear()
        self._kept[host, port, ours] = time.monotonic() + _KEPT_SECONDS, chosen
        return chosen


async def _lookup(host: str, port: int, *, ours: bool) -> list[str]:
    # absolute, or a search domain would choose where a name on the allowlist leads; with the dot
    # neither `localhost` nor a line of /etc/hosts is found, which an operator's own may be
    name = host if ours else host + "."
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(_TIMEOUT):
            answers = await loop.getaddrinfo(
                name, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP
            )
    except (TimeoutError, OSError):
        raise AddressError("name-not-resolved") from None
    return [str(answer[4][0]) for answer in answers]


def _first_vetted(addresses: list[str], port: int, *, ours: bool) -> tuple[str, int]:
    if not addresses or len(addresses) > _MAX_ANSWERS:
        raise AddressError("name-not-resolved")
    own = own_addresses()
    if not all(vet(address, own) or (ours and near(address)) for address in addresses):
        raise AddressError("address-not-public")
    return addresses[0], port
