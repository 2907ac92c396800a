"""The catalogue: every event the audit log may hold, one class each. PURE.

An event's `type` is stable; fields are only ever added. No field holds a credential, a prompt, a
tool input or an output: names, sizes, keyed hashes and decisions only (requirement K).
`docs/reference/events.md` is generated from this file.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

Name = Annotated[str, Field(max_length=128, pattern="^[ -~]*$")]
"""An id that we made: printable ASCII, so that it can be a key and a column anywhere."""


class Event(BaseModel):
    """Base of all events. `run_id`, `session_id` and `sandbox_id` are empty where none applies."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run_id: Name = ""
    session_id: Name = ""
    sandbox_id: Name = ""


class RunStarted(Event):
    """A run began: what was asked, by digest, and under which policy."""

    type: Literal["run.started"] = "run.started"
    kind: Literal["claude", "command"]
    policy_digest: str
    role: str
    permission_mode: str
    workspace_mode: str
    prompt_hmac: str
    unenforced: list[str] = []
    resumed_from: str = ""


class RunEnded(Event):
    """A run ended, whatever the way."""

    type: Literal["run.ended"] = "run.ended"
    status: str
    exit_code: int
    duration_ms: float
    requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int = 0
    cost_usd: float | None = None
    reason: str = ""


class RunLost(Event):
    """The recorder says: whoever carried the run out is gone, and did not say how it ended."""

    type: Literal["run.lost"] = "run.lost"
    reason: str


class SandboxStarted(Event):
    """A sandbox is up; `controls` is what the kernel said, not what flags asked. A `warm` one was
    started before its run, which it is handed to by this record, and waited `waited_ms`.

    One that several agents share says for how many (`seats`), and is of no run; each seat has such
    a record, too, and is `within` the one of that id.

    `image` is the digest of the image that is the system inside, empty for the host's own.
    `reason` is why `auto` took this technology, `threat_model` what the policy declares, and
    `not_held` are the clauses of the sandbox contract that it says it does not hold.
    """

    type: Literal["sandbox.started"] = "sandbox.started"
    isolation: str
    controls: dict[str, bool]
    hidden_files: int = 0
    image: str = ""
    reason: str = ""
    threat_model: str = ""
    not_held: list[str] = Field(default_factory=list)
    warm: bool = False
    waited_ms: float = 0.0
    within: str = ""
    seats: int = 0


class SandboxStopped(Event):
    """No process of the sandbox is alive, nor in any of its seats; for the reason `rests` they are
    frozen instead, until the session's next turn or another such record, and have no way out.
    `memory_kills` counts what the host's kernel killed in it, in this run, at its memory limit.
    """

    type: Literal["sandbox.stopped"] = "sandbox.stopped"
    reason: str = ""
    memory_kills: int = 0


TOOL_SHUT = "tool-breaker"
"""Rule of a call that was kept from a tool by its breaker."""


class ToolDecisionMade(Event):
    """The worker allowed or denied a tool call, or deferred it: the run ends, and somebody outside
    answers. `given_hmac` is of the input that a person put in place of the model's own.
    """

    type: Literal["tool.decided"] = "tool.decided"
    tool_use_id: str
    name: str
    input_hmac: str
    outcome: Literal["allow", "deny", "defer"]
    rule: str
    decided_by: Literal["policy", "person", "mode"]
    given_hmac: str = ""


class ToolFinished(Event):
    """An allowed tool call ended, as `claude` reports it (one witness); `unknown` when the run
    ended and it had not.
    """

    type: Literal["tool.finished"] = "tool.finished"
    tool_use_id: str
    name: str
    input_hmac: str
    duration_ms: float
    outcome: Literal["success", "failure", "timeout", "interrupted", "unknown"]


class ToolRequested(Event):
    """The model asked for a tool call, as read from the wire (the other witness)."""

    type: Literal["tool.requested"] = "tool.requested"
    tool_use_id: str
    name: str
    input_hmac: str
    complete: bool = True


