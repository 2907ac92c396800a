"""`ringfence keys`: API keys of the gateway, for the operator at the platform's database."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from ringfence.cli.context import AppContext
from ringfence.cli.group import group
from ringfence.cli.operator import beside
from ringfence.cli.output import clear_errors, print_json

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from ringfence.control.keys import NewKey
    from ringfence.control.platform import Platform
    from ringfence.store.keys import KeyRow

app = group("API keys of the gateway. A key's text is shown once, when it is made.")

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
KeyId = Annotated[str, typer.Argument(help="As `ringfence keys list` names it.")]
T = TypeVar("T")


@app.command("create", epilog="Example: ringfence keys create --tenant acme --expires-days 90")
def create(
    context: typer.Context,
    *,
    tenant: Annotated[str, typer.Option(help="Whose key; a new name makes a new tenant.")],
    name: Annotated[str, typer.Option(help="What it is for, for people.")] = "key",
    scope: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SCOPE", help="What it is good for, as agents:read; repeatable; all by default."
        ),
    ] = None,
    expires_days: Annotated[
        float | None, typer.Option(min=0.0001, max=36_500, help="Good for so long; always else.")
    ] = None,
    json: Json = False,
) -> None:
    """Make a key and print it."""
    with clear_errors(as_json=json):
        platform = _made(context)
        from ringfence.control.keys import SCOPES, create

        scopes = tuple(scope) if scope else SCOPES
        made = _do(
            platform,
            lambda tx: create(
                tx,
                tenant=tenant,
                name=name,
                scopes=scopes,
                days=expires_days,
                most=platform.settings.keys,
            ),
        )
        _print(made, json=json)


@app.command("list", epilog="Example: ringfence keys list --json")
def list_(context: typer.Context, *, json: Json = False) -> None:
    """Keys of all tenants: prefix, scopes and state; never a key."""
    with clear_errors(as_json=json):
        platform = _made(context)
        from ringfence.control.keys import every

        rows = [_shown(row) for row in _do(platform, every)]
        if json:
            print_json(rows)
            return
        for row in rows:
            typer.echo(
                f"{row['id']:28} {row['state']:8} {row['prefix']}…  {row['tenant']:16} "
                f"{row['name']}  {' '.join(row['scopes'])}"
            )
        if not rows:
            typer.echo("No keys. Start with: ringfence keys create --tenant NAME", err=True)


@app.command("rotate", epilog="Example: ringfence keys rotate key_… --grace-days 7")
def rotate(
    context: typer.Context,
    key_id: KeyId,
    *,
    grace_days: Annotated[
        float, typer.Option(min=0, max=365, help="How long the old one is good for, still.")
    ] = 0.0,
    json: Json = False,
) -> None:
    """Make a key with the same scopes in the place of another."""
    with clear_errors(as_json=json):
        platform = _made(context)
        from ringfence.control.keys import rotate

        _print(_do(platform, lambda tx: rotate(tx, key_id, grace_days=grace_days)), json=json)


@app.command("revoke", epilog="Example: ringfence keys revoke key_…")
def revoke(context: typer.Context, key_id: KeyId) -> None:
    """End a key, from the next request on."""
    with clear_errors():
        platform = _made(context)
        from ringfence.control.keys import revoke

        row = _do(platform, lambda tx: revoke(tx, key_id))
        typer.echo(f"{row.id} ({row.prefix}…) is revoked", err=True)


def _made(context: typer.Context) -> Platform:
    """Asked for before anything of the platform is imported: it says what is not installed."""
    state: AppContext = beside(context.obj)
    assert state.platform is not None  # noqa: S101  the composition root sets it
    return state.platform()


def _do(platform: Platform, act: Callable[[AsyncConnection], Awaitable[T]]) -> T:
    """One transaction on the platform's database."""

    async def whole() -> T:
        async with platform.opened() as database, database.writing() as connection:
            return await act(connection)

    return asyncio.run(whole())


def _shown(row: KeyRow) -> dict[str, Any]:
    from ringfence.control.keys import state
    from ringfence.control.tenancy import moment
    from ringfence.store.database import now

    return {
        "id": row.id,
        "tenant": row.tenant,
        "tenant_id": row.tenant_id,
        "name": row.name,
        "prefix": row.prefix,
        "scopes": list(row.scopes),
        "state": state(row, now()),
        "created_at": moment(row.created_at),
        "expires_at": moment(row.expires_at),
        "revoked_at": moment(row.revoked_at),
        "replaced_by": row.replaced_by,
    }


def _print(made: NewKey, *, json: bool) -> None:
    if json:
        print_json({**_shown(made.row), "key": made.text})
        return
    typer.echo(f"{made.row.id} of {made.row.tenant}; it is shown this once:", err=True)
    typer.echo(made.text)
