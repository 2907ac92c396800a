"""Write docs/reference from the code; `--check` fails when a page is not what the code says."""

from __future__ import annotations

import ast
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.update(TERM="dumb", COLUMNS="100", NO_COLOR="1", _TYPER_FORCE_DISABLE_TERMINAL="1")

HERE = Path(__file__).parent / "reference"
HEAD = "<!-- Written by `make docs` from the code. Do not edit. -->\n\n"


def errors() -> str:
    from ringfence.errors import (
        CODES,
        TIMEOUTS,
        AgentError,
        CallerError,
        DeniedError,
        UnavailableError,
    )

    lines = ["# Errors", "", "Families and the exit status of a process that ends with one:", ""]
    lines += ["| family | exit status | meaning |", "|---|---|---|"]
    for family in (CallerError, DeniedError, UnavailableError, AgentError):
        meaning = (inspect.getdoc(family) or "").splitlines()[0]
        lines.append(f"| {family.family} | {family.exit_status} | {meaning} |")
    lines += ["", "A code of a time limit ends the process with 124, as timeout(1) does.", ""]
    lines += ["| code | meaning |", "|---|---|"]
    lines += [
        f"| `{code}`{' (124)' if code in TIMEOUTS else ''} | {text} |"
        for code, text in sorted(CODES.items())
    ]
    return "\n".join(lines) + "\n"


def events() -> str:
    from pydantic import BaseModel

    from ringfence.record import events as catalogue

    lines = ["# Events of the audit log", "", (inspect.getdoc(catalogue) or ""), ""]
    for value in vars(catalogue).values():
        if not (isinstance(value, type) and issubclass(value, BaseModel)):
            continue
        if "type" not in value.model_fields:
            continue
        lines += [f"## `{value.model_fields['type'].default}`", "", inspect.getdoc(value) or "", ""]
        lines += ["| field | type | default |", "|---|---|---|"]
        for name, field in value.model_fields.items():
            if name == "type":
                continue
            kind = inspect.formatannotation(field.annotation).replace("|", "or")
            default = "required" if field.is_required() else f"`{field.default!r}`"
            lines.append(f"| `{name}` | {kind} | {default} |")
        lines.append("")
    return "\n".join(lines)


def ocsf() -> str:
    from ringfence.record import ocsf as told
    from ringfence.record.ocsf_rows import TABLE

    lines = ["# Records as OCSF events", "", inspect.getdoc(told) or "", ""]
    lines += ["`ringfence audit export --format ocsf` writes them, a JSON object a line.", ""]
    lines += ["| record | class | activity | places of its fields |", "|---|---|---|---|"]
    for kind, row in TABLE.items():
        activity = "by the record" if callable(row.activity) else row.activity[1]
        fields = _fields_of(kind.partition(",")[0])
        places = [f"`{name}` → `{path}`" for name, path in row.places.items() if name in fields]
        caption = told.CLASSES[row.uid][0]
        lines.append(f"| `{kind}` | {caption} {row.uid} | {activity} | {', '.join(places)} |")
    lines += ["", "Of every record: `type` → `metadata.event_code`, `time` → `time` and"]
    lines += ["`metadata.original_time`, `source` → `metadata.log_provider`, its index →"]
    lines += ["`metadata.sequence`, `run_id` → `metadata.correlation_uid`, `session_id` →"]
    lines += ["`actor.session.uid`, `sandbox_id` → `device.uid` and, where there is one,"]
    lines += ["`src_endpoint.uid` or `process.uid`."]
    return "\n".join(lines) + "\n"


def _fields_of(kind: str) -> set[str]:
    from ringfence.record import events as catalogue

    for value in vars(catalogue).values():
        fields = getattr(value, "model_fields", {})
        if "type" in fields and fields["type"].default == kind:
            return set(fields)
    raise LookupError(kind)


def controls() -> str:
    import importlib

    from ringfence.sandbox.protocol import REQUIRED, Control
    from ringfence.wiring import technologies

    modules = [importlib.import_module(f"ringfence.sandbox.{name}") for name in technologies()]
    lines = ["# Controls, and what holds them", ""]
    lines += ["What each isolation does for each control, in the words of its own probe.", ""]
    lines += ["| control | isolation | how it is enforced | when it cannot be | and then |"]
    lines += ["|---|---|---|---|---|"]
    for control in Control:
        stops = "nothing starts (`control-unenforceable`, exit 4) unless the policy accepts it"
        then = f"{stops} by name" if control in REQUIRED else "it is recorded at the start"
        for module in modules:
            words = getattr(module, "HOW", {}).get(control)
            if words is None:
                continue
            name = module.__name__.rpartition(".")[2]
            why = f"{words.otherwise}; to mend: {words.mend}" if words.otherwise else "always holds"
            end = then if words.otherwise else ""
            lines.append(f"| `{control}` | {name} | {words.how} | {why} | {end} |")
    lines += [
        "",
        "What is accepted by name is printed at every start and recorded. When the egress",
    ]
    lines += ["process ends during a run, the sandbox has no way out from that moment, and the run"]
    lines += ["ends with `egress-unavailable` (exit 4); nothing falls back to a direct way."]
    return "\n".join(lines) + "\n"


