"""How two lists of lines differ, in a time that whoever wrote them cannot choose. PURE.

`difflib` takes the cube of the length for lines that repeat in the right way: half a minute for
1,200 of them, days for what a sandbox has room for. So what it does is counted before it is done,
and past a bound one hunk replaces the middle: a patch that is coarse, and right.
"""

from __future__ import annotations

import difflib
from collections import Counter
from itertools import accumulate

Opcode = tuple[str, int, int, int, int]

MOST = 1 << 26
"""Of all files together; about ten seconds. Units are tenths of a microsecond, roughly."""
MOST_OF_ONE = 1 << 24
_WALKED, _TAKEN_APART = 4, 20
"""Of a line: in one of difflib's walks; cut out, compared and written."""
_CONTEXT = 3


class Work:
    """What is left to be spent on the files of one patch."""

    def __init__(self, most: int = MOST) -> None:
        self.left = most

    def read(self, *contents: bytes) -> bool:
        """Whether contents may be taken apart into lines; spends what that costs."""
        cost = _TAKEN_APART * sum(content.count(b"\n") for content in contents)
        if cost > min(self.left, MOST_OF_ONE):
            return False
        self.left -= cost
        return True


class _TooMuchError(Exception):
    pass


class _Counted(difflib.SequenceMatcher[bytes]):
    def __init__(self, old: list[bytes], new: list[bytes], work: Work) -> None:
        super().__init__(None, old, new, autojunk=False)
        self._work, self._most = work, MOST_OF_ONE
        equal = Counter(new)
        self._costs = [0, *accumulate(equal[line] + _WALKED for line in old)]

    def find_longest_match(
        self, alo: int = 0, ahi: int | None = None, blo: int = 0, bhi: int | None = None
    ) -> difflib.Match:
        """See difflib: it walks the lines from `alo` to `ahi`, and of each all that equal it."""
        cost = self._costs[-1 if ahi is None else ahi] - self._costs[alo]
        self._most -= cost
        self._work.left -= cost
        if min(self._most, self._work.left) < 0:
            self._work.left = max(0, self._work.left)
            raise _TooMuchError
        return super().find_longest_match(alo, ahi, blo, bhi)


def groups(old: list[bytes], new: list[bytes], work: Work) -> list[list[Opcode]]:
    """Opcodes as difflib's `get_grouped_opcodes` has them, three equal lines around each."""
    start = 0
    while start < min(len(old), len(new)) and old[start] == new[start]:
        start += 1
    end = 0
    while end < min(len(old), len(new)) - start and old[-1 - end] == new[-1 - end]:
        end += 1
    head, tail = max(0, start - _CONTEXT), min(_CONTEXT, end)
    ends = len(old) - end, len(new) - end
    try:
        matcher = _Counted(old[head : ends[0] + tail], new[head : ends[1] + tail], work)
        return [
            [(tag, i1 + head, i2 + head, j1 + head, j2 + head) for tag, i1, i2, j1, j2 in group]
            for group in matcher.get_grouped_opcodes(_CONTEXT)
        ]
    except _TooMuchError:
        return [
            [
                ("equal", head, start, head, start),
                ("replace", start, ends[0], start, ends[1]),
                ("equal", ends[0], ends[0] + tail, ends[1], ends[1] + tail),
            ]
        ]
