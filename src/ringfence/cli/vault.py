"""`ringfence vault`: seal credentials; nothing here can read one back."""

from __future__ import annotations

import asyncio
import getpass
import sys
from datetime import UTC, datetime
from typing import Annotated

import typer

from ringfence.cli import completion, sources
from ringfence.cli.context import AppContext
from ringfence.cli.group import group
from ringfence.cli.output import clear_errors, print_json
from ringfence.errors import CallerError
from ringfence.vault.keys import VaultPaths
from ringfence.vault.seal import set_credential
from ringfence.vault.store import VaultFile, check_hosts, check_name

app = group("Credentials, sealed to the egress process. They are set and removed, never shown.")

app.add_typer(sources.app, name="sources")

_MAX_INPUT = 1 << 16

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command(
    "set",
    epilog="Example: ringfence vault set anthropic   (or: … < key.txt)",
    context_settings={"allow_extra_args": True},
)
def set_(
    context: typer.Context,
    name: Annotated[
        str,
        typer.Argument(
            help="Name that policies use, such as anthropic.",
            autocompletion=completion.wanted_credentials,
        ),
    ],
    *,
    host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HOST",
            help="The only hosts it may be sent to, whatever a policy says; repeatable.",
        ),
    ] = None,
) -> None:
    """Ask for a value (or read it from standard input) and seal it."""
    with clear_errors():
        if context.args:
            # not the parser's own error, which would print it
            raise CallerError(
                "usage",
                "a value is never an argument: other processes and the shell's history see it",
                hint=f"take a new one, and give it to: ringfence vault set {check_name(name)}",
            )
        check_name(name)
        state: AppContext = context.obj
        hosts = check_hosts(tuple(host or ()))
        entry = set_credential(VaultPaths(state.state_dir), name, _value(name), hosts)
        typer.echo(f"{entry.name} is sealed ({entry.fingerprint})", err=True)


def _value(name: str) -> str:
    """The whole of standard input, so that a second line is refused and not left out in silence."""
    try:
        if sys.stdin.isatty():
            return getpass.getpass(f"Value of {name} (not shown): ").strip()
        return sys.stdin.buffer.read(_MAX_INPUT).decode("utf-8", "replace").strip()
    except EOFError:
        return ""


@app.command("list", epilog="Example: ringfence vault list --json")
def list_(context: typer.Context, *, json: Json = False) -> None:
    """Names, hosts and age; never a value."""
    with clear_errors(as_json=json):
        state: AppContext = context.obj
        entries = VaultFile(VaultPaths(state.state_dir).store).entries().values()
        rows = [
            {
                "name": entry.name,
                "hosts": list(entry.hosts),
                "set_at": datetime.fromtimestamp(entry.set_at, UTC).isoformat(timespec="seconds"),
                "fingerprint": entry.fingerprint,
            }
            for entry in sorted(entries, key=lambda entry: entry.name)
        ]
        if json:
            print_json(rows)
            return
        for row in rows:
            hosts = ", ".join(row["hosts"]) or "(the policy's hosts)"
            typer.echo(f"{row['name']:24} {row['set_at']}  {row['fingerprint']}  {hosts}")
        if not rows:
            typer.echo("The vault is empty. Start with: ringfence vault set anthropic", err=True)


@app.command("remove", epilog="Example: ringfence vault remove anthropic")
def remove(
    context: typer.Context,
    name: Annotated[
        str,
        typer.Argument(
            help="As `ringfence vault list` names it.", autocompletion=completion.credentials
        ),
    ],
) -> None:
    """Forget a credential."""
    with clear_errors():
        state: AppContext = context.obj
        VaultFile(VaultPaths(state.state_dir).store).remove(name)
        typer.echo(f"{name} is removed", err=True)


@app.command("use-key", epilog="Example: ringfence vault use-key")
def use_key(context: typer.Context) -> None:
    """Seal tenants' credentials to this host's key from now on.

    For a key that was lost or is to be changed. Credentials that were sealed to another do not
    open any more: their tenants set them again.
    """
    with clear_errors():
        state: AppContext = context.obj
        assert state.platform is not None  # noqa: S101  the composition root sets it
        platform = state.platform()
        from ringfence.control.vaults import adopt, sealer

        sealing = sealer(VaultPaths(state.state_dir))

        async def whole() -> int:
            async with platform.opened() as database, database.writing() as connection:
                return await adopt(connection, sealing)

        left = asyncio.run(whole())
        typer.echo(f"{sealing.name} is in use; {left} credentials are to be set again", err=True)
