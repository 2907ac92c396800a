"""Messages between the worker and the egress process. Frozen; unknown types and keys are refused.

Requests carry `id`; each is answered by `Ack` or `Refused` with the same id. Notices flow from
egress to the worker unasked, and turns to egress.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from ringfence.errors import DeniedError


class Message(BaseModel):
    """Base of all messages."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        hide_input_in_errors=True,
        # Infinity stays what it is; null would be another value
        ser_json_inf_nan="constants",
    )


class ProviderConfig(Message):
    """An upstream of the Messages API, from the operator's settings only.

    Attributes:
        base_url: scheme, host and optional port and path prefix; http and loopback are allowed
            here and nowhere else.
        credential: name of the secret in the vault (`anthropic` by default), or `environment`
            for the value in `Configure.environment_credential`; None sends none.
        header: header that carries it: `x-api-key`, or `authorization` with Bearer.
        kind: what it speaks; region, project and models are of a cloud.
        login: the credential is one that the keeper logs in for, and not a value of a header.
        renews: such a credential is another one when it is asked for again.
    """

    base_url: str = "https://api.anthropic.com"
    credential: str | None = "anthropic"
    header: Literal["x-api-key", "authorization"] = "x-api-key"
    kind: Literal["anthropic", "bedrock", "vertex"] = "anthropic"
    region: str = ""
    project: str | None = None
    models: dict[str, str] = {}
    login: bool = False
    renews: bool = False


class Configure(Message):
    """First message to egress; descriptor 0 of it, when present, is a recorder connection."""

    type: Literal["configure"] = "configure"
    id: int
    providers: dict[str, ProviderConfig]
    vault_path: str | None = None
    key_path: str | None = None
    opens_tenants: bool = False
    """Keep the private key, to open what `OpenSandbox.credentials` brings."""
    environment_credential: str | None = Field(default=None, repr=False)
    secrets: dict[str, Any] = {}
    """`SecretSettings` as JSON: where values lie, and none of them; empty when none does."""
    logins: dict[str, Any] = {}
    """`AwsLogin` and `GoogleLogin` as JSON by the name of their credential, with `region`."""
    state_dir: str = ""
    ca_dir: str | None = None
    resolver_overrides: dict[str, list[str]] = {}
    upstream_overrides: dict[str, str] = {}
    """`host:port` to `address:port`, with `ca_file` of `upstream_ca`: for tests and benchmarks
    whose upstreams live on loopback; only ever set from the operator's settings."""
    upstream_ca: str | None = None
    drop_to_uid: int | None = None
    asks_for_turns: bool = False
    """Model requests leave when `ModelTurn` says so, which `ModelWanted` asks for."""
    limited: bool = False
    """A provider's 429 is waited out in the queue of the fleet's limits."""
    retry_seconds: tuple[float, float, float] = (0.5, 20.0, 120.0)
    """Of tries of a model request: the first bound of a wait, the longest, and all together."""
    wait_for_audit: bool = True
    """False only in benchmarks, to measure the write-ahead apart."""


class PendingToolUse(BaseModel):
    """A call that the wire showed to another egress process: asked for, and not decided."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    tool_use_id: str
    name: str
    input_sha256: str
    input_place: str = Field(default="", max_length=4096)


class SealedCredential(Message):
    """A tenant's credential on its way from the store to egress. Nobody between can open it.

    Attributes:
        host: the only one that it is sent to, at port 443.
        expires_at: microseconds since 1970; past it nothing is injected.
        key_id: name of the public key that it is sealed to.
        sealed: opens only with all of these and the sandbox's tenant as they were when it was set.
    """

    vault_id: str
    credential_id: str
    host: str
    expires_at: int | None = None
    key_id: str
    sealed: str = Field(repr=False)


class OpenSandbox(Message):
    """Serve one sandbox. Descriptors: the listening unix socket, then the loopback listener."""

    type: Literal["open_sandbox"] = "open_sandbox"
    id: int
    sandbox_id: str
    run_id: str
    session_id: str
    rules: dict[str, Any]
    """`EgressRules` as JSON (ringfence.policy.compile.egress_to_json)."""
    known_tool_uses: list[str] = []
    """Ids of the materialised transcript: their results may appear in a request's history."""
    pending_tool_uses: list[PendingToolUse] = []
    """Of those, the ones that an earlier run asked about and that this one may decide."""
    tenant: str = ""
    """Whose session it is: a credential of anybody else does not open."""
    credentials: list[SealedCredential] = []
    """By id; `rules` say where each goes (ringfence.policy.binding)."""
    batch: bool = False
    """Its model requests stand behind those of runs that somebody waits for."""


