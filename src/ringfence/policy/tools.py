"""The tools that `claude` knows, and what each can do: the one table of it. PURE.

Read from the wire of the pinned CLI (2.1.330: the `tools` array of a request, with and without
`--tools`); names of older versions that documents still use are kept and marked, so that a deny
of one is not a spelling mistake. A name that is not here does not load.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Tool:
    """What one tool can do, in the worst reading.

    Attributes:
        name: as a policy, the SDK's `tools` option and its hooks write it.
        wire: names that the same tool has in a request's `tools` and an answer's `tool_use`.
        runs_programs: starts, or steers, a program of the agent's choice.
        network: reaches past the sandbox, or has the provider do so.
        writes: changes files of the workspace.
        path_key: the input field that names the file it touches; empty when it touches none.
        server_tool: prefix of the server-side tool type that the CLI needs for it.
        present: whether the pinned CLI has it.
        dangerous: why it is refused whatever a policy says; empty for a tool that may be granted.
    """

    name: str
    wire: tuple[str, ...] = ()
    runs_programs: bool = False
    network: bool = False
    writes: bool = False
    path_key: str = ""
    server_tool: str = ""
    present: bool = True
    dangerous: str = ""

    @property
    def wire_names(self) -> tuple[str, ...]:
        """Every name that the tool has on the wire."""
        return self.wire or (self.name,)

    @property
    def read_only(self) -> bool:
        """Whether it can neither write, run a program nor reach out."""
        return not (self.writes or self.runs_programs or self.network)


_CROSS_SESSION = "it talks to other sessions of the host through sockets, past every rule here"
_OUTLIVES = "it schedules work that outlives the run, past the run's limits"

_TABLE = (
    # files
    Tool(name="Read", path_key="file_path"),
    Tool(name="Glob", path_key="path"),
    Tool(name="Grep", path_key="path"),
    Tool(name="LS", path_key="path", present=False),
    Tool(name="NotebookRead", path_key="notebook_path", present=False),
    Tool(name="Edit", writes=True, path_key="file_path"),
    Tool(name="Write", writes=True, path_key="file_path"),
    Tool(name="MultiEdit", writes=True, path_key="file_path", present=False),
    Tool(name="NotebookEdit", writes=True, path_key="notebook_path"),
    Tool(name="LSP", runs_programs=True, path_key="filePath", present=False),
    # programs
    Tool(name="Bash", runs_programs=True, writes=True),
    Tool(name="BashOutput", runs_programs=True, present=False),
    Tool(name="KillShell", runs_programs=True, present=False),
    Tool(name="KillBash", runs_programs=True, present=False),
    Tool(name="PowerShell", runs_programs=True, writes=True, present=False),
    Tool(name="REPL", runs_programs=True, writes=True, present=False),
    Tool(name="Monitor", runs_programs=True, network=True),
    Tool(name="TaskOutput", runs_programs=True, present=False),
    Tool(name="TaskStop", runs_programs=True),
    Tool(name="Workflow", runs_programs=True, writes=True),
    Tool(name="EnterWorktree", runs_programs=True, writes=True),
    Tool(name="ExitWorktree", runs_programs=True, writes=True),
    # the model's own book-keeping; with CLAUDE_CODE_ENABLE_TASKS=0 the CLI has TodoWrite, by
    # default the four Task tools in its place
    Tool(name="TodoWrite"),
    Tool(name="TaskCreate"),
    Tool(name="TaskGet"),
    Tool(name="TaskList"),
    Tool(name="TaskUpdate"),
    Tool(name="ReportFindings"),
    # the person
    Tool(name="AskUserQuestion"),
    Tool(name="EnterPlanMode"),
    Tool(name="ExitPlanMode"),
    # Subagents have the same grants and the same witnesses. The CLI's init message and the SDK
    # say Task, the wire says Agent.
    Tool(name="Task", wire=("Agent", "Task")),
    # a skill's text may hold commands that run while it is loaded (!`…`)
    Tool(name="Skill", runs_programs=True),
    Tool(name="ToolSearch"),
    # MCP
    Tool(name="ListMcpResourcesTool"),
    Tool(name="ReadMcpResourceTool"),
    # network
    Tool(name="WebFetch", network=True),
    Tool(name="WebSearch", network=True, server_tool="web_search_"),
    # never
    Tool(name="SendMessage", dangerous=_CROSS_SESSION),
    Tool(name="ListAgents", dangerous=_CROSS_SESSION),
    Tool(name="RemoteTrigger", network=True, dangerous=_CROSS_SESSION),
    Tool(name="PushNotification", network=True, dangerous=_CROSS_SESSION),
    Tool(name="CronCreate", dangerous=_OUTLIVES),
    Tool(name="CronDelete", dangerous=_OUTLIVES),
    Tool(name="CronList", dangerous=_OUTLIVES),
    Tool(name="ScheduleWakeup", dangerous=_OUTLIVES),
)

ALIASES = {"Agent": "Task"}
"""Other names of a tool, to the one that policies use."""

KNOWN = {tool.name: tool for tool in _TABLE}
"""Every tool by name."""

DEFAULT_OFFERED = ("Read", "Glob", "Grep", "Edit", "Write", "TodoWrite")
"""Offered when a policy has no tools section; Bash and the web tools join by the execution
section's own words."""

DEFAULT_PREAPPROVED = ("Read", "Glob", "Grep", "TodoWrite")
"""Of those, what asks nobody."""

PLAN_TOOLS = frozenset(
    {
        *("Read", "Glob", "Grep", "LS", "NotebookRead", "ReportFindings"),
        *("TodoWrite", "TaskCreate", "TaskGet", "TaskList", "TaskUpdate"),
        *("ExitPlanMode", "EnterPlanMode", "AskUserQuestion", "ToolSearch"),
    }
)
"""What may run in mode `plan`: nothing that could write, by itself or through a child."""

EDIT_TOOLS = frozenset({"Edit", "Write", "MultiEdit", "NotebookEdit"})
"""Tools that write the one file their input names."""

WIRE_HELPERS = ("DeferredToolPlaceholder",)
"""Tools that the CLI itself puts into a request beside those it was given: an empty placeholder
that keeps the prompt cache stable. It has no effect when it is called, and it is granted on the
wire only, never to the agent. ToolSearch is not among them: with an explicit tool list the CLI
does not send it."""

SERVER_TOOLS = {
    "web_search": "web_search_",
    "web_fetch": "web_fetch_",
    "code_execution": "code_execution_",
    "tool_search": "tool_search_tool_",
}
"""What a policy may name under `model.server_tools`, to the type prefix on the wire."""

_MCP = re.compile(
    r"mcp__(?P<server>[A-Za-z0-9-]+(?:_[A-Za-z0-9-]+)*)__(?P<tool>[A-Za-z0-9_-]{1,64})"
)


def canonical_tool(name: str) -> str:
    """The name that policies use; a name without an alias is returned as it is."""
    return ALIASES.get(name, name)


def mcp_parts(name: str) -> tuple[str, str] | None:
    """Server and tool of `mcp__server__tool`; None for any other name."""
    match = _MCP.fullmatch(name)
    return (match["server"], match["tool"]) if match else None
