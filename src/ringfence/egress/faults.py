"""What egress tells of an error that nobody foresaw.

Its own words may hold a value, a path or a host that the worker's side should not read. Whoever
runs the host has to learn of a full disk or a server that is down: so the name of the fault is
told, from a list that the system or OpenSSL keeps, and what to do.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import ssl
from collections.abc import Collection

from ringfence.errors import UnavailableError

_DISK = "see that the disk is not full and the state directory can be written"
_OTHER_SIDE = "see that the servers that the settings name are up, and listen where they say"
_ROAD = "see this host's network and routes to the servers that the settings name"
_FILES = "raise the limit of open files (ulimit -n; systemd: LimitNOFILE)"
_NAME = "see that this host resolves names (/etc/resolv.conf), and those that the settings name"
_TLS = "see the other side's certificate, its authority (SSL_CERT_FILE) and this host's clock"
_ELSE = "see this host's own log"

_HINTS: tuple[tuple[Collection[int], str], ...] = (
    ({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM}, _DISK),
    ({errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EISDIR}, _DISK),
    ({errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.EPIPE}, _OTHER_SIDE),
    ({errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN}, _ROAD),
    ({errno.EADDRNOTAVAIL, errno.EHOSTDOWN}, _ROAD),
    ({errno.EMFILE, errno.ENFILE}, _FILES),
)

_REASON = re.compile(r"[A-Z][A-Z0-9_]{2,60}")


def unforeseen(error: Exception) -> UnavailableError:
    """`egress-unavailable`, without the error's own words."""
    if isinstance(error, ssl.SSLError):
        # its number is OpenSSL's, and 1 there is none of EPERM
        return _told(f"TLS failed{_tls_reason(error)}", _TLS)
    if isinstance(error, socket.gaierror):
        return _told("a host's name was not resolved", _NAME)
    if isinstance(error, OSError) and error.errno is not None and error.errno in errno.errorcode:
        return _told(os.strerror(error.errno).lower(), _hint(error.errno))
    if isinstance(error, TimeoutError):
        return _told("nobody answered in time", _ROAD)
    return UnavailableError("egress-unavailable", f"{type(error).__name__} in egress")


def _hint(number: int) -> str:
    return next((hint for numbers, hint in _HINTS if number in numbers), _ELSE)


def _told(what: str, hint: str) -> UnavailableError:
    return UnavailableError("egress-unavailable", f"egress: {what}", hint=hint)


def _tls_reason(error: ssl.SSLError) -> str:
    """OpenSSL's name of it, such as CERTIFICATE_VERIFY_FAILED."""
    reason: object = getattr(error, "reason", None)
    if not isinstance(reason, str) or not _REASON.fullmatch(reason):
        return ""
    return f": {reason.lower().replace('_', ' ')}"
