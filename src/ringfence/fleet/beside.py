"""Where the services of `ringfence up --services` are, for the operator's commands beside it.

Their addresses are new ones at each start, and nobody sets them: without this file `ringfence keys
list` would look into an empty SQLite file and say that there is no key. The file is locked while
the fleet lives. The kernel lets go of the lock with its process, so that what a killed fleet left
is told from what holds.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from ringfence.errors import UnavailableError, words

NAMES = ("RINGFENCE_DATABASE", "RINGFENCE_QUEUE__ENGINE", "RINGFENCE_QUEUE__ADDRESS")
"""The settings that a service can be; nothing else is taken from the file."""
_MOST_BYTES = 16_384


@contextlib.contextmanager
def left(state_dir: Path, settings: Mapping[str, str]) -> Iterator[None]:
    """Lies there while the body runs; nothing does when nothing was started.

    Raises:
        UnavailableError: `host-failed`, also where another fleet's services live on this state
            directory: theirs are the files that ours would begin with.
    """
    if not settings:
        yield
        return
    path, draft = _path(state_dir), _path(state_dir).with_suffix(".new")
    with contextlib.ExitStack() as stack:
        try:
            _alone(path.parent, stack)
            draft.unlink(missing_ok=True)
            descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            stack.callback(os.close, descriptor)
            # before it has its name: whoever finds it finds it locked
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.write(descriptor, json.dumps(dict(settings)).encode())
            draft.rename(path)
        except OSError as error:
            raise UnavailableError(
                "host-failed", f"{path} cannot be written: {words(error)}", hint="see the disk"
            ) from None
        stack.callback(path.unlink, missing_ok=True)
        yield


def _alone(place: Path, stack: contextlib.ExitStack) -> None:
    """Until the stack ends. The directory's lock and not the file's: who looks at a file that was
    left holds that for a moment, and is no fleet.
    """
    descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    stack.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UnavailableError(
            "host-failed",
            f"services of another `ringfence up` live in {place}",
            hint="end it, or set RINGFENCE_STATE_DIR to another directory",
        ) from None


def found(state_dir: Path) -> dict[str, str]:
    """Settings by their names in the environment; none where no fleet lives that started any."""
    try:
        descriptor = os.open(_path(state_dir), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return {}
    with os.fdopen(descriptor, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _known(file.read(_MOST_BYTES))
    return {}


def _known(content: bytes) -> dict[str, str]:
    try:
        value = json.loads(content)
    except ValueError:
        return {}
    pairs = value.items() if isinstance(value, dict) else ()
    return {name: text for name, text in pairs if name in NAMES and isinstance(text, str)}


def _path(state_dir: Path) -> Path:
    return state_dir / "services" / "settings.json"
