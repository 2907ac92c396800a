"""The command line: `ringfence` and its groups. No rules here."""

from __future__ import annotations

from typing import Annotated

import typer

import ringfence
from ringfence.cli import (
    approvals,
    audit,
    check,
    definitions,
    demo,
    doctor,
    image,
    isolation,
    keys,
    limits,
    patch,
    places,
    policy,
    queue,
    run,
    serve,
    sessions,
    simulator,
    slo,
    submit,
    up,
    vault,
    worker,
)
from ringfence.cli.group import Group

app = typer.Typer(
    name="ringfence",
    cls=Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with `ringfence demo`: offline, no key, under a minute. Exit status: 0 done, "
    "2 your input, 3 denied, 4 this host cannot, 5 the agent failed, 124 out of time; "
    "`exec` ends as its program did, and `check` with 1 where something failed.",
)


def _version(value: bool) -> None:  # noqa: FBT001  typer's callback
    if value:
        typer.echo(f"ringfence {ringfence.__version__}")
        raise typer.Exit


@app.callback()
def main(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Run Claude agents in production, with every control outside the sandbox."""


run.register(app)
demo.register(app)
doctor.register(app)
app.add_typer(check.app, name="check")
app.add_typer(policy.app, name="policy")
app.add_typer(isolation.app, name="isolation")
app.add_typer(audit.app, name="audit")
app.add_typer(sessions.app, name="sessions")
app.add_typer(vault.app, name="vault")
app.add_typer(patch.app, name="patch")
app.add_typer(image.app, name="image")
app.add_typer(simulator.app, name="simulator")
serve.register(app)
worker.register(app)
up.register(app)
submit.register(app)
app.add_typer(definitions.agents, name="agents")
app.add_typer(definitions.environments, name="environments")
sessions.app.add_typer(submit.remote, name="remote")
places.register(sessions.app)
app.add_typer(approvals.app, name="approvals")
app.add_typer(keys.app, name="keys")
app.add_typer(queue.app, name="queue")
app.add_typer(limits.app, name="limits")
app.add_typer(slo.app, name="slo")
