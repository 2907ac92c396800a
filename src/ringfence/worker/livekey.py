"""Whether a `claude` that rests is the one that a session's next turn would start. PURE.

The key is taken from all of which its command line, its sandbox and its rights are made, field by
field: whatever is added to one of these makes another key, and a new sandbox. Left out is what
belongs to one turn and is told to egress anew for each: the run's name, and how much of the budget
is left (egress alone holds a live `claude` to it).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ringfence.agent.settings import ClaudeSettings
from ringfence.channel.messages import SealedCredential
from ringfence.model import WorkspaceMode
from ringfence.policy.compiled import CompiledPolicy, SandboxProfile
from ringfence.worker.warmkey import form_of

MACHINES = frozenset({"microvm"})
"""Technologies whose `freeze` stops the processors of a guest alone: outside it virtiofsd works off
what it was asked before, and may write to the workspace while the sandbox rests.
"""


def live_settings(settings: ClaudeSettings) -> ClaudeSettings:
    """What a `claude` is started with that is to stay. Its own count of the money would go on over
    turns that each have a budget of their own.
    """
    return replace(settings, max_budget_usd=None)


def live_key(
    settings: ClaudeSettings,
    policy: CompiledPolicy,
    *,
    agent: Mapping[str, Any],
    environment: Mapping[str, Any],
    resources: Sequence[Mapping[str, Any]],
    credentials: Sequence[SealedCredential],
    workspace: str,
    claude: str,
    ca_certificate: bytes | None,
) -> str:
    """SHA-256 (hex) of what `claude` is started with: the settings of the turn, a policy narrowed
    by its request, agent, environment and resources as the session has them (JSON), the sealed
    credentials of its vaults, the very directory (one made anew is another), the name of the
    binary's content, and the trust stores' addition.
    """
    own = replace(live_settings(settings), run_id="", sandbox_id="", resume=False, pending_tools=())
    limits = replace(policy.sandbox.limits, wall_seconds=0.0)
    fixed = {
        "settings": form_of(own),
        "policy": policy.digest,
        "sandbox": form_of(replace(policy.sandbox, limits=limits)),
        "agent": dict(agent),
        "environment": dict(environment),
        "resources": [dict(one) for one in resources],
        "credentials": sorted(one.model_dump_json() for one in credentials),
        "workspace": workspace,
        "claude": claude,
        "ca": hashlib.sha256(ca_certificate or b"").hexdigest(),
    }
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()


def shared_key(
    rules: SandboxProfile,
    *,
    tenant: str,
    environment_id: str,
    environment: Mapping[str, Any],
    isolation: str,
    claude: str,
    ca_certificate: bytes | None,
) -> str:
    """SHA-256 (hex) of what sessions must have alike to sit in one sandbox. `environment` is its
    body as of the turn; `rules` are what its policy and its technology make of it for the place,
    narrowed; `claude` names the binary's content. Agents may differ: their tools, hosts and
    credentials are their seat's, decided outside.
    """
    limits = replace(rules.limits, wall_seconds=0.0)
    fixed = {
        "tenant": tenant,
        "environment": [environment_id, dict(environment)],
        "rules": form_of(replace(rules, limits=limits)),
        "isolation": isolation,
        "claude": claude,
        "ca": hashlib.sha256(ca_certificate or b"").hexdigest(),
    }
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()


def obstacle(policy: CompiledPolicy) -> str | None:
    """Why a session's `claude` cannot stay between two of its turns; None when it can.

    In review mode the changes are read when every process is dead (requirement F), and are then
    part of what lies below the view: the next turn needs a new one. An MCP server of a host is
    connected when `claude` starts, by the way out that is closed between turns. What `auto` comes
    to is known to the attempt alone, which asks for `MACHINES` itself.
    """
    if policy.sandbox.isolation in MACHINES:
        return "what serves a machine's files does not stand still with it"
    if policy.sandbox.workspace_mode is WorkspaceMode.REVIEW:
        return "a workspace in review mode is read when every process is dead"
    remote = [server.name for server in policy.tools.mcp_servers if not server.command]
    if remote:
        return f"the connection to {', '.join(remote)} does not outlive a turn"
    return None
