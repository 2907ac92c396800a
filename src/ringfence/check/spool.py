"""What a probe prints, kept within bounds without losing what decides. PURE.

A probe may print gigabytes before its verdict. The beginning and the end are kept; of what lies
between, every line that says ESCAPED or that a program broke, and every secret, is kept too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_HEAD = _TAIL = 512 << 10
_CARRY = 1024
_LINES = 50
_TELLING = re.compile(
    rb"[\r\n](?:\x1b\[[0-9;?]*[A-Za-z])*(ESCAPED[^\r\n]{0,400}|Traceback \(most recent call last\))"
)


class Spool:
    """`feed` it chunks; `text` is at most about a mebibyte. `secrets` are looked for throughout."""

    def __init__(self, secrets: Sequence[str] = ()) -> None:
        self._secrets = [secret.encode() for secret in secrets]
        self._head, self._tail = bytearray(), bytearray()
        self._carry = b"\n"
        self._telling: list[bytes] = []
        self._left_out = 0

    def feed(self, chunk: bytes) -> None:
        """The next bytes, of any length."""
        self._look(self._carry + chunk)
        # a line or a secret that is cut between two chunks is whole with what is carried over
        self._carry = (self._carry + chunk)[-_CARRY:]
        room = max(0, _HEAD - len(self._head))
        self._head += chunk[:room]
        self._tail += chunk[room:]
        excess = len(self._tail) - _TAIL
        if excess > 0:
            self._left_out += excess
            del self._tail[:excess]

    def _look(self, window: bytes) -> None:
        found = [match[1] for match in _TELLING.finditer(window)]
        found += [secret for secret in self._secrets if secret in window]
        for line in found:
            if line not in self._telling and len(self._telling) < _LINES:
                self._telling.append(line)

    def text(self) -> str:
        """Decoded with replacement; lines from what was left out stand between its two parts."""
        parts = [bytes(self._head + self._tail)]
        if self._left_out:
            note = f"[{self._left_out} bytes are left out]".encode()
            parts = [bytes(self._head), *self._telling, note, bytes(self._tail)]
        return b"\n".join(parts).decode("utf-8", "replace")
