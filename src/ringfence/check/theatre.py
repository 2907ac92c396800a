"""Where a real claude plays: worker, egress, audit log and a simulated model of its own.

Runs in it are like any other. What they sent to the model, what was decided and what they left are
looked at from outside.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ringfence.agent.permissions import DenyApprover
from ringfence.check.place import MakeBackend, patience
from ringfence.config import Config, Provider
from ringfence.model import PermissionMode, RunRequest, RunResult
from ringfence.policy.compile import compile_policy
from ringfence.policy.compiled import SandboxProfile
from ringfence.policy.load import from_mapping
from ringfence.record.read import AuditReader
from ringfence.sandbox.registry import Backends
from ringfence.simulator.script import Scenario
from ringfence.simulator.server import Simulator
from ringfence.worker.control import RunControl
from ringfence.worker.launch import Launcher, attempt
from ringfence.worker.station import Station

SECONDS = 90.0
"""Wall clock of a run here, unless the policy's is shorter."""


@dataclass(frozen=True, kw_only=True)
class Act:
    """One run as it was seen from outside.

    Attributes:
        results: what its tool calls answered, as the model was told. sent: all its requests to the
            model, as text. headers: theirs, as text. records: its part of the audit log.
        left: processes of the host that it left running. slow: as the theatre's.
    """

    result: RunResult
    results: Sequence[str]
    sent: str
    headers: str
    records: Sequence[Mapping[str, Any]]
    left: Sequence[int] = ()
    slow: float = 1.0

    def recorded(self, kind: str, **fields: Any) -> bool:
        """Whether a record of that type has these fields."""
        return any(
            record["type"] == kind and fields.items() <= record.items() for record in self.records
        )

    @property
    def code(self) -> str:
        """Code of the error that ended it; empty when none did."""
        return str((self.result.error or {}).get("code", ""))

    @property
    def why(self) -> str:
        """How it ended, in a few words."""
        return f"{self.result.status.value} {(self.result.error or {}).get('message', '')}".strip()


@dataclass(frozen=True, kw_only=True)
class Theatre:
    """A worker's station, and the model that it asks. `place` is a directory that sandboxes' uids
    can come through, `slow` how many times longer all may take.
    """

    place: Path
    profile: SandboxProfile
    station: Station
    simulator: Simulator
    slow: float = 1.0

    async def run(
        self,
        prompt: str,
        workspace: Path,
        tools: Mapping[str, Any],
        *,
        profile: SandboxProfile | None = None,
        mode: PermissionMode | None = None,
        seconds: float = SECONDS,
        resume: str | None = None,
    ) -> Act:
        """One run under the strict preset with these tools; one after the other, never two.

        Raises:
            UnavailableError: as a run that cannot start.
        """
        profile = _with_time(profile or self.profile, self.slow)
        policy = compile_policy(from_mapping({"preset": "strict", "tools": dict(tools)}))
        request = RunRequest(
            prompt=prompt,
            workspace=str(workspace),
            permission_mode=mode,
            timeout_seconds=min(seconds * self.slow, profile.limits.wall_seconds),
            resume=resume,
        )
        before = len(self.simulator.requests)
        result = await attempt(
            self.station,
            replace(policy, sandbox=profile),
            request,
            control=RunControl(),
            on_message=lambda _: None,
        )
        return self._seen(result, self.simulator.requests[before:])

    def _seen(self, result: RunResult, requests: Sequence[Any]) -> Act:
        with AuditReader(self.station.config.state_dir / "audit") as reader:
            records = [dict(record) for record in reader.all_events(result.run_id)]
        return Act(
            result=result,
            results=[text for request in requests for text in _results(request.body)],
            sent=json.dumps([request.body for request in requests]),
            headers=json.dumps([dict(request.headers) for request in requests]),
            records=records,
            slow=self.slow,
        )


def _with_time(profile: SandboxProfile, slow: float) -> SandboxProfile:
    """The same with limits of time that a slow technology can keep."""
    wall, tool = profile.limits.wall_seconds * slow, profile.limits.tool_seconds * slow
    return replace(profile, limits=replace(profile.limits, wall_seconds=wall, tool_seconds=tool))


@asynccontextmanager
async def theatre(
    place: Path,
    make_backend: MakeBackend,
    profile: SandboxProfile,
    claude: Path | None,
    scenario: Scenario,
    key: str,
) -> AsyncIterator[Theatre]:
    """Everything in a directory of the caller's, and ended on leaving; `key` is the credential that
    egress holds.

    Raises:
        UnavailableError: as a worker that cannot start.
    """
    async with AsyncExitStack() as stack:
        simulator = stack.enter_context(Simulator(scenario))
        config = Config(
            state_dir=place / "state",
            providers={"anthropic": Provider(base_url=simulator.base_url)},
            claude=claude,
        )
        launcher = Launcher(
            config=config,
            make_backends=lambda found: Backends(
                {profile.isolation: lambda: make_backend(found.state_dir)}
            ),
            environment_key=key,
        )
        # nobody is there to be asked: what is not granted is denied
        station = await stack.enter_async_context(launcher.station(DenyApprover()))
        slow = await asyncio.to_thread(patience, make_backend(config.state_dir))
        yield Theatre(place=place, profile=profile, station=station, simulator=simulator, slow=slow)


def _results(body: Any) -> list[str]:
    """Answers of tools in the last message of a request; earlier ones were in those before it."""
    if not isinstance(body, dict) or not body.get("messages"):
        return []
    content = body["messages"][-1].get("content")
    if not isinstance(content, list):
        return []
    return [
        json.dumps(block.get("content"))
        for block in content
        if isinstance(block, dict) and block.get("type") == "tool_result"
    ]
