"""What a run leaves on disk: one 0700 directory below `state_dir/runs`, written whole or not."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from ringfence.model import RunResult
from ringfence.store.files import write_whole


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
            json.dumps(result_to_json(result), indent=1).encode(),
        )


def result_to_json(result: RunResult) -> dict[str, Any]:
    """Shape of a result in every JSON output; the patch is text with surrogates replaced."""
    value = dataclasses.asdict(result)
    value["status"] = result.status.value
    value["patch"] = result.patch.decode("utf-8", "replace")
    return value
