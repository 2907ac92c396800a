"""Where a request comes from, and who is counted as one. PURE.

Behind a load balancer every connection is the load balancer's, and the caller's address is what
it appended to X-Forwarded-For. Everything further left was written by whoever sent the request, so
the list is read from the right, only while the one who appended is a named proxy, and only when the
connection itself is one's.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_MOST_HOPS = 16


class Proxies:
    """The load balancers that the operator has named, as addresses or networks."""

    def __init__(self, networks: Iterable[str] = ()) -> None:
        self._networks = [ipaddress.ip_network(text) for text in networks]

    def trusts(self, address: str) -> bool:
        """Whether it is one of them."""
        found = _parsed(address) if self._networks else None
        return found is not None and any(found in network for network in self._networks)

    def client(self, peer: str, forwarded: Sequence[str]) -> str:
        """The address of the caller: the rightmost that no named proxy has.

        `forwarded` holds the values of X-Forwarded-For in their order. What cannot be read ends
        the walk at the proxy that passed it on: its caller then counts with all of its others.
        """
        found = peer
        hops = ",".join(forwarded).split(",") if forwarded else []
        for text in list(reversed(hops))[:_MOST_HOPS]:
            if not self.trusts(found):
                break
            address = _parsed(_without_port(text.strip()))
            if address is None:
                break
            found = str(address)
        return found


def group(address: str) -> str:
    """Who is counted as one: an IPv4 address, an IPv6 network of 64 bits, which is what one
    subscriber gets at least (RFC 6177) and can draw addresses from at will.
    """
    found = _parsed(address)
    if isinstance(found, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((int(found) >> 64 << 64, 64)))
    return address if found is None else str(found)


def _parsed(text: str) -> _Address | None:
    try:
        found = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return mapped or found


def _without_port(text: str) -> str:
    """As some proxies write it: `203.0.113.7:4711`, `[2001:db8::1]:4711`."""
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0] if text.count(":") == 1 else text
