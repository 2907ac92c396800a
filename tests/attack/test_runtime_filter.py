"""Our filter on the runtime's, from inside: nothing there has fewer, and without it nothing starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from backends import config, needs
from ringfence.sandbox import filtering, runtime_profile
from ringfence.testing.sandbox_base import SandboxClauses, shell
from ringfence.wiring import backends

pytestmark = needs("runtime")

PROCESSES = """
for p in /proc/[0-9]*; do
  echo ${p#/proc/} $(sed -n 's/^Seccomp_filters:\\t//p' $p/status 2>/dev/null)
done | grep ' [0-9]'
for pid in 1 self; do
  python3 -c "open('/proc/$pid/mem', 'r+b')" 2>/dev/null && echo $pid opens || echo $pid is shut
done
"""
FILTERS = "grep Seccomp_filters /proc/self/status"


class TestFilter(SandboxClauses):
    @pytest.fixture
    def backend(self, tmp_path: Path) -> Any:
        state = tmp_path / "state"
        state.mkdir(mode=0o700)
        return backends(config(state)).get("runtime")

    def test_what_has_no_filter_cannot_be_written(self, backend: Any, place: Path) -> None:
        """Process 1 is the runtime's, without a filter. Who writes into it acts without one."""
        code, output = self.inside(backend, self.spec(backend, place), PROCESSES)
        *listed, first, own = output.splitlines()
        assert (code, first, own) == (0, "1 is shut", "self opens")
        filters = dict(line.split() for line in listed)
        assert filters.pop("1") == "0"
        (count,) = set(filters.values())
        assert int(count) >= 2, "the runtime's and ours"

    def test_every_program_has_it(self, backend: Any, place: Path) -> None:
        """The second, beside one that lives, as much as the first."""
        seen = []

        async def work() -> None:
            async with self.started(backend, self.spec(backend, place)) as sandbox:
                lives = await sandbox.exec(["sleep", "60"])
                seen.append(await shell(sandbox, FILTERS))
                seen.append(await shell(sandbox, FILTERS))
                await lives.kill()

        self.run(work)
        first, second = seen
        assert first == second
        assert int(first[1].split()[1]) >= 2, "the runtime's and ours"

    @pytest.mark.parametrize("taken", ["nothing", "filter", "dev"])
    def test_where_it_does_not_hold_nothing_starts(
        self, backend: Any, place: Path, taken: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if taken == "filter":
            other = b'#!/bin/sh\nexec "$@"\n'
            monkeypatch.setattr(filtering, "program", lambda machine, filters: other)
        if taken == "dev":
            monkeypatch.setattr(runtime_profile, "_BWRAP", '#!/bin/sh\nexec @BWRAP@ "$@"\n')
        code, output = self.inside(backend, self.spec(backend, place), "echo ran")
        assert (code, output) == ((0, "ran\n") if taken == "nothing" else (125, ""))
