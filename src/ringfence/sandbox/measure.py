"""How long a technology takes on this very host: measured, kept with its date, never guessed."""

from __future__ import annotations

import json
import platform
import secrets
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from ringfence.policy.compiled import Limits, SandboxProfile
from ringfence.sandbox.protocol import Backend, SandboxSpec

_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
RUNS = 5
LONG_SECONDS = 1.5
"""After a start that took longer no other is measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StartUp:
    """Seconds from the wish for a sandbox to the end of `true` in it.

    Attributes:
        seconds: median of `runs`. at: ISO 8601, UTC. kernel: release it was measured on.
    """

    seconds: float
    runs: int
    at: str
    kernel: str


async def measure(backend: Backend, state_dir: Path, *, emulation: bool = False) -> StartUp:
    """Start, run `true`, stop: in an empty workspace, under the default limits. The first start
    after an installation fills caches, or saves a machine, and is not counted. `emulation` is the
    policy's.

    Raises:
        RingfenceError: as `Backend.start` does.
    """
    profile = SandboxProfile(limits=Limits(), emulation=emulation)
    accepted = {s.control.value for s in backend.probe(profile) if not s.enforced}
    profile = replace(profile, accept_unenforced=frozenset(accepted))
    times: list[float] = []
    with tempfile.TemporaryDirectory(prefix="ringfence-measure-") as workspace:
        for turn in range(RUNS + 1):
            seconds = await once(backend, profile, Path(workspace), state_dir)
            times += [seconds] if turn else []
            if turn and seconds > LONG_SECONDS:
                break
    return StartUp(
        seconds=round(statistics.median(times), 4),
        runs=len(times),
        at=datetime.now(UTC).isoformat(timespec="seconds"),
        kernel=platform.release(),
    )


async def once(
    backend: Backend, profile: SandboxProfile, workspace: Path, state_dir: Path
) -> float:
    """Seconds from the wish to the end of `true`."""
    name = "sb_" + "".join(secrets.choice(_ALPHABET) for _ in range(26))
    began = time.perf_counter()
    sandbox = await backend.start(
        SandboxSpec(sandbox_id=name, profile=profile, workspace=workspace, state_dir=state_dir)
    )
    try:
        process = await sandbox.exec(["true"])
        await process.close_stdin()
        await process.wait()
        return time.perf_counter() - began
    finally:
        await sandbox.close()


class Measured:
    """What was measured before; `isolation.json` of the state directory."""

    def __init__(self, state_dir: Path) -> None:
        self._path = state_dir / "isolation.json"

    def get(self, name: str) -> StartUp | None:
        """None when it never was, or under another kernel."""
        try:
            found = StartUp(**json.loads(self._path.read_text())[name])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return found if found.kernel == platform.release() else None

    def keep(self, name: str, start_up: StartUp) -> None:
        """Write it beside the others. A file that cannot be read is begun anew."""
        try:
            known = dict(json.loads(self._path.read_text()))
        except (OSError, ValueError, TypeError):
            known = {}
        known[name] = asdict(start_up)
        temporary = self._path.with_suffix(f".{secrets.token_hex(4)}")
        temporary.write_text(json.dumps(known, indent=1))
        temporary.replace(self._path)
