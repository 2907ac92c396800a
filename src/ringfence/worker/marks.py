"""What is noted beside a session's directory: which snapshot it grew from, and whose work is in
it. PURE. The note lies outside of what a sandbox sees.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

NO_SNAPSHOT = "-"


class Work(StrEnum):
    """How far a turn has come in a directory."""

    BEGUN = "begun"
    """An attempt has had it."""
    KEEPING = "keeping"
    """What a run in review mode changed is being written into it, or has been."""
    OVER = "over"
    """The turn has ended with these files, and without a snapshot of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """One note.

    Attributes:
        reference: of the snapshot that the directory grew from; `NO_SNAPSHOT` without one.
        turn: that was worked on in it since; 0: it is what the snapshot holds.
        run: whose changes are written, for `KEEPING`.
    """

    reference: str
    turn: int = 0
    work: Work = Work.BEGUN
    run: str = ""

    def passes(self, reference: str, turn: int) -> bool:
        """Whether the directory is the session's for a turn. References are hashes of content: a
        turn that went on elsewhere and changed nothing has the one of before, so that what it left
        here, half done, would pass for that.
        """
        own = not self.turn or turn == self.turn + (self.work is Work.OVER)
        return self.reference == reference and own

    def encode(self) -> bytes:
        """One line."""
        return f"{self.reference} {self.turn} {self.work} {self.run}".encode()

    @classmethod
    def parse(cls, text: str) -> Mark | None:
        """None for what is none. An earlier version wrote the reference alone."""
        parts = text.split()
        if len(parts) == 1:
            return cls(reference=parts[0])
        try:
            reference, turn, work, *run = parts
            return cls(reference=reference, turn=int(turn), work=Work(work), run="".join(run))
        except ValueError:
            return None
