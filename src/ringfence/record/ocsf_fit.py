"""Values of a record in their places of an OCSF event, where they fit. PURE."""

from __future__ import annotations

import calendar
import ipaddress
import re
from typing import Any

METHODS = {
    "CONNECT": (1, "Connect"),
    "DELETE": (2, "Delete"),
    "GET": (3, "Get"),
    "HEAD": (4, "Head"),
    "OPTIONS": (5, "Options"),
    "POST": (6, "Post"),
    "PUT": (7, "Put"),
    "PATCH": (9, "Patch"),
}
"""`activity_id` and `activity_name` of HTTP Activity."""


def put(told: dict[str, Any], path: str, value: Any, *, over: bool = True) -> None:
    """Set a value at its path; the first part of a path `x[]` is a list of one. over: what is
    there, too.
    """
    *ways, last = path.split(".")
    node = told
    for way in ways:
        if way.endswith("[]"):
            node = node.setdefault(way[:-2], [{}])[0]
        else:
            node = node.setdefault(way, {})
    if last.endswith("[]"):
        last, value = last[:-2], [value]
    if over or last not in node:
        node[last] = value


_HOSTNAME = re.compile(r"(?=.{1,253}\Z)[A-Za-z0-9_-]{1,63}(?:\.[A-Za-z0-9_-]{1,63})*\.?")
_INTEGERS = frozenset(
    {
        *("body_length", "code", "count", "port"),
        *("bytes_in", "bytes_out", "prompt_tokens", "completion_tokens"),
    }
)


def fit(path: str, value: Any) -> Any:
    """The value as its place takes it; None when it does not fit."""
    last = path.rpartition(".")[2]
    if last == "duration":
        return round(value) if isinstance(value, int | float) else None
    if last in _INTEGERS:
        fits = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        return value if fits and (last != "port" or value <= 65_535) else None
    if not isinstance(value, str) or (last == "hostname" and not _HOSTNAME.fullmatch(value)):
        return None
    if last == "http_method" and value not in METHODS:
        return None
    return _address(value) if last == "ip" else value


def _address(value: str) -> str | None:
    try:
        return str(ipaddress.ip_address(value))
    except ValueError:
        return None


_TIME = re.compile(r"(\d{4})-(\d\d)-(\d\d)T(\d\d):(\d\d):(\d\d)\.(\d{3})\d{3}Z", re.ASCII)


def milliseconds(time: object) -> int:
    """Since the epoch, as OCSF's timestamp_t. Raises ValueError."""
    match = _TIME.fullmatch(time) if isinstance(time, str) else None
    if match is None:
        raise ValueError("the record has no time")
    *parts, fraction = (int(part) for part in match.groups())
    year, month, day, hour, minute, second = parts
    if not (year and 0 < month <= 12 and day):
        raise ValueError("the record has no time")
    return calendar.timegm((year, month, day, hour, minute, second)) * 1000 + fraction
