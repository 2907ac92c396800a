"""`ringfence vault sources`: where values come from, and whether they come."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import typer

from ringfence.cli.context import AppContext
from ringfence.cli.group import group
from ringfence.cli.output import clear_errors, print_json
from ringfence.config.secrets import SecretSettings
from ringfence.record.safe_text import one_line

app = group("Sources of credentials that the settings name. No value is shown, nor had.")
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("list", epilog="Example: ringfence vault sources list --json")
def list_(context: typer.Context, *, json: Json = False) -> None:
    """Where the value of each credential lies, and how far it may go."""
    with clear_errors(as_json=json):
        settings: SecretSettings = context.obj.config.secrets
        rows = [_row(settings, name) for name in sorted(settings.credentials)]
        if json:
            print_json(rows)
            return
        for row in rows:
            bounds = [*row["hosts"], *row["paths"]] or ["(as the policy says)"]
            typer.echo(f"{row['name']:24} {row['source']}  {', '.join(bounds)}")
        if not rows:
            typer.echo(
                "The settings place no credential in a source. "
                "Start with: [secrets.credentials.NAME] source = …",
                err=True,
            )


def _row(settings: SecretSettings, name: str) -> dict[str, Any]:
    credential = settings.credentials[name]
    return {
        "name": name,
        "source": credential.source,
        "hosts": list(credential.hosts),
        "paths": list(credential.paths),
        "header": credential.header,
        "query": credential.query,
    }


@app.command(epilog="Example: ringfence vault sources check")
def check(context: typer.Context, *, json: Json = False) -> None:
    """Ask each source now. Fails (4) when one does not give its credential."""
    with clear_errors(as_json=json):
        from ringfence.egress.sources import look

        state: AppContext = context.obj
        from ringfence.worker.launch import logins

        states = asyncio.run(look(state.config.secrets, state.state_dir, logins(state.config)))
        if json:
            print_json(
                [
                    {
                        "name": one.name,
                        "source": one.source,
                        "ok": one.good,
                        "version": one.version,
                        "lease_seconds": one.lease_seconds,
                        "code": one.code,
                        "message": one.message,
                        "hint": one.hint,
                    }
                    for one in states
                ]
            )
        else:
            for one in states:
                lease = "" if one.lease_seconds is None else f", lease {one.lease_seconds:.0f} s"
                good = f"ok  version {one.version}{lease}"
                said = good if one.good else f"{one.code}: {one.message}\n  {one.hint}".rstrip()
                typer.echo("\n".join(map(one_line, f"{one.name:24} {said}".split("\n"))))
            if not states:
                typer.echo("The settings place no credential in a source.", err=True)
        if not all(one.good for one in states):
            raise typer.Exit(4)
