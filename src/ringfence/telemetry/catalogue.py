"""Every metric that there is: name, labels, and what it means. PURE.

`docs/reference/metrics.md` is generated from this file, and the rules and dashboards of `deploy/`
are held against it. A name is stable; labels are only ever added. No label has values that
somebody inside a sandbox could multiply (`ringfence.telemetry.labels`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["counter", "gauge", "histogram"]

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_LONG = (0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """One metric.

    Attributes:
        name: as it is scraped; a counter's ends with `_total`.
        by: which process has it: `gateway`, `worker`, or `both`.
        buckets: upper bounds of a histogram, in its unit.
    """

    name: str
    kind: Kind
    by: Literal["gateway", "worker", "both"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    @property
    def samples(self) -> frozenset[str]:
        """Names under which it is scraped, as an expression names them."""
        if self.kind != "histogram":
            return frozenset({self.name})
        return frozenset(f"{self.name}{end}" for end in ("_bucket", "_sum", "_count"))


CATALOGUE: tuple[Metric, ...] = (
    Metric(
        name="ringfence_build_info",
        kind="gauge",
        by="both",
        labels=("version",),
        help="1; the version that runs.",
    ),
    # gateway
    Metric(
        name="ringfence_gateway_requests_total",
        kind="counter",
        by="gateway",
        labels=("method", "route", "status"),
        help="Requests to the gateway, by the pattern of their route; `other` matched none, or "
        "was refused before one was looked for.",
    ),
    Metric(
        name="ringfence_gateway_request_seconds",
        kind="histogram",
        by="gateway",
        labels=("route",),
        buckets=_SECONDS,
        help="From a request's head to the end of its answer; event streams are left out.",
    ),
    Metric(
        name="ringfence_caller_traces_over_total",
        kind="counter",
        by="gateway",
        labels=("tenant", "outcome"),
        help="Requests whose `traceparent` asked to be kept, beyond `callers_per_minute` of their "
        "tenant: `kept` by the operator's `sample`, or `dropped`.",
    ),
    Metric(
        name="ringfence_queue_runs",
        kind="gauge",
        by="gateway",
        labels=("state",),
        help="Runs in the queue: `waiting`, of those `delayed`, `running`, and dead letters "
        "(`dead`). Every gateway says the same: take the largest.",
    ),
    Metric(
        name="ringfence_queue_oldest_seconds",
        kind="gauge",
        by="gateway",
        help="How long ago the oldest run was submitted that a worker could take; 0 without one.",
    ),
    Metric(
        name="ringfence_queue_workers",
        kind="gauge",
        by="gateway",
        help="Workers that the queue has not missed.",
    ),
    Metric(
        name="ringfence_queue_unread_total",
        kind="counter",
        by="gateway",
        help="Times that the queue did not say its numbers; the last ones stand.",
    ),
    # turns and attempts
    Metric(
        name="ringfence_turns_total",
        kind="counter",
        by="worker",
        labels=("tenant", "outcome"),
        help="Turns that a worker gave back to the queue: the run's end, `put-off` (later, no "
        "failure), `again` (a failure of the platform), `superseded`.",
    ),
    Metric(
        name="ringfence_turn_seconds",
        kind="histogram",
        by="worker",
        labels=("outcome",),
        buckets=_LONG,
        help="How long a worker had a turn in hand.",
    ),
    Metric(
        name="ringfence_turns_in_hand",
        kind="gauge",
        by="worker",
        help="Turns that the worker carries out.",
    ),
    Metric(
        name="ringfence_attempts_total",
        kind="counter",
        by="worker",
        labels=("tenant", "status", "reason"),
        help="Attempts by how they ended; `reason` is an error's code, `none` without one.",
    ),
    Metric(
        name="ringfence_sandbox_starts_total",
        kind="counter",
        by="worker",
        labels=("isolation", "kind"),
        help="Sandboxes that an attempt got: `cold`, `warm` (was there before), `seat` (of a "
        "shared one); `shared` counts those that are shared.",
    ),
    Metric(
        name="ringfence_sandbox_start_seconds",
        kind="histogram",
        by="worker",
        labels=("isolation", "kind"),
        buckets=_SECONDS,
        help="From an attempt's beginning to a sandbox that stands.",
    ),
    Metric(
        name="ringfence_tool_calls_total",
        kind="counter",
        by="worker",
        labels=("tool", "outcome"),
        help="Tool calls: `deny`, `defer` and `shut` (kept from it by a breaker) as decided, the "
        "others as `claude` reports their end. Tools of MCP servers are `mcp`, of callers "
        "`custom`.",
    ),
    Metric(
        name="ringfence_tool_call_seconds",
        kind="histogram",
        by="worker",
        labels=("tool",),
        buckets=_LONG,
        help="How long allowed tool calls took.",
    ),
    # the model
    Metric(
        name="ringfence_model_requests_total",
        kind="counter",
        by="worker",
        labels=("tenant", "provider", "model", "status"),
        help="Model requests by the status that came of them; 0 without an answer.",
    ),
    Metric(
        name="ringfence_model_request_seconds",
        kind="histogram",
        by="worker",
        labels=("provider", "model"),
        buckets=_LONG,
        help="From a model request's leave to the end of its answer.",
    ),
    Metric(
        name="ringfence_model_requests_in_flight",
        kind="gauge",
        by="worker",
        help="Model requests without an end yet.",
    ),
    Metric(
        name="ringfence_model_tokens_total",
        kind="counter",
        by="worker",
        labels=("tenant", "provider", "model", "kind"),
        help="Tokens as metered on the wire: `input`, `output`, `cache_creation`, `cache_read`.",
    ),
    Metric(
        name="ringfence_model_cost_usd_total",
        kind="counter",
        by="worker",
        labels=("tenant", "provider", "model"),
        help="Dollars of those tokens, at our prices.",
    ),
    Metric(
        name="ringfence_model_unpriced_requests_total",
        kind="counter",
        by="worker",
        help="Model requests that no price is known for; no dollars are counted for them.",
    ),
    Metric(
        name="ringfence_usage_differences_total",
        kind="counter",
        by="worker",
        help="Attempts in which `claude` reported other tokens than the wire had.",
    ),
    Metric(
        name="ringfence_limit_wait_seconds",
        kind="histogram",
        by="worker",
        labels=("provider", "outcome"),
        buckets=_LONG,
        help="How long model requests waited for their turn under the limits: `granted`, "
        "`put-off`, `later` (it asks again in its time), `refused`, `left` (its client went).",
    ),
    Metric(
        name="ringfence_limit_waiting",
        kind="gauge",
        by="worker",
        help="Model requests that wait for their turn.",
    ),
    Metric(
        name="ringfence_budget_alerts_total",
        kind="counter",
        by="worker",
        help="Shared budgets that came to their alert.",
    ),
    # where the model's requests go when a provider fails
    Metric(
        name="ringfence_model_tries_total",
        kind="counter",
        by="worker",
        labels=("provider", "kind"),
        help="Tries of model requests that were let go: `first`, `repeated` (at the same provider "
        "and model, of which there may be a tenth of the first), `next` (at the next one of the "
        "policy). Counting tokens is left out.",
    ),
    Metric(
        name="ringfence_model_moves_total",
        kind="counter",
        by="worker",
        labels=("reason",),
        help="Sessions that went to another provider or model: `failed`, `breaker`, `limit`, or "
        "back (`returned`).",
    ),
    Metric(
        name="ringfence_breaker_changes_total",
        kind="counter",
        by="worker",
        labels=("kind", "provider", "state"),
        help="Breakers that came to a state: of a `model` at a provider, an `mcp` server, a "
        "`tool`, or for one `session` alone (`provider` is `none` of these). Who changed one "
        "counts it, and nobody else.",
    ),
    Metric(
        name="ringfence_breakers_open",
        kind="gauge",
        by="worker",
        labels=("provider",),
        help="Breakers of a provider's models that are not closed, as the worker last heard; one "
        "that asks nothing hears nothing.",
    ),
    # what is promised
    Metric(
        name="ringfence_slo_burn",
        kind="gauge",
        by="both",
        labels=("environment", "slo", "rule"),
        help="How many times faster than it may an error budget is spent, in the better of the "
        "rule's two windows. This and the other `ringfence_slo_` are of the one process that "
        "looks; of `other` the worst.",
    ),
    Metric(
        name="ringfence_slo_budget_left",
        kind="gauge",
        by="both",
        labels=("environment", "slo"),
        help="Share of an error budget that is left; negative when more was spent.",
    ),
    Metric(
        name="ringfence_slo_firing",
        kind="gauge",
        by="both",
        labels=("environment", "slo", "rule", "severity"),
        help="1 while ringfence's own alert fires, else 0.",
    ),
    Metric(
        name="ringfence_turns_held_back",
        kind="gauge",
        by="both",
        labels=("environment",),
        help="Turns of low priority that wait for a spent error budget; of the process that looks.",
    ),
    # what was refused
    Metric(
        name="ringfence_egress_denials_total",
        kind="counter",
        by="worker",
        labels=("tenant", "rule"),
        help="Refusals of egress, by the rule without its index. Of one sandbox the first 500.",
    ),
    Metric(
        name="ringfence_witness_disagreements_total",
        kind="counter",
        by="worker",
        help="Attempts that were ended because the wire and the worker disagreed.",
    ),
    # itself
    Metric(
        name="ringfence_spans_total",
        kind="counter",
        by="both",
        labels=("outcome",),
        help="Spans: `made`; of those `sent`, or `failed` (the collector did not take them); and "
        "`left-out`, beyond what one attempt may make.",
    ),
    Metric(
        name="ringfence_telemetry_faults_total",
        kind="counter",
        by="both",
        help="Facts that could not be told, for a fault of our own.",
    ),
)

BY_NAME = {metric.name: metric for metric in CATALOGUE}

KNOWN_VALUES: dict[tuple[str, str], tuple[str, ...]] = {
    ("ringfence_queue_runs", "state"): ("waiting", "delayed", "running", "dead"),
    ("ringfence_spans_total", "outcome"): ("made", "sent", "failed", "left-out"),
    ("ringfence_model_moves_total", "reason"): ("failed", "breaker", "limit", "returned"),
}
"""Label values that are there from the start, so that a rate sees the first of them."""


def metric_of(sample: str) -> Metric | None:
    """The metric that a name in an expression is of."""
    return next((metric for metric in CATALOGUE if sample in metric.samples), None)