class WitnessDisagreed(Event):
    """A tool result on the wire that the worker did not allow (requirement B)."""

    type: Literal["witness.disagreed"] = "witness.disagreed"
    tool_use_id: str
    reason: str


class ModelRequested(Event):
    """Write-ahead: a model request is about to carry the platform's credential."""

    type: Literal["model.requested"] = "model.requested"
    request_id: str
    provider: str
    model: str
    path: str
    body_bytes: int
    credential: str


class ModelAnswered(Event):
    """A model request ended. Tokens from the wire; `billed` is False for counting tokens alone."""

    type: Literal["model.answered"] = "model.answered"
    request_id: str
    model: str
    status: int
    duration_ms: float
    input_tokens: int = 0
    output_tokens: int = 0
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int = 0
    cost_usd: float | None = None
    stop_reason: str = ""
    reason: str = ""
    billed: bool = True


class UsageDiffered(Event):
    """`claude` reported other tokens for a run than the wire had. The wire's are what counts; the
    `claimed_…` are the word of somebody inside.
    """

    type: Literal["usage.differed"] = "usage.differed"
    input_tokens: int
    output_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    cost_usd: float | None = None
    claimed_input_tokens: int
    claimed_output_tokens: int
    claimed_cache_creation_input_tokens: int
    claimed_cache_read_input_tokens: int
    claimed_cost_usd: float | None = None


class BudgetAlerted(Event):
    """A request brought a budget that runs share to its alert; the first that did, and no other.

    `budget` is its name, whose it is, and its period. A limit that is not set is null.
    """

    type: Literal["budget.alerted"] = "budget.alerted"
    budget: str
    spent_usd: float
    limit_usd: float | None = None
    spent_tokens: int
    limit_tokens: float | None = None
    alert: float


class ModelRetried(Event):
    """A try of a model request came to nothing, and nothing of it reached the agent: another
    follows after `wait_ms`, of the same provider and model or, without `same`, of the next.
    """

    type: Literal["model.retried"] = "model.retried"
    request_id: str
    reason: str
    same: bool
    wait_ms: float


class ModelMoved(Event):
    """A session's requests go to another provider or model from now on, or back.

    `reason`: `failed` here, `breaker` where others failed, `limit` of the fleet, or `returned`.
    """

    type: Literal["model.moved"] = "model.moved"
    provider: str
    model: str
    to_provider: str
    to_model: str
    reason: Literal["failed", "breaker", "limit", "returned"]


class BreakerChanged(Event):
    """A breaker opened, lets a probe through, or closed again; for all that share its store.

    `breaker` names what it stands before: `model/provider/model`, `mcp/tenant/server` or
    `tool/agent/version/tool`, with `@` and a digest of where its MCP server is; of one session
    alone with `session/` before it. `seconds` is how long one that opened stays so.
    """

    type: Literal["breaker.changed"] = "breaker.changed"
    breaker: str
    before: Literal["closed", "open", "half-open"]
    state: Literal["closed", "open", "half-open"]
    seconds: float = 0.0


class EgressAllowed(Event):
    """Write-ahead: a request or tunnel to an allowed host."""

    type: Literal["egress.allowed"] = "egress.allowed"
    host: str
    port: int
    method: str
    path: str
    rule: str
    credential: str = ""
    opaque: bool = False
    address: str = ""


class EgressRefused(Event):
    """A request from inside was refused. `count` above 1 stands for coalesced denials."""

    type: Literal["egress.refused"] = "egress.refused"
    target: str
    rule: str
    reason: str
    count: int = 1


class EgressEnded(Event):
    """An allowed request or tunnel ended."""

    type: Literal["egress.ended"] = "egress.ended"
    host: str
    port: int
    status: int = 0
    bytes_out: int = 0
    bytes_in: int = 0
    duration_ms: float = 0.0
    reason: str = ""


