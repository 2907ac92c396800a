"""The nouns of the road: frozen values without I/O."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class WorkspaceMode(StrEnum):
    """How the agent sees the workspace."""

    REVIEW = "review"
    """A copy-on-write view; the result is a patch, and nothing is written to the host's tree."""
    DIRECT = "direct"
    """The host's directory itself, read and write."""
    READONLY = "readonly"
    """The host's directory, read only."""


class PermissionMode(StrEnum):
    """Who may say yes to a tool call; names and meanings are the Agent SDK's."""

    DEFAULT = "default"
    ACCEPT_EDITS = "acceptEdits"
    PLAN = "plan"
    DONT_ASK = "dontAsk"
    BYPASS = "bypassPermissions"
    AUTO = "auto"


class Outcome(StrEnum):
    """What a decision says. There is no third value: unknown is DENY."""

    ALLOW = "allow"
    DENY = "deny"


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """The answer to one question put to a policy.

    Attributes:
        outcome: ALLOW or DENY.
        rule: dotted path of the line that decided, such as `network.allowed_hosts[0]`;
            `default` when no line matched.
        reason: machine-readable tag in kebab-case, such as `host-not-allowed`.
    """

    outcome: Outcome
    rule: str
    reason: str

    @property
    def allowed(self) -> bool:
        """Whether the outcome is ALLOW."""
        return self.outcome is Outcome.ALLOW


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """What one model request or one run used.

    Tokens are counted from the wire by the egress process; dollars are priced from the table in
    `ringfence.egress` unless the upstream is unknown, when `cost_usd` is None.
    """

    input_tokens: int = 0
    output_tokens: int = 0
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int = 0
    requests: int = 0
    cost_usd: float | None = 0.0

    def __add__(self, other: Usage) -> Usage:
        """Sum of two usages; an unknown cost stays unknown."""
        known = self.cost_usd is not None and other.cost_usd is not None
        return Usage(
            input_tokens=self.input_tokens + other.input_tokens,
            output_tokens=self.output_tokens + other.output_tokens,
            cache_creation_input_tokens=self.cache_creation_input_tokens
            + other.cache_creation_input_tokens,
            cache_read_input_tokens=self.cache_read_input_tokens + other.cache_read_input_tokens,
            requests=self.requests + other.requests,
            cost_usd=(self.cost_usd or 0.0) + (other.cost_usd or 0.0) if known else None,
        )


class RunStatus(StrEnum):
    """Where a run stands; the last four are ends. The moves between them: `ringfence.states`."""

    QUEUED = "queued"
    LEASED = "leased"
    """A worker holds the right to it; nothing of it has been done."""
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


class AttemptStatus(StrEnum):
    """Where one try of a run stands."""

    STARTED = "started"
    SETTLED = "settled"
    """Its worker told what came of it, be it an end, an error or the run handed back."""
    LOST = "lost"
    """Its worker fell silent, and the run was taken from it."""


class SessionStatus(StrEnum):
    """Where a session stands; the words are the public API's."""

    IDLE = "idle"
    """It waits for its caller."""
    RUNNING = "running"
    """A turn is queued or being carried out."""
    RESCHEDULING = "rescheduling"
    """An attempt came to no end; the turn waits for the next one."""
    TERMINATED = "terminated"
    """Nothing is taken any more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """The execution of one user turn, as the queue knows it. Times are seconds since the epoch.

    Attributes:
        priority: 1 is served first, 5 last.
        attempt: number of the latest attempt, 0 before the first; it is the fencing token, and
            only ever grows.
        failures: attempts since the last replay that raised or were lost.
        dead: in the dead letters: it failed because its attempts were used up.
        reason: one line, why it was put back or failed; empty after success.
    """

    run_id: str
    tenant: str
    priority: int
    status: RunStatus
    attempt: int
    failures: int
    dead: bool
    reason: str
    submitted: float
    changed: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """One try of a run: one lease, one sandbox.

    Attributes:
        number: from 1, growing; what an attempt writes is void once there is a higher one.
        worker: who held the lease.
        ended: seconds since the epoch; None while it is STARTED.
    """

    run_id: str
    number: int
    worker: str
    status: AttemptStatus
    started: float
    ended: float | None


class CallKind(StrEnum):
    """What a call waits for."""

    CONFIRMATION = "confirmation"
    """A person's word; then the agent's own tool runs."""
    CUSTOM = "custom"
    """The result of a tool that the caller executes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CustomTool:
    """A tool that the caller executes; the model is offered it under this very name.

    Attributes:
        input_schema: JSON Schema of an object; the model reads it, nobody here interprets it.
    """

    name: str
    description: str
    input_schema: dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class PendingCall:
    """A tool call that ended its run, because somebody outside has to answer it first.

    Attributes:
        name: as the caller knows it: a custom tool by its own name.
        expires: seconds since the epoch; what is answered then or later is a denial.
    """

    tool_use_id: str
    name: str
    input: dict[str, Any]
    kind: CallKind
    expires: float


