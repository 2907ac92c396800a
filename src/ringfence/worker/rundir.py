"""What a run leaves on disk: one 0700 directory below `state_dir/runs`, written whole or not."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from ringfence.model import RunResult


class RunDirectory:
    """`state_dir/runs/<run_id>`: result.json, run.patch, changes.bin."""

    def __init__(self, state_dir: Path, run_id: str) -> None:
        self.path = state_dir / "runs" / run_id
        self.path.mkdir(parents=True, mode=0o700)

    @property
    def changes_file(self) -> Path:
        """Where the changes of review mode lie, for `ringfence patch apply`."""
        return self.path / "changes.bin"

    @property
    def patch_file(self) -> Path:
        """The patch as `git apply` takes it."""
        return self.path / "run.patch"

    def save(self, result: RunResult) -> None:
        """Write the patch, then the result that names it."""
        if result.patch:
            write_whole(self.patch_file, result.patch)
        write_whole(
            self.path / "result.json",
            # an agent may cut a character in half, and a lone surrogate has no UTF-8
            json.dumps(result_to_json(result), ensure_ascii=False, indent=1).encode(
                "utf-8", "replace"
            ),
        )


def result_to_json(result: RunResult) -> dict[str, Any]:
    """Shape of a result in every JSON output; the patch is text with surrogates replaced."""
    value = dataclasses.asdict(result)
    value["status"] = result.status.value
    value["patch"] = result.patch.decode("utf-8", "replace")
    return value


def write_whole(path: Path, data: bytes) -> None:
    """Write a 0600 file so that a reader sees all of it or none."""
    temporary = path.with_name(path.name + ".part")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
