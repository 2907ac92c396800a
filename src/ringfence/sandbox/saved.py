"""Changes on disk between a run and its `patch apply`: JSON lines, content as base64."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path

from ringfence.errors import CallerError
from ringfence.sandbox.protocol import Change, ChangeKind, Changes

_VERSION = 1


def save_changes(path: Path, changes: Changes, workspace: str) -> None:
    """Write them, 0600, whole or not at all."""
    temporary = path.with_name(path.name + ".part")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(temporary, flags, 0o600), "w") as file:
        refused = [[_name(path), reason] for path, reason in changes.refused]
        repositories = list(map(_name, changes.repositories))
        head = {
            "version": _VERSION,
            "workspace": workspace,
            "refused": refused,
            "repositories": repositories,
        }
        file.write(json.dumps(head) + "\n")
        for change in changes.items:
            file.write(json.dumps(_to_json(change)) + "\n")
    temporary.replace(path)


def load_changes(path: Path) -> tuple[Changes, str]:
    """(changes, workspace). Raises CallerError `run-unknown`."""
    try:
        lines = path.read_text().splitlines()
        head = json.loads(lines[0])
        readable = head["version"] == _VERSION
        items = tuple(_from_json(json.loads(line)) for line in lines[1:]) if readable else None
        # a run of an earlier version left the keys out
        refused = tuple((_path(path), str(reason)) for path, reason in head.get("refused", ()))
        repositories = tuple(map(_path, head.get("repositories", ())))
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        raise CallerError(
            "run-unknown", "that run left no changes here", hint="ringfence audit show lists runs"
        ) from None
    if items is None:
        raise CallerError("run-unknown", "another version of ringfence wrote that run's changes")
    changes = Changes(items=items, refused=refused, repositories=repositories)
    return changes, str(head["workspace"])


def _to_json(change: Change) -> dict[str, object]:
    return {
        "path": _name(change.path),
        "kind": change.kind.value,
        "mode": change.mode,
        "old_mode": change.old_mode,
        "before": _encode(change.before),
        "after": _encode(change.after),
    }


def _from_json(value: dict[str, object]) -> Change:
    return Change(
        path=_path(value["path"]),
        kind=ChangeKind(str(value["kind"])),
        mode=int(str(value["mode"])),
        old_mode=int(str(value["old_mode"])),
        before=_decode(value["before"]),
        after=_decode(value["after"]),
    )


def _name(path: str) -> str:
    return base64.b64encode(os.fsencode(path)).decode()


def _path(name: object) -> str:
    return os.fsdecode(base64.b64decode(str(name)))


def _encode(data: bytes | None) -> str | None:
    return None if data is None else base64.b64encode(data).decode()


def _decode(text: object) -> bytes | None:
    return None if text is None else base64.b64decode(str(text))
