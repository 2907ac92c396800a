"""One attempt of a run, from the first record to the last: the only orchestrator there is.

Order matters, and each step is undone in reverse whatever happens: record the start, open the
egress socket, start the sandbox, drive the agent, kill everything, read the changes, settle the
usage, record the end. The end is recorded even when the start failed half-way.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ringfence.errors import AgentError, CallerError, DeniedError, RingfenceError, UnavailableError
from ringfence.model import RunRequest, RunResult, RunStatus, Usage, WorkspaceMode
from ringfence.policy.compiled import CompiledPolicy
from ringfence.record.events import RunEnded, RunStarted, SandboxStarted, SandboxStopped
from ringfence.sandbox.protocol import Changes, Sandbox, SandboxSpec
