"""`ringfence simulator`: a Messages API that plays scripted agents, offline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ringfence.cli.output import clear_errors
from ringfence.errors import CallerError

app = typer.Typer(
    no_args_is_help=True,
    help="A Messages API that plays scenarios: for demos, load tests and CI without a key.",
)

Port = Annotated[int, typer.Option(help="TCP port on loopback; 0 takes a free one.")]


@app.command(
    "serve",
    epilog="Example: ringfence simulator serve --port 8787   then   "
    "RINGFENCE_PROVIDERS__ANTHROPIC__BASE_URL=http://127.0.0.1:8787 ringfence run …",
)
def serve(
    *,
    port: Port = 8787,
    scenario: Annotated[Path | None, typer.Option(help="Scenario file (YAML).")] = None,
) -> None:
    """Serve until Ctrl-C. A prompt may carry its own script in a `ringfence-script` fence."""
    with clear_errors():
        from ringfence.simulator.script import Scenario, parse_scenario
        from ringfence.simulator.server import application, serve_forever

        try:
            text = scenario.read_text() if scenario is not None else None
        except OSError as error:
            raise CallerError("usage", f"{scenario} cannot be read: {error.strerror}") from None
        played = parse_scenario(text) if text is not None else Scenario()
        serve_forever(application(played), port, ready=lambda url: typer.echo(f"serving on {url}"))


@app.command("record", epilog="Example: ringfence simulator record tape.jsonl --port 8788")
def record(
    tape: Annotated[Path, typer.Argument(help="File that exchanges are appended to.")],
    *,
    upstream: Annotated[str, typer.Option(help="Where requests go on to.")] = (
        "https://api.anthropic.com"
    ),
    port: Port = 8788,
) -> None:
    """Pass requests on to a real API and keep every exchange; credentials are not kept."""
    with clear_errors():
        from ringfence.simulator.server import serve_forever
        from ringfence.simulator.tape import recording

        serve_forever(
            recording(tape, upstream), port, ready=lambda url: typer.echo(f"recording on {url}")
        )


@app.command("replay", epilog="Example: ringfence simulator replay tape.jsonl --port 8788")
def replay(
    tape: Annotated[Path, typer.Argument(help="File that `record` wrote.")],
    *,
    port: Port = 8788,
) -> None:
    """Answer with what was recorded; a request that was not gets 404."""
    with clear_errors():
        from ringfence.simulator.server import serve_forever
        from ringfence.simulator.tape import replaying

        serve_forever(replaying(tape), port, ready=lambda url: typer.echo(f"replaying on {url}"))