def schema() -> str:
    from ringfence.policy.schema import policy_schema

    return json.dumps(policy_schema(), indent=2, sort_keys=True) + "\n"


def scenario() -> str:
    from ringfence.simulator.script import Limits, Scenario, Scene, Step, ToolCall

    lines = ["# Scenario files of `ringfence simulator`", ""]
    lines += ["YAML; `ringfence simulator schema` prints the same as JSON Schema. A script in a"]
    lines += ["prompt is a list of steps. What it is for: [how to](../how-to/simulator.md).", ""]
    for model in (Scenario, Limits, Scene, Step, ToolCall):
        lines += [f"## {model.__name__}", "", inspect.getdoc(model) or "", ""]
        lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
        for name, field in model.model_fields.items():
            kind = inspect.formatannotation(field.annotation).replace("|", "or")
            kind = kind.replace("ringfence.simulator.script.", "").replace("typing.", "")
            if field.is_required():
                default = "required"
            else:
                value = field.get_default(call_default_factory=True)
                default = f"`{value!r}`" if isinstance(value, int | float | str) else ""
            lines.append(f"| `{name}` | {kind} | {default} | {field.description} |")
        lines.append("")
    return "\n".join(lines)


def checks() -> str:
    from ringfence.check.catalogue import catalogue
    from ringfence.check.finding import Line
    from ringfence.check.probes.definition import built_in

    twins = {probe.check.id: probe.twin.title for probe in built_in()}
    lines = ["# Checks of `ringfence check`", ""]
    lines += [
        "What they are for, and what decides: [how to](../how-to/check.md). A live check runs in"
    ]
    lines += ["a sandbox; its twin must be allowed beside it.", ""]
    for line in Line:
        lines += [f"## {line.value.capitalize()}", ""]
        lines += [
            "| id | severity | check | holds when | twin | precedent |",
            "|---|---|---|---|---|---|",
        ]
        for check in catalogue():
            if check.line is line:
                cells = (check.id, check.severity.value, check.title, check.expect)
                row = [*cells, twins.get(check.id, "static"), check.source]
                lines.append("| " + " | ".join(_cell(text) for text in row) + " |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def coverage() -> str:
    from ringfence.check.coverage import fell, suite

    lines = ["# Attacks and the checks that try them", ""]
    lines += ["Every row has an answer, and a test holds it to one. The checks themselves:"]
    lines += ["[checks](checks.md).", ""]
    for title, rows in (("What others fell to", fell()), ("The suite", suite())):
        lines += [f"## {title}", "", "| row | attack | checks | decided by |", "|---|---|---|---|"]
        for row in rows:
            cells = (row.row, row.attack, ", ".join(row.ids), row.decides)
            lines.append("| " + " | ".join(_cell(text) for text in cells) + " |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def command_line() -> str:
    import typer.main

    from ringfence.cli.main import app

    lines = ["# Command line", ""]
    for path, help_text in _helps(typer.main.get_command(app), ("ringfence",)):
        lines += [f"## `{' '.join(path)}`", "", "```text", help_text.rstrip(), "```", ""]
    return "\n".join(lines)


def _helps(command: object, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    from typer.testing import CliRunner

    from ringfence.cli.main import app

    result = CliRunner().invoke(app, [*path[1:], "--help"], prog_name="ringfence")
    if result.exit_code != 0:
        raise SystemExit(f"{' '.join(path)} --help failed: {result.output}")
    yield path, "\n".join(line.rstrip() for line in result.output.splitlines())
    for name, child in sorted(getattr(command, "commands", {}).items()):
        if not getattr(child, "hidden", False):
            yield from _helps(child, (*path, name))


def isolation() -> str:
    from ringfence.policy.isolation import BOUNDARIES, EMULATED_STRENGTH, SEATS, THREATS
    from ringfence.wiring import technologies

    lines = ["# Isolation technologies and threat models", ""]
    lines += ["`ringfence isolation list` prints the first table and what this host lacks."]
    lines += ["", "| technology | strength | boundary | what a kernel bug costs | needs |"]
    lines += ["|---|---|---|---|---|"]
    for name, boundary in BOUNDARIES.items():
        cells = (boundary.summary, boundary.kernel_bug, boundary.needs)
        lines.append(f"| `{name}` | {boundary.strength} | {' | '.join(cells)} |")
    if unbuilt := [f"`{name}`" for name in BOUNDARIES if name not in technologies()]:
        lines += ["", f"This version of ringfence has no backend for {', '.join(unbuilt)}."]
    lines += ["", f"A microVM that is emulated, without KVM, counts as {EMULATED_STRENGTH}."]
    lines += ["`--isolation` may replace a policy's technology by one that is as strong.", ""]
    lines += ["Several agents in one sandbox (`hosting: multi_agent`):", ""]
    lines += ["| technology | several agents |", "|---|---|"]
    for name, why in SEATS.items():
        lines.append(f"| `{name}` | {f'refused: {why}' if why else 'yes'} |")
    lines += ["", "`isolation.threat_model` with `backend: auto` takes the first of its row that"]
    lines += ["this host can start under the policy, and refuses the start when there is none:", ""]
    lines += ["| `threat_model` | meaning | after the row | least strength | order |"]
    lines += ["|---|---|---|---|---|"]
    for model, threat in THREATS.items():
        cells = (threat.meaning, threat.row, str(threat.floor), ", ".join(threat.order))
        lines.append(f"| `{model}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def states() -> str:
    from ringfence.states import ATTEMPT, RUN, SESSION, AttemptEvent, RunEvent, SessionEvent

    lines = ["# States", "", "Drawn from `ringfence.states`; there are no other moves.", ""]
    for title, table in (("Run", RUN), ("Attempt", ATTEMPT), ("Session", SESSION)):
        lines += [f"## {title}", "", "```mermaid", "stateDiagram-v2"]
        lines.append(f"    [*] --> {next(iter(table)).value}")
        for status, moves in table.items():
            lines += [f"    {status.value} --> {to.value}: {by.value}" for by, to in moves.items()]
            if set(moves) <= {RunEvent.REPLAY}:
                lines.append(f"    {status.value} --> [*]")
        lines += ["```", ""]
    names = [f"`{event.value}`" for event in (*RunEvent, *AttemptEvent, *SessionEvent)]
    lines += [f"Events: {', '.join(names)}. `replay` is an operator's, and of dead letters only."]
    return "\n".join(lines) + "\n"


def slo() -> str:
    from ringfence.slo.budget import ALERT
    from ringfence.slo.objective import rules
    from ringfence.slo.outcomes import causes_in_order

    lines = ["# Error budgets", "", "What they are for: [how to](../how-to/slo.md).", ""]
    lines += ["## What a run counts as", "", "| outcome | counts as | why |", "|---|---|---|"]
    lines += [f"| {name} | {row.verdict.value} | {row.why} |" for name, row in causes_in_order()]
    lines += ["", "## Alerts, of a window of 30 days", ""]
    lines += ["| alert | severity | times too fast | long window | short window |"]
    lines += ["|---|---|---|---|---|"]
    for rule in rules(30):
        windows = f"{rule.long // 60} min | {rule.short // 60} min"
        lines.append(f"| `{rule.name}` | {rule.severity.value} | {rule.factor:g} | {windows} |")
    lines += ["", "## States of an alert", "", "```mermaid", "stateDiagram-v2"]
    lines.append(f"    [*] --> {next(iter(ALERT)).value}")
    for state, moves in ALERT.items():
        lines += [f"    {state.value} --> {to.value}: {by.value}" for by, to in moves.items()]
    return "\n".join([*lines, "```"]) + "\n"


def _session_support() -> list[str]:
    from ringfence.control import event_shapes as events
    from ringfence.control import session_shapes as sessions

    ways = dict.fromkeys(events.SENT, "is sent")
    ways |= dict.fromkeys(sorted(events.TOLD | events.MOVES), "is told")
    lines = ["Of a session's events; what is not here does not happen, and what is sent without"]
    lines += ["being here is refused by its name:", "", "| event | |", "|---|---|"]
    lines += [f"| `{kind}` | {ways[kind]} |" for kind in events.EVENT_TYPES if kind in ways]
    lines += ["| `session.deleted` | ends a stream |", ""]
    refused = [f"a resource of type `{kind}`" for kind in sorted(sessions.RESOURCES)]
    refused = [text for text in refused if text.split("`")[1] not in sessions.MOUNTED]
    refused += [*events.REFUSED.values(), "sources of type `url`", "threads"]
    lines += [f"Refused by name in sessions and events: {'; '.join(refused)}."]
    return lines


def _definition_support() -> list[str]:
    """What agents, environments and vaults refuse, read out of the calls that refuse it."""
    from ringfence.control import agent_shapes, environment_shapes, vault_shapes

    lines = []
    kinds = {"agents": agent_shapes, "environments": environment_shapes, "vaults": vault_shapes}
    for kind, module in kinds.items():
        calls = (
            n for n in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(n, ast.Call)
        )
        refused = [
            "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in parts)
            for call in calls
            if isinstance(call.func, ast.Name) and call.func.id == "unsupported"
            for said in call.args
            for parts in [said.values if isinstance(said, ast.JoinedStr) else [said]]
        ]
        lines += ["", f"Refused by name in {kind}: {'; '.join(sorted(refused))}."]
    lines += [
        "",
        "`event_deltas` of a stream is taken, and no preview is sent: they are best effort.",
    ]
    return lines


def api() -> str:
    from ringfence.config import GatewaySettings, OidcSettings, WebhookSettings
    from ringfence.gateway.app import create_app
    from ringfence.gateway.support import public_routes, served

    lines = ["# Routes of the gateway", ""]
    lines += ["The public Managed Agents API, as the official client calls it; what is not served"]
    lines += ["answers 404 with `not_supported` and the route's name. How to use it:"]
    lines += ["[how to](../how-to/gateway.md).", "", "| route | served |", "|---|---|"]
    here = served(create_app(None, None))
    lines += [
        f"| `{method} {path}` | {'yes' if (method, path) in here else 'no'} |"
        for method, path in public_routes()
    ]
    lines += ["", *_session_support(), *_definition_support(), ""]
    own = sorted(here - set(public_routes()), key=lambda pair: pair[1])
    lines += ["Ours, without a key:", "", "| route |", "|---|", "| `GET /openapi.json` |"]
    lines += [f"| `{method} {path}` |" for method, path in own]
    lines += ["", "## Settings", "", inspect.getdoc(GatewaySettings) or "", ""]
    lines += ["| setting | default |", "|---|---|"]
    for name, field in GatewaySettings.model_fields.items():
        lines.append(f"| `gateway.{name}` | `{field.default!r}` |")
    lines += ["", "## Tokens", "", inspect.getdoc(OidcSettings) or "", ""]
    lines += ["| setting | default |", "|---|---|"]
    for name, field in OidcSettings.model_fields.items():
        default = field.get_default(call_default_factory=True)
        cell = "required" if field.is_required() else f"`{default!r}`"
        lines.append(f"| `gateway.oidc.{name}` | {cell} |")
    lines += ["", "## Webhooks", "", inspect.getdoc(WebhookSettings) or "", ""]
    lines += ["| setting | default |", "|---|---|"]
    for name, field in WebhookSettings.model_fields.items():
        cell = "required" if field.is_required() else f"`{field.default!r}`"
        lines.append(f"| `webhooks.NAME.{name}` | {cell} |")
    return "\n".join(lines) + "\n"


def metrics() -> str:
    from ringfence.config import MetricsSettings, TelemetrySettings, TraceSettings
    from ringfence.telemetry import catalogue as told

    lines = ["# Metrics", "", inspect.getdoc(told) or "", ""]
    lines += ["How to use them: [how to](../how-to/observability.md).", ""]
    lines += ["| metric | kind | labels | of | meaning |", "|---|---|---|---|---|"]
    for metric in told.CATALOGUE:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        of = "gateway, worker" if metric.by == "both" else metric.by
        lines.append(f"| `{metric.name}` | {metric.kind} | {labels} | {of} | {metric.help} |")
    lines += ["", "## Settings", ""]
    for model, name in (
        (TelemetrySettings, "telemetry"),
        (MetricsSettings, "telemetry.metrics"),
        (TraceSettings, "telemetry.traces"),
    ):
        lines += [f"### `{name}`", "", inspect.getdoc(model) or "", ""]
        lines += ["| setting | default |", "|---|---|"]
        for part, field in model.model_fields.items():
            value = field.get_default(call_default_factory=True)
            cell = "required" if field.is_required() else f"`{value!r}`"
            lines.append(f"| `{name}.{part}` | {cell} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


PAGES: dict[str, Callable[[], str]] = {
    "errors.md": errors,
    "events.md": events,
    "ocsf.md": ocsf,
    "controls.md": controls,
    "cli.md": command_line,
    "api.md": api,
    "metrics.md": metrics,
    "isolation.md": isolation,
    "checks.md": checks,
    "states.md": states,
    "slo.md": slo,
    "attacks.md": coverage,
    "scenario.md": scenario,
    "policy.schema.json": schema,
}


def main() -> int:
    check = "--check" in sys.argv[1:]
    stale = []
    for name, write in PAGES.items():
        page = HERE / name
        text = write() if name.endswith(".json") else HEAD + write()
        if page.exists() and page.read_text() == text:
            continue
        stale.append(name)
        if not check:
            page.write_text(text)
    if check and stale:
        print(f"docs/reference is not what the code says: {', '.join(stale)}; run `make docs`")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
