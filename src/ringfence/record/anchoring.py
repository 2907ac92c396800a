"""The anchor process: puts checkpoints where another than root of this host keeps them.

`python -m ringfence.record.anchoring FD`. A process of its own, because whoever answers
here must not answer the one that holds the signing key, and because a mount or a host that hangs
must not hold up a record. It knows no secret but the token of its URL.

Frames as in `wire`: the settings come first, for a command line can be read by every user of the
host and a URL may be a capability. Then {"size": n, "note": checkpoint} comes, and {"size": n,
"why": text} goes back, with an empty text when it is there. It ends when the recorder does.
"""

from __future__ import annotations

import http.client
import os
import signal
import socket
import ssl
import stat
import sys
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from ringfence.record.wire import Decoder, encode

_HTTP_SECONDS = 10.0
_MAX_TOKEN = 8192


def put(settings: Mapping[str, Any], note: str) -> None:
    """Put one checkpoint everywhere; the settings are an `AnchorSettings` as JSON.

    Raises:
        OSError: it is not there for certain.
    """
    if settings.get("file"):
        append(str(settings["file"]), note.encode())
    if settings.get("url"):
        post(settings, note.encode())


def append(path: str, note: bytes) -> None:
    """Durably; a part that was written before an error is no checkpoint for any reader. It stays:
    to cut it off could cut off what another recorder has put behind it. Raises OSError.

    No link is followed: who can write to the directory could lead us to a file of the operator's.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o644)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{path} is no file")
        size = status.st_size
        # whoever was cut off in the middle of a line must not spoil ours
        torn = size and os.pread(descriptor, 1, size - 1) != b"\n"
        data = b"\n" + note if torn else note
        if os.write(descriptor, data) != len(data):
            raise OSError(f"{path} took a part of it: is its disk full?")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def post(settings: Mapping[str, Any], note: bytes) -> None:
    """Over HTTP; 2xx is success, and a redirect is none. Raises OSError."""
    url = urlsplit(str(settings["url"]))
    connection: http.client.HTTPConnection
    host = url.hostname or ""
    if url.scheme == "https":
        context = ssl.create_default_context()
        if settings.get("ca_file"):
            context.load_verify_locations(settings["ca_file"])
        connection = http.client.HTTPSConnection(
            host, url.port, timeout=_HTTP_SECONDS, context=context
        )
    else:
        connection = http.client.HTTPConnection(host, url.port, timeout=_HTTP_SECONDS)
    headers = {"content-type": "text/plain; charset=utf-8"}
    if settings.get("token_file"):
        headers["authorization"] = f"Bearer {_token(settings['token_file'])}"
    try:
        target = (url.path or "/") + (f"?{url.query}" if url.query else "")
        connection.request("POST", target, body=note, headers=headers)
        status = connection.getresponse().status
    except OSError:  # a certificate that is not good is a ValueError, too
        raise
    except (http.client.HTTPException, ValueError) as error:
        raise OSError(f"{host} does not speak HTTP: {type(error).__name__}") from None
    finally:
        connection.close()
    if not 200 <= status < 300:
        raise OSError(f"{host} answers {status}")


def _token(path: str) -> str:
    with open(path, encoding="ascii") as file:  # noqa: PTH123  pathlib is not loaded here
        token = file.read(_MAX_TOKEN).strip()
    if not token or not token.isprintable() or " " in token:
        raise OSError(f"{path} holds no token")
    return token


def main(arguments: Sequence[str]) -> int:
    """Serve the recorder until it is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    settings: dict[str, Any] | None = None
    decoder = Decoder()
    with socket.socket(fileno=int(arguments[0])) as connection:
        while data := connection.recv(1 << 16):
            for frame in decoder.feed(data):
                if settings is None:
                    settings = frame
                    continue
                answer = {"size": frame["size"], "why": _fault(settings, frame["note"])}
                try:
                    connection.sendall(encode(answer))
                except OSError:
                    return 0
    return 0


def _fault(settings: Mapping[str, Any], note: str) -> str:
    """Why it cannot be put there; empty when it is there."""
    try:
        put(settings, note)
    except (OSError, ValueError) as error:
        words = str(error.strerror or error) if isinstance(error, OSError) else ""
        return words or type(error).__name__
    return ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