class AddListener(Message):
    """One more listener for a sandbox (descriptor 0): the loopback listener comes late, because
    its network namespace is made by the sandbox.
    """

    type: Literal["add_listener"] = "add_listener"
    id: int
    sandbox_id: str


class ToolDecided(Message):
    """What the worker decided about a tool call, before the tool may run (requirement B).

    Refused with `witness-violated` when the wire knows another call.

    Attributes:
        input_sha256: digest of the input that was decided about, in the form of
            `ringfence.policy.call_input`.
        input_place: its path or leading `cd`, of the same form.
        deferred: not allowed now, and a person will be asked about it: so the wire must know it.
    """

    type: Literal["tool_decided"] = "tool_decided"
    id: int
    sandbox_id: str
    tool_use_id: str
    name: str
    input_sha256: str
    input_place: str = Field(default="", max_length=4096)
    allowed: bool
    deferred: bool = False


class CloseSandbox(Message):
    """Stop serving; answered by `Ack` whose `detail` holds the final usage."""

    type: Literal["close_sandbox"] = "close_sandbox"
    id: int
    sandbox_id: str


class Ack(Message):
    """Done."""

    type: Literal["ack"] = "ack"
    id: int
    detail: dict[str, Any] = {}


class Refused(Message):
    """Not done: a RingfenceError's `to_json`."""

    type: Literal["refused"] = "refused"
    id: int
    error: dict[str, str]


class EgressDenied(Message):
    """Notice: egress refused something from inside."""

    type: Literal["egress_denied"] = "egress_denied"
    sandbox_id: str
    reason: str
    target: str
    rule: str = ""


class ModelCalled(Message):
    """Notice: a request left for the model, and, with `over`, what came of it.

    `model` is the one that was asked for, then the one that answered.
    """

    type: Literal["model_called"] = "model_called"
    sandbox_id: str
    request_id: str
    over: bool = False
    provider: str = ""
    model: str = ""
    status: int = 0
    stop_reason: str = ""
    input_tokens: int = 0
    output_tokens: int = 0
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int = 0
    cost_usd: float | None = 0.0