class CredentialResolved(Event):
    """Egress has the value of a credential from its source. `version` is the source's own name for
    it, and says nothing about it; `rotated` when it took the place of another. `scheme` is that of
    its reference.
    """

    type: Literal["credential.resolved"] = "credential.resolved"
    name: Name
    scheme: Name
    version: str = ""
    lease_seconds: float | None = None
    rotated: bool = False


class CredentialUnresolved(Event):
    """The source of a credential gave no value; `reason` is an error's code. What was had before
    is used for as long as it may be when the source does not answer, and no longer when it says no.
    """

    type: Literal["credential.unresolved"] = "credential.unresolved"
    name: Name
    scheme: Name
    reason: str


class KeeperEnded(Event):
    """The process that fetches secrets ended and was started again; `how` is its exit status or the
    signal. Something of the host ends it (its memory?), or somebody does.
    """

    type: Literal["keeper.ended"] = "keeper.ended"
    how: str


class SessionChanged(Event):
    """A session was resumed, forked or deleted by a person or a run."""

    type: Literal["session.changed"] = "session.changed"
    action: Literal["created", "resumed", "forked", "deleted"]
    parent: str = ""


class PatchApplied(Event):
    """Changes of review mode were written to the host's workspace."""

    type: Literal["patch.applied"] = "patch.applied"
    files: int
    host_files: int
    patch_sha256: str


class LogOpened(Event):
    """A recorder began to write; `recorder` names this one process."""

    type: Literal["log.opened"] = "log.opened"
    recorder: str


class LogClosed(Event):
    """A recorder drained and left in order. One that never says so was killed."""

    type: Literal["log.closed"] = "log.closed"
    recorder: str


class LogHeartbeat(Event):
    """The recorder is alive; silence is an alarm."""

    type: Literal["log.heartbeat"] = "log.heartbeat"
    recorder: str = ""


class LogClockSetBack(Event):
    """The host's clock went back by so much since the record ahead; times go on from here."""

    type: Literal["log.clock_set_back"] = "log.clock_set_back"
    seconds: float


class LogAnchored(Event):
    """Checkpoints come to where the settings want them: the first of a recorder, and the first
    after a failure. `size` is how many records it covers.
    """

    type: Literal["log.anchored"] = "log.anchored"
    recorder: str
    size: int


class LogAnchorFailed(Event):
    """A checkpoint did not get there, and none has since the last `log.anchored`."""

    type: Literal["log.anchor_failed"] = "log.anchor_failed"
    recorder: str
    size: int
    reason: str


class LogRefused(Event):
    """Events that a client sent and the catalogue does not know; none of their content is kept."""

    type: Literal["log.refused"] = "log.refused"
    client: str
    reason: str
    count: int = 1


class LogKeyRotated(Event):
    """The old public key stays verifiable because the log itself holds it."""

    type: Literal["log.key_rotated"] = "log.key_rotated"
    old_public_key: str
    new_public_key: str


AnyEvent = Annotated[
    RunStarted
    | RunEnded
    | RunLost
    | SandboxStarted
    | SandboxStopped
    | ToolDecisionMade
    | ToolFinished
    | ToolRequested
    | WitnessDisagreed
    | ModelRequested
    | ModelAnswered
    | UsageDiffered
    | BudgetAlerted
    | ModelRetried
    | ModelMoved
    | BreakerChanged
    | EgressAllowed
    | EgressRefused
    | EgressEnded
    | CredentialResolved
    | CredentialUnresolved
    | KeeperEnded
    | SessionChanged
    | PatchApplied
    | LogOpened
    | LogClosed
    | LogHeartbeat
    | LogClockSetBack
    | LogAnchored
    | LogAnchorFailed
    | LogRefused
    | LogKeyRotated,
    Field(discriminator="type"),
]

EVENTS: TypeAdapter[AnyEvent] = TypeAdapter(AnyEvent)