@dataclass(frozen=True, kw_only=True, slots=True)
class CallAnswer:
    """What somebody outside says to a pending call. The default is no.

    Attributes:
        allow, message: of a confirmation; the message is told to the agent when it is no.
        input: what the tool gets in place of the model's own input; None leaves it.
        content: of a custom tool: `text` and `image` blocks as the Messages API has them.
        is_error: whether the content tells of a failure.
        at: seconds since the epoch, when the answer was taken; None is now.
    """

    tool_use_id: str
    allow: bool = False
    message: str = ""
    input: dict[str, Any] | None = None
    content: tuple[dict[str, Any], ...] | None = None
    is_error: bool = False
    at: float | None = None


Prompt = str | tuple[Mapping[str, Any], ...]
"""The user's turn: a text, or blocks of the Messages API where it is more than that."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRequest:
    """What a caller asks for: one user turn of an agent, or one command, in a sandbox.

    Attributes:
        prompt: the user's turn; for a command, the TASK in its environment.
        content: the user's turn as blocks, where it is more than text: texts, and images and
            documents in base64. `prompt` is what of it is text.
        workspace: absolute path of a directory of the host.
        command: argv to run instead of `claude`; empty for the agent.
        prompt_id: UUID that the turn has in the transcript; None has one made.
        resume: session to go on with; None starts a new one.
        session_id: UUID of a session that is started; None has one made.
        effort: how hard the model works, `low` to `max`; None leaves it to `claude`.
        timeout_seconds: wall clock of the run; None takes the policy's. It can only shorten.
        max_budget_usd: dollars of the run; None takes the policy's. It can only lower.
        isolation: technology in place of the policy's; at least as strong.
        defer: a question to a person ends the run and makes a pending call, and nobody is asked.
        ask_tools: names of tools that are never called without a person's word, whatever the
            policy preapproves; `*` is all of them.
        custom_tools: offered beside the policy's tools; they need `defer`.
        approval_seconds: how long a call may be pending before no answer is a denial.
        pending: what the session waits for, as the result of its last run had it.
        answers: to those calls; a pending call without one stays pending.
        batch: nobody waits for it: where models are limited, others' requests go first.
    """

    prompt: str
    workspace: str
    content: tuple[Mapping[str, Any], ...] = ()
    command: tuple[str, ...] = ()
    workspace_mode: WorkspaceMode | None = None
    permission_mode: PermissionMode | None = None
    model: str | None = None
    fallback_model: str | None = None
    system_prompt: str | None = None
    max_turns: int | None = None
    max_budget_usd: float | None = None
    timeout_seconds: float | None = None
    resume: str | None = None
    fork: bool = False
    batch: bool = False
    environment: tuple[tuple[str, str], ...] = ()
    isolation: str | None = None
    prompt_id: str | None = None
    session_id: str | None = None
    effort: str | None = None
    defer: bool = False
    ask_tools: tuple[str, ...] = ()
    custom_tools: tuple[CustomTool, ...] = ()
    approval_seconds: float = 86_400.0
    pending: tuple[PendingCall, ...] = ()
    answers: tuple[CallAnswer, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    """What a run leaves.

    Attributes:
        run_id: `run_` and 26 characters of Crockford base 32, sortable by time.
        session_id: UUID of the Agent SDK's session; empty for a command.
        status: how it ended.
        text: the agent's last answer; for a command, its standard output.
        errors: one line each; for a command, its standard error is `stderr`.
        patch: unified diff with git's extended headers; empty when nothing changed.
        host_files: changed files that would run on the host later; applied only when named.
        left_out: what the agent changed and the patch does not hold, or not against the host's
            file of today: path, colon, reason.
        unenforced: controls that the policy accepts without enforcement on this host.
        audit_index: index of the run's last record in the audit log.
        pending: calls that the agent made and that wait for an answer; the session goes on by a
            run that resumes it with these and with the answers.
    """

    run_id: str
    session_id: str
    status: RunStatus
    text: str = ""
    stderr: str = ""
    exit_code: int = 0
    errors: tuple[str, ...] = ()
    usage: Usage = field(default_factory=Usage)
    num_turns: int = 0
    duration_seconds: float = 0.0
    patch: bytes = b""
    changed_files: tuple[str, ...] = ()
    host_files: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    hidden_files: tuple[str, ...] = ()
    unenforced: tuple[str, ...] = ()
    audit_index: int = -1
    pending: tuple[PendingCall, ...] = ()
    error: dict[str, Any] | None = None