class ModelLeg(BaseModel):
    """Where a model request may go: a provider, and the model there."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    provider: str
    model: str


class ModelWanted(Message):
    """Notice: a request would leave for the model, and waits for its `ModelTurn`.

    Attributes:
        ticket: its name, unique in the egress process.
        key: what keeps its place when the run is released and comes back.
        legs: where it may go, the first first. shut: places of those that it does not try again.
        again: place of the leg that this try would repeat; None for a first try of a leg.
        ends: no leg is left, and the run is put off.
        body_bytes, max_tokens: what it is estimated and priced by.
        worst_usd: the most that it can cost; None when its model has no price.
        waited: seconds for which it is held open already.
    """

    type: Literal["model_wanted"] = "model_wanted"
    sandbox_id: str
    run_id: str
    session_id: str
    tenant: str
    batch: bool
    ticket: int
    key: str
    legs: list[ModelLeg] = Field(min_length=1, max_length=16)
    shut: list[int] = []
    again: int | None = None
    ends: bool = False
    body_bytes: int
    max_tokens: int
    worst_usd: float | None
    waited: float


class ModelTurn(Message):
    """The answer to a `ModelWanted` or `GuardWanted`. It has no `Ack`: who asked has it, or left.

    Attributes:
        leg: place of the one to take, or, when `spent`, that the fleet cannot repeat now.
        wait: seconds after which to ask again; None is a refusal, and `reason` its tag.
    """

    type: Literal["model_turn"] = "model_turn"
    sandbox_id: str
    ticket: int
    go: bool
    leg: int = Field(default=0, ge=0, lt=16)
    spent: bool = False
    wait: float | None = Field(default=None, ge=0, le=3600)
    reason: str = Field(default="", max_length=128, pattern=r"^[a-z0-9-]*$")


class ModelHeard(Message):
    """Notice: the head of the provider's answer to what a `ModelWanted` asked for.

    Attributes:
        limits: what its headers say of limits, by name in lower case.
    """

    type: Literal["model_heard"] = "model_heard"
    sandbox_id: str
    ticket: int
    status: int
    limits: dict[str, str] = {}


class ModelBegan(Message):
    """Notice: the first of an answer to what a `ModelWanted` asked for has reached the client."""

    type: Literal["model_began"] = "model_began"
    sandbox_id: str
    ticket: int


class ModelUsed(Message):
    """Notice: what came of a `ModelWanted`, whether it was sent or gave up waiting.

    Attributes:
        status: HTTP status of the provider; 0 when there was no answer.
        used: the provider will charge for it.
        failed: the provider did, whoever had asked.
    """

    type: Literal["model_used"] = "model_used"
    sandbox_id: str
    ticket: int
    status: int = 0
    used: bool = False
    failed: bool = False
    input_tokens: int = 0
    output_tokens: int = 0
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int = 0
    cost_usd: float | None = None


class GuardWanted(Message):
    """Notice: a request would leave for an MCP server of the policy, `host:port` with a digest of
    its path where it has one, and waits for its `ModelTurn`: by that server's breaker.
    """

    type: Literal["guard_wanted"] = "guard_wanted"
    sandbox_id: str
    run_id: str
    session_id: str
    tenant: str
    ticket: int
    server: str = Field(max_length=280)


class GuardUsed(Message):
    """Notice: what came of it; `ok` is None where that says nothing of the server."""

    type: Literal["guard_used"] = "guard_used"
    sandbox_id: str
    run_id: str
    session_id: str
    tenant: str
    ticket: int
    server: str = Field(max_length=280)
    ok: bool | None


class PutOff(Message):
    """The worker tells itself: a sandbox's run would wait longer than its client does."""

    type: Literal["put_off"] = "put_off"
    sandbox_id: str
    seconds: float
    reason: str


class WitnessViolated(Message):
    """Notice: the wire and the worker disagree (requirement B). The worker ends the run."""

    type: Literal["witness_violated"] = "witness_violated"
    sandbox_id: str
    reason: str
    tool_use_id: str


_DISAGREED = {
    "tool-never-asked": "a decision was asked for about a call that the model never made",
    "tool-name-differs": "a decision was asked for about another tool than the model called",
    "tool-input-differs": "a decision was asked for about another input than the model gave",
    "tool-result-not-allowed": "the wire shows a result of a call that nobody allowed",
    "tool-result-never-asked": "the wire shows a result of a call that the model never made",
}


def witness_error(reason: str) -> DeniedError:
    """What ends a run whose two witnesses disagree (requirement B)."""
    return DeniedError(
        "witness-violated",
        f"{_DISAGREED.get(reason, 'the wire and the worker disagree')} ({reason})",
        hint="something inside the sandbox speaks in the agent's name",
    )


AnyMessage = Annotated[
    Configure
    | OpenSandbox
    | AddListener
    | ToolDecided
    | CloseSandbox
    | Ack
    | Refused
    | EgressDenied
    | ModelCalled
    | ModelWanted
    | ModelTurn
    | ModelHeard
    | ModelBegan
    | ModelUsed
    | GuardWanted
    | GuardUsed
    | PutOff
    | WitnessViolated,
    Field(discriminator="type"),
]

DeskMessage = ModelWanted | ModelHeard | ModelBegan | ModelUsed | GuardWanted | GuardUsed
"""What is about turns of requests, and not for one attempt."""

MESSAGES: TypeAdapter[AnyMessage] = TypeAdapter(
    AnyMessage, config=ConfigDict(hide_input_in_errors=True)
)


class Envelope(BaseModel):
    """A frame: a message, and how many descriptors travel with it."""

    model_config = ConfigDict(hide_input_in_errors=True)
    m: AnyMessage
    f: int = Field(ge=0, strict=True)
