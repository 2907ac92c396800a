"""`ringfence agents` and `ringfence environments`: definitions of a gateway, from files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ringfence.cli.group import group
from ringfence.cli.output import clear_errors, print_json
from ringfence.cli.remote import DEFAULT_URL, Gateway, Url, definition, gateway, named
from ringfence.errors import CallerError
from ringfence.record.safe_text import one_line

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
File = Annotated[Path, typer.Option("--file", "-f", help="YAML (or JSON) in the public shape.")]

agents = group("Agents of a gateway.")
environments = group("Environments of a gateway.")


@agents.command("apply", epilog="Example: ringfence agents apply -f agent.yaml")
def apply_agent(*, file: File, url: Url = DEFAULT_URL, json: Json = False) -> None:
    """Make an agent of a file, or a new version of the one that has its name (or its `id`)."""
    _apply("agents", file, url, json=json)


@environments.command("apply", epilog="Example: ringfence environments apply -f place.yaml")
def apply_environment(*, file: File, url: Url = DEFAULT_URL, json: Json = False) -> None:
    """Make an environment of a file, or change the one that has its name (or its `id`)."""
    _apply("environments", file, url, json=json)


@agents.command("list", epilog="Example: ringfence agents list --json")
def list_agents(*, url: Url = DEFAULT_URL, json: Json = False) -> None:
    """Agents, the latest first."""
    _list("agents", url, json=json)


@environments.command("list", epilog="Example: ringfence environments list --json")
def list_environments(*, url: Url = DEFAULT_URL, json: Json = False) -> None:
    """Environments, the latest first."""
    _list("environments", url, json=json)


def _apply(kind: str, file: Path, url: str, *, json: bool) -> None:
    with clear_errors(as_json=json), gateway(url) as remote:
        body = definition(file)
        try:
            _show(kind, *apply(remote, kind, body), json=json)
        except CallerError as error:
            if error.code != "request-invalid":
                raise
            # the gateway knows the shape and not the file
            raise CallerError(
                error.code, f"{file}: {error.message}", hint="docs/how-to/platform.md shows one"
            ) from None


def apply(remote: Gateway, kind: str, body: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """`created`, `updated` or `unchanged`, and what is there now.

    Raises:
        CallerError: among others `usage`, for a name that several have.
    """
    body = dict(body)
    identity, name = body.pop("id", None), body.get("name")
    if identity is None:
        found = [one for one in remote.pages(f"/v1/{kind}") if one.get("name") == name]
        if not found:
            return "created", remote.call("POST", f"/v1/{kind}", body)
        if len(found) > 1:
            raise CallerError(
                "usage",
                f"several {kind} are called {name!r}",
                hint=f"name one of them in the file, as `id`: {found[0]['id']}",
            )
        before = found[0]
    else:
        before = named(remote, kind, str(identity))
    if kind == "agents":
        # an update that was made for an older version than the one that was read is refused
        body["version"] = before["version"]
    after = remote.call("POST", f"/v1/{kind}/{before['id']}", body)
    same = after.get("version") == before.get("version") and after["updated_at"] == before.get(
        "updated_at"
    )
    return ("unchanged" if same else "updated"), after


def _show(kind: str, what: str, value: dict[str, Any], *, json: bool) -> None:
    if json:
        print_json({**value, "applied": what})
        return
    version = f" version {value['version']}" if kind == "agents" else ""
    typer.echo(f"{value['id']}  {one_line(str(value['name']))}{version}  {what}")


def _list(kind: str, url: str, *, json: bool) -> None:
    with clear_errors(as_json=json), gateway(url) as remote:
        found = list(remote.pages(f"/v1/{kind}"))
        if json:
            print_json(found)
            return
        if not found:
            typer.echo(f"no {kind} yet: ringfence {kind} apply -f FILE makes one", err=True)
        for one in found:
            version = f"  version {one['version']}" if "version" in one else ""
            typer.echo(f"{one['id']}  {one_line(str(one['name']))}{version}")
