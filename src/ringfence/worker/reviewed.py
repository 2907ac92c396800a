"""What a review found: the patch, and which of it runs later."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ringfence.agent.messages import Notice
from ringfence.sandbox.hostfiles import MAX_LOOKED, host_files
from ringfence.sandbox.patch import render
from ringfence.sandbox.protocol import Changes
from ringfence.sandbox.saved import save_changes


@dataclass(frozen=True, kw_only=True, slots=True)
class Reviewed:
    """Made once of a run's changes; `patch`, `changed_files`, `host_files` and `left_out` are those
    of a RunResult.
    """

    changes: Changes = field(default_factory=Changes)
    patch: bytes = b""
    changed_files: tuple[str, ...] = ()
    host_files: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    @property
    def notices(self) -> Iterator[Notice]:
        """What a person has to know of it beside."""
        over = _over(self.changes)
        if over > 0:
            text = (
                f"the run changed {len(self.changes.items)} files: the last {over} are not in its "
                "patch and were not looked at, and count as files that run later; `ringfence "
                "patch` shows and looks at all of them"
            )
            yield Notice(kind="host_files_unread", text=text)

    def save(self, path: Path, workspace: str) -> None:
        """For `ringfence patch`, where there is anything."""
        if self.changes.items or self.changes.refused:
            save_changes(path, self.changes, workspace)


def reviewed(changes: Changes) -> Reviewed:
    """Look at them. Takes as long as many changes take: never on the event loop."""
    return Reviewed(
        changes=changes,
        patch=render(changes, most=MAX_LOOKED),
        changed_files=tuple(change.path for change in changes.items),
        host_files=tuple(file.path for file in host_files(changes, most=MAX_LOOKED)),
        left_out=tuple(_left_out(changes)),
    )


def _over(changes: Changes) -> int:
    return max(0, len(changes.items) - MAX_LOOKED)


def _left_out(changes: Changes) -> Iterator[str]:
    # first: whoever hands the patch on must not take it for whole
    if over := _over(changes):
        yield f"the last {over} changed files: too many for the patch; `ringfence patch` has them"
    yield from (f"{path}: {reason}" for path, reason in changes.refused)
