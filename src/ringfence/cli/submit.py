"""`ringfence submit` and `ringfence sessions remote`: sessions of a gateway."""

from __future__ import annotations

import json as jsonlib
import sys
from collections.abc import Iterable
from typing import Annotated, Any

import typer

from ringfence.cli.group import group
from ringfence.cli.output import clear_errors, print_json
from ringfence.cli.remote import DEFAULT_URL, Url, gateway, named
from ringfence.errors import AgentError
from ringfence.record.safe_text import one_line, printable

Json = Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")]
Session = Annotated[
    str, typer.Argument(metavar="SESSION", help="As `sessions remote list` names it.")
]

remote = group("Sessions of a gateway.")

_ENDS = frozenset({"session.status_idle", "session.status_terminated", "session.deleted"})


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        "submit",
        epilog='Example: ringfence submit "Mend the build." --agent coder --environment ci '
        "--follow",
    )(submit)


def submit(
    prompt: Annotated[str, typer.Argument(help="The user's turn.")],
    *,
    agent: Annotated[str | None, typer.Option(help="Id or name; for a new session.")] = None,
    environment: Annotated[str | None, typer.Option(help="Id or name; for a new session.")] = None,
    session: Annotated[str | None, typer.Option(help="Go on with this one instead.")] = None,
    title: Annotated[str | None, typer.Option(help="Of a new session.")] = None,
    batch: Annotated[
        bool, typer.Option("--batch", help="Nobody waits for it: others go first.")
    ] = False,
    follow: Annotated[bool, typer.Option("--follow", help="Show events until it is idle.")] = False,
    url: Url = DEFAULT_URL,
    json: Json = False,
) -> None:
    """Give an agent of a gateway work: a new session, or the next turn of one.

    Prints the session's id; with --follow, what happens, and the status tells how it ended.
    """
    with clear_errors(as_json=json), gateway(url) as there:
        if session is None:
            session = _created(there, agent, environment, title, batch=batch)
        elif batch:
            there.call("POST", f"/v1/sessions/{session}", {"ringfence": {"batch": True}})
        seen = {one["id"] for one in there.pages(f"/v1/sessions/{session}/events")}
        message = {"type": "user.message", "content": [{"type": "text", "text": prompt}]}
        there.call("POST", f"/v1/sessions/{session}/events", {"events": [message]})
        if not follow:
            print_json({"session_id": session}) if json else typer.echo(session)
            return
        if not json:
            typer.echo(session, err=True)
        new = (one for one in there.events(session) if one["id"] not in seen)
        _finish(_followed(new, json=json))


def _created(
    there: Any, agent: str | None, environment: str | None, title: str | None, *, batch: bool
) -> str:
    if agent is None or environment is None:
        raise typer.BadParameter("a new session needs --agent and --environment")
    body: dict[str, Any] = {
        "agent": named(there, "agents", agent)["id"],
        "environment_id": named(there, "environments", environment)["id"],
    }
    if title is not None:
        body["title"] = title
    if batch:
        body["ringfence"] = {"batch": True}
    return str(there.call("POST", "/v1/sessions", body)["id"])


def _followed(events: Iterable[dict[str, Any]], *, json: bool) -> dict[str, Any]:
    """Show events up to the one that ends the turn; that one."""
    for event in events:
        if json:
            print_json(event)
        else:
            for line in lines(event):
                sys.stdout.write(line + "\n")
            sys.stdout.flush()
        if event["type"] in _ENDS:
            return event
    return {"type": ""}


def _finish(event: dict[str, Any]) -> None:
    reason = (event.get("stop_reason") or {}).get("type")
    if event["type"] == "session.status_idle" and reason in {"end_turn", "requires_action"}:
        return
    raise AgentError("agent-failed", f"the turn ended with {reason or event['type'] or 'nothing'}")


def lines(event: dict[str, Any]) -> list[str]:
    """An event for people. All of it came from inside: nothing acts on the terminal."""
    kind = str(event.get("type", ""))
    if kind in {"agent.message", "user.message"}:
        who = "" if kind == "agent.message" else "> "
        return [who + printable(text) for text in _texts(event)]
    if kind in {"agent.tool_use", "agent.mcp_tool_use", "agent.custom_tool_use"}:
        given = jsonlib.dumps(event.get("input"), ensure_ascii=False)
        return [f"  → {one_line(str(event.get('name')), 80)} {one_line(given, 160)}"]
    if kind in {"agent.tool_result", "agent.mcp_tool_result"}:
        mark = "✗" if event.get("is_error") else "✓"
        return [f"  {mark} {one_line(' '.join(_texts(event)), 160)}"]
    if kind == "session.error":
        error = event.get("error") or {}
        return [f"! {one_line(str(error.get('message')), 500)}"]
    if kind == "session.status_idle":
        reason = (event.get("stop_reason") or {}).get("type")
        return [f"— idle: {one_line(str(reason), 80)}"]
    return []


def _texts(event: dict[str, Any]) -> list[str]:
    blocks = event.get("content")
    found = blocks if isinstance(blocks, list) else []
    return [str(one.get("text", "")) for one in found if isinstance(one, dict) and "text" in one]


@remote.command("list", epilog="Example: ringfence sessions remote list")
def list_(*, url: Url = DEFAULT_URL, json: Json = False) -> None:
    """Sessions, the latest first."""
    with clear_errors(as_json=json), gateway(url) as there:
        for one in there.pages("/v1/sessions"):
            if json:
                print_json(one)
            else:
                typer.echo(f"{one['id']}  {one['status']:12}  {one_line(one.get('title') or '')}")


@remote.command("show", epilog="Example: ringfence sessions remote show sesn_…")
def show(session: Session, *, url: Url = DEFAULT_URL) -> None:
    """One session, as JSON."""
    with clear_errors(), gateway(url) as there:
        print_json(there.call("GET", f"/v1/sessions/{session}"))


@remote.command("events", epilog="Example: ringfence sessions remote events sesn_… --follow")
def events(
    session: Session,
    *,
    follow: Annotated[bool, typer.Option("--follow", help="Go on until it is idle.")] = False,
    url: Url = DEFAULT_URL,
    json: Json = False,
) -> None:
    """What happened in a session, in order."""
    with clear_errors(as_json=json), gateway(url) as there:
        path = f"/v1/sessions/{session}/events"
        if follow:
            found = list(there.pages(path, order="asc"))
            ended = {one["id"] for one in found if one["type"] in _ENDS}
            _follow_on(there.events(session), ended, json=json)
            return
        for one in there.pages(path, order="asc"):
            if json:
                print_json(one)
            else:
                for line in lines(one):
                    typer.echo(line)


def _follow_on(found: Iterable[dict[str, Any]], ended: set[str], *, json: bool) -> None:
    """Ends of turns that lie behind are shown, and are no end."""
    for event in found:
        past = event["id"] in ended
        shown = _followed([event], json=json)
        if shown["type"] in _ENDS and not past:
            return


@remote.command("delete", epilog="Example: ringfence sessions remote delete sesn_…")
def delete(session: Session, *, url: Url = DEFAULT_URL, json: Json = False) -> None:
    """Delete a session for good."""
    with clear_errors(as_json=json), gateway(url) as there:
        answer = there.call("DELETE", f"/v1/sessions/{session}")
        print_json(answer) if json else typer.echo(f"deleted {session}", err=True)
