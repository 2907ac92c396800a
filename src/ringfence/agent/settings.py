"""What is fixed when `claude` starts."""

from __future__ import annotations

from dataclasses import dataclass

from ringfence.agent.pending import custom_names
from ringfence.model import CustomTool, PermissionMode
from ringfence.policy.compiled import ToolGrants
from ringfence.policy.tools import canonical_tool


@dataclass(frozen=True, kw_only=True)
class ClaudeSettings:
    """One process: whose it is, what it may, and the options that become its command line.

    Attributes:
        defer: a question ends the turn; somebody outside answers it later.
        ask_tools: tools that are always asked about; `*` is all.
        custom_tools: executed by the caller, always deferred.
        approval_seconds: how long a deferred call may wait.
        pending_tools: whose calls the session waits for.
        trace: a TRACEPARENT of a trace of its own; empty for none.
    """

    session_id: str
    run_id: str
    sandbox_id: str
    grants: ToolGrants
    mode: PermissionMode
    model: str | None = None
    fallback_model: str | None = None
    system_prompt: str | None = None
    max_turns: int | None = None
    max_budget_usd: float | None = None
    tool_seconds: float = 120.0
    start_seconds: float = 60.0
    resume: bool = False
    effort: str | None = None
    defer: bool = False
    ask_tools: tuple[str, ...] = ()
    custom_tools: tuple[CustomTool, ...] = ()
    approval_seconds: float = 86_400.0
    pending_tools: tuple[str, ...] = ()
    trace: str = ""

    @property
    def own_mode(self) -> PermissionMode:
        """What `claude` itself is started in: the mode, decided on out here, or where calls are
        deferred one in which it asks about what the hook has not allowed. It ignores `defer` for
        a call that came in one message with another (measured, CLI 2.1.330), and would go on as
        its mode says.
        """
        if not self.defer or self.mode is PermissionMode.PLAN:
            return self.mode
        return PermissionMode.DEFAULT

    @property
    def always_asked(self) -> tuple[str, ...]:
        """Offered tools that no mode and no preapproval allows by itself; and those whose calls
        are taken up again, perhaps before `claude` knows of the hook.
        """
        custom = custom_names(self.custom_tools) | set(self.pending_tools)
        return tuple(name for name in self.grants.offered if name in custom or self._listed(name))

    def asks(self, name: str) -> bool:
        """Whether a call of a tool needs somebody's word whatever the policy says."""
        return self._listed(name) or self.custom(name)

    def custom(self, name: str) -> bool:
        """Whether the caller executes it."""
        return name in custom_names(self.custom_tools)

    def _listed(self, name: str) -> bool:
        asked = {canonical_tool(each) for each in self.ask_tools}
        return "*" in asked or canonical_tool(name) in asked

    @property
    def ids(self) -> dict[str, str]:
        """The fields that every event of this process carries."""
        return {
            "run_id": self.run_id,
            "session_id": self.session_id,
            "sandbox_id": self.sandbox_id,
        }
