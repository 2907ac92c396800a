"""`ringfence simulator`: a Messages API that plays scripted agents, offline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ringfence.cli.group import group
from ringfence.cli.output import clear_errors, print_json
from ringfence.errors import CallerError

app = group("A Messages API that plays scenarios: for demos, load tests and CI without a key.")

Port = Annotated[int, typer.Option(help="TCP port on loopback; 0 takes a free one.")]
Json = Annotated[bool, typer.Option("--json", help='Say where as JSON: {"base_url": …}.')]
Tape = Annotated[Path, typer.Argument(metavar="TAPE", help="File of exchanges, a line each.")]


@app.command(
    "serve",
    short_help="Play a scenario until Ctrl-C.",
    epilog="Example: ringfence simulator serve --port 8787   then   "
    "RINGFENCE_PROVIDERS__ANTHROPIC__BASE_URL=http://127.0.0.1:8787 ringfence run …",
)
def serve(
    *,
    port: Port = 8787,
    scenario: Annotated[
        Path | None, typer.Option(help="Scenario file (YAML); docs/reference/scenario.md.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Play a scenario until Ctrl-C.

    A prompt may carry its own script in a ringfence-script fence; it wins over the scenario.
    """
    with clear_errors(as_json=as_json):
        from ringfence.simulator.script import Scenario, parse_scenario
        from ringfence.simulator.server import application

        played = Scenario()
        if scenario is not None:
            played = parse_scenario(_read(scenario), str(scenario))
        _serve(application(played), port, "serving", as_json=as_json)


@app.command("record", epilog="Example: ringfence simulator record tape.jsonl --port 8788")
def record(
    tape: Tape,
    *,
    upstream: Annotated[str, typer.Option(help="Where requests go on to.")] = (
        "https://api.anthropic.com"
    ),
    port: Port = 8788,
    as_json: Json = False,
) -> None:
    """Pass requests on to a real API and keep every answer; credentials are not kept."""
    with clear_errors(as_json=as_json):
        from ringfence.simulator.tape import recording

        _serve(recording(tape, upstream), port, "recording", as_json=as_json)


@app.command("replay", epilog="Example: ringfence simulator replay tape.jsonl --port 8788")
def replay(tape: Tape, *, port: Port = 8788, as_json: Json = False) -> None:
    """Answer with what was recorded; a request that was not gets 422."""
    with clear_errors(as_json=as_json):
        from ringfence.simulator.tape import replaying

        _serve(replaying(tape), port, "replaying", as_json=as_json)


@app.command("schema", epilog="Example: ringfence simulator schema > scenario.schema.json")
def schema() -> None:
    """Print the JSON Schema of a scenario file."""
    from ringfence.simulator.script import Scenario

    typer.echo(json.dumps(Scenario.model_json_schema(), indent=2, ensure_ascii=False))


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        raise CallerError("usage", f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise CallerError("scenario-invalid", f"{path} is not UTF-8 text") from None


def _serve(app: Any, port: int, what: str, *, as_json: bool) -> None:
    from ringfence.simulator.server import serve_forever

    def ready(url: str) -> None:
        if as_json:
            print_json({"base_url": url})
        else:
            typer.echo(f"{what} on {url} (Ctrl-C ends it)")

    serve_forever(app, port, ready=ready)
