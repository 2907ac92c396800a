"""Changes as a patch that `git apply` takes, byte for byte. PURE.

git's extended headers carry what a plain diff cannot: modes, links, deletions, binary content.
No program is run, least of all git in a tree that an agent wrote.
"""

from __future__ import annotations

import base64
import hashlib
import re
import zlib
from collections.abc import Iterator

from ringfence.sandbox.linediff import Opcode, Work, groups
from ringfence.sandbox.protocol import Change, Changes

_LINK = 0o120000
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_./@+,=~%^:;!#$&()\[\]{}'\- ]+\Z")
_NO_NEWLINE = b"\\ No newline at end of file\n"


def render(changes: Changes, *, most: int | None = None) -> bytes:
    """The patch; empty when nothing changed. `most`: of so many changes, the first; None is all."""
    work, items = Work(), changes.items[:most]
    return b"".join(_render_one(part, work) for change in items for part in _split(change))


def _split(change: Change) -> Iterator[Change]:
    """A file that became a link, or the other way, is a deletion and an addition in git."""
    kinds = {change.mode & 0o170000, change.old_mode & 0o170000}
    if change.mode and change.old_mode and len(kinds) == 2:
        yield _with(change, mode=0, after=None)
        yield _with(change, old_mode=0, before=None)
    else:
        yield change


def _with(change: Change, **fields: object) -> Change:
    from dataclasses import replace

    return replace(change, **fields)  # type: ignore[arg-type]


def _render_one(change: Change, work: Work) -> bytes:
    old, new = _name("a/", change.path), _name("b/", change.path)
    lines = [b"diff --git %b %b\n" % (old, new)]
    if not change.old_mode:
        lines.append(b"new file mode %o\n" % change.mode)
    elif not change.mode:
        lines.append(b"deleted file mode %o\n" % change.old_mode)
    elif change.mode != change.old_mode:
        lines.append(b"old mode %o\nnew mode %o\n" % (change.old_mode, change.mode))
    before, after = change.before or b"", change.after or b""
    if before == after:
        if change.mode and change.old_mode:
            return b"".join(lines)
        lines.append(_index(change, before, after))
        return b"".join(lines)
    lines.append(_index(change, before, after))
    if not _as_text(before, after, work):
        lines.append(_binary(before, after))
    else:
        lines.append(b"--- %b\n" % (old if change.old_mode else b"/dev/null"))
        lines.append(b"+++ %b\n" % (new if change.mode else b"/dev/null"))
        lines += _hunks(before, after, work)
    return b"".join(lines)


def _index(change: Change, before: bytes, after: bytes) -> bytes:
    old = _blob(before) if change.old_mode else b"0" * 40
    new = _blob(after) if change.mode else b"0" * 40
    same = change.mode if change.mode == change.old_mode else 0
    return b"index %b..%b%b\n" % (old, new, b" %o" % same if same else b"")


def _blob(data: bytes) -> bytes:
    """Git's name of the content; binary patches need it in full."""
    return hashlib.sha1(b"blob %d\x00" % len(data) + data).hexdigest().encode()  # noqa: S324  git's


def _name(prefix: str, path: str) -> bytes:
    """C-style quoting where git would quote (quote.c); spaces alone need none."""
    raw = (prefix + path).encode("utf-8", "surrogateescape")
    if _PLAIN_NAME.match(prefix + path) and not path.endswith(" "):
        return raw
    out = bytearray(b'"')
    escapes = {7: b"\\a", 8: b"\\b", 9: b"\\t", 10: b"\\n", 11: b"\\v", 12: b"\\f", 13: b"\\r"}
    for byte in raw:
        if byte in escapes:
            out += escapes[byte]
        elif byte in b'"\\':
            out += b"\\" + bytes([byte])
        elif byte < 0x20 or byte >= 0x7F:
            out += b"\\%03o" % byte
        else:
            out.append(byte)
    return bytes(out + b'"')


def _lines(data: bytes) -> list[bytes]:
    """Lines that end with LF, and a last one that may not; CR is content."""
    parts = data.split(b"\n")
    lines = [part + b"\n" for part in parts[:-1]]
    return [*lines, parts[-1]] if parts[-1] else lines


def _hunks(before: bytes, after: bytes, work: Work) -> list[bytes]:
    old, new = _lines(before), _lines(after)
    return [line for group in groups(old, new, work) for line in _hunk(group, old, new)]


def _as_text(before: bytes, after: bytes, work: Work) -> bool:
    """Whether it is shown in lines. So many lines that nobody reads them are not: each would be an
    object here, and an agent can have half a thousand million.
    """
    return b"\x00" not in before and b"\x00" not in after and work.read(before, after)


def _hunk(group: list[Opcode], old: list[bytes], new: list[bytes]) -> Iterator[bytes]:
    first, last = group[0], group[-1]
    yield b"@@ -%b +%b @@\n" % (_range(first[1], last[2]), _range(first[3], last[4]))
    for tag, i1, i2, j1, j2 in group:
        if tag == "equal":
            for line in old[i1:i2]:
                yield from _line(b" ", line)
            continue
        for line in old[i1:i2]:
            yield from _line(b"-", line)
        for line in new[j1:j2]:
            yield from _line(b"+", line)


def _line(sign: bytes, line: bytes) -> Iterator[bytes]:
    if line.endswith(b"\n"):
        yield sign + line
    else:
        yield sign + line + b"\n"
        yield _NO_NEWLINE


def _range(start: int, stop: int) -> bytes:
    length = stop - start
    if length == 1:
        return b"%d" % (start + 1)
    return b"%d,%d" % (start + 1 if length else start, length)


def _binary(before: bytes, after: bytes) -> bytes:
    return b"GIT binary patch\n" + _literal(after) + b"\n" + _literal(before) + b"\n"


def _literal(data: bytes) -> bytes:
    """`literal` section: zlib, then base85 in lines of 52 bytes with a length letter."""
    packed = zlib.compress(data, 9)
    lines = [b"literal %d\n" % len(data)]
    for at in range(0, len(packed), 52):
        part = packed[at : at + 52]
        size = len(part)
        letter = bytes([size + 64 if size <= 26 else size + 70])
        padded = part + b"\x00" * (-size % 4)
        lines.append(letter + base64.b85encode(padded) + b"\n")
    return b"".join(lines)


def summary(changes: Changes) -> tuple[int, int, int]:
    """(files, lines added, lines removed); what the patch has as binary counts no lines."""
    added = removed = 0
    work = Work()
    for change in changes.items:
        before, after = change.before or b"", change.after or b""
        if before == after or not _as_text(before, after, work):
            continue
        for line in _hunks(before, after, work):
            added += line.startswith(b"+")
            removed += line.startswith(b"-")
    return len(changes.items), added, removed
