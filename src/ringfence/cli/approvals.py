"""`ringfence approvals`: calls of sessions of a gateway that wait for somebody's word."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from ringfence.cli.group import group
from ringfence.cli.output import clear_errors, print_json
from ringfence.cli.remote import DEFAULT_URL, Gateway, Url, gateway
from ringfence.record.safe_text import one_line

app = group("Calls that wait for somebody's word.")
Json = Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")]
Session = Annotated[str, typer.Argument(metavar="SESSION", help="As `approvals list` names it.")]
Call = Annotated[str, typer.Argument(metavar="EVENT", help="As `list` names it.")]

_USES = ["agent.tool_use", "agent.mcp_tool_use", "agent.custom_tool_use"]


@app.command("list", epilog="Example: ringfence approvals list")
def list_(
    session: Annotated[
        str | None, typer.Argument(metavar="[SESSION]", help="Only this one.")
    ] = None,
    *,
    url: Url = DEFAULT_URL,
    json: Json = False,
) -> None:
    """What waits: session, event, tool and the whole input, in ASCII."""
    with clear_errors(as_json=json), gateway(url) as there:
        any_waits = False
        for name in [session] if session is not None else _idle(there):
            for event in waiting(there, name):
                any_waits = True
                if json:
                    print_json({"session_id": name, "event": event})
                else:
                    typer.echo("\n".join(shown(name, event)))
        if not any_waits:
            typer.echo("no call waits for a word", err=True)


@app.command("allow", epilog="Example: ringfence approvals allow sesn_… sevt_…")
def allow(session: Session, event: Call, *, url: Url = DEFAULT_URL, json: Json = False) -> None:
    """Let the call run, once, with the input that was shown."""
    _answer(session, event, {"result": "allow"}, url, json=json)


@app.command("deny", epilog='Example: ringfence approvals deny sesn_… sevt_… -m "Not today."')
def deny(
    session: Session,
    event: Call,
    *,
    message: Annotated[
        str | None, typer.Option("--message", "-m", help="What the agent is told.")
    ] = None,
    url: Url = DEFAULT_URL,
    json: Json = False,
) -> None:
    """Deny the call; the agent goes on without it."""
    words = {} if message is None else {"deny_message": message}
    _answer(session, event, {"result": "deny", **words}, url, json=json)


def _answer(session: str, event: str, word: dict[str, Any], url: str, *, json: bool) -> None:
    said = {"type": "user.tool_confirmation", "tool_use_id": event, **word}
    with clear_errors(as_json=json), gateway(url) as there:
        answer = there.call("POST", f"/v1/sessions/{session}/events", {"events": [said]})
        if json:
            print_json(answer)
        else:
            typer.echo(f"{word['result']}: {event}", err=True)


def _idle(there: Gateway) -> Iterator[str]:
    for one in there.pages("/v1/sessions", **{"statuses[]": "idle"}):
        yield str(one["id"])


def waiting(there: Gateway, session: str) -> list[dict[str, Any]]:
    """Events of the calls that a session's last idle names; none of one that does something else.

    Raises as `Gateway` does.
    """
    path = f"/v1/sessions/{session}/events"
    query: dict[str, Any] = {"order": "desc", "limit": 1}
    ends = ["session.status_idle", "session.status_running", "session.status_terminated"]
    last = there.call("GET", path, **query, **{"types[]": ends}).get("data") or [{}]
    named = set((last[0].get("stop_reason") or {}).get("event_ids") or ())
    found: list[dict[str, Any]] = []
    for event in there.pages(path, order="desc", **{"types[]": _USES}) if named else ():
        if event["id"] in named:
            found.append(event)
        if len(found) == len(named):
            break
    return found


def shown(session: str, event: dict[str, Any]) -> list[str]:
    """For a person who decides: nothing is left out, and no character is what it does not look
    like, so that all but ASCII is written as escapes.
    """
    given = jsonlib.dumps(event.get("input")).replace("\x7f", "\\u007f")
    server = event.get("mcp_server_name")
    name = f"{server}/{event.get('name')}" if server else str(event.get("name"))
    kind = "  (a tool of yours: send its result)" if event["type"] == _USES[2] else ""
    return [f"{session}  {event['id']}  {one_line(name)}{kind}", f"  {given}"]
