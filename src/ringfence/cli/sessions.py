"""`ringfence sessions`: list, show, resume, fork, delete."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from ringfence.cli import completion
from ringfence.cli.group import group
from ringfence.cli.output import clear_errors, print_json
from ringfence.record.audit import append_event
from ringfence.record.events import SessionChanged
from ringfence.record.safe_text import one_line, printable
from ringfence.record.session_base import SessionStore

app = group("Conversations that can be resumed, forked and deleted.")
_Json = Annotated[bool, typer.Option("--json", help="JSON on stdout.")]
_Id = Annotated[
    str,
    typer.Argument(
        metavar="SESSION",
        help="Session id, as `ringfence sessions list` prints it.",
        autocompletion=completion.sessions,
    ),
]


@contextmanager
def _store(ctx: typer.Context) -> Iterator[SessionStore]:
    store: SessionStore = ctx.obj.sessions()
    try:
        yield store
    finally:
        store.close()


def _note(ctx: typer.Context, session_id: str, action: Any, parent: str = "") -> None:
    """Called before the change is made, as with everything that changes something."""
    event = SessionChanged(session_id=session_id, action=action, parent=parent)
    append_event(Path(ctx.obj.state_dir) / "audit", event.model_dump())


@app.command("list", epilog="Example: ringfence sessions list --limit 10 --json")
def list_(
    ctx: typer.Context,
    *,
    limit: Annotated[int, typer.Option("--limit", min=1, help="How many at most.")] = 50,
    skip: Annotated[int, typer.Option("--skip", min=0, help="Leave out the latest ones.")] = 0,
    as_json: _Json = False,
) -> None:
    """Sessions, the latest first."""
    with clear_errors(as_json=as_json), _store(ctx) as store:
        sessions = store.sessions(limit=limit, skip=skip)
        if as_json:
            print_json([dataclasses.asdict(session) for session in sessions])
            return
        if not sessions and not skip:
            typer.echo("no sessions yet: `ringfence run` makes one", err=True)
        for session in sessions:
            changed = datetime.fromtimestamp(session.changed, UTC)
            held = " (running)" if session.held_by else ""
            sys.stdout.write(
                f"{session.session_id}  {changed:%Y-%m-%d %H:%M}  {session.entries:>5} entries"
                f"{held}  {one_line(session.first_prompt, 72)}\n"
            )


@app.command(epilog="Example: ringfence sessions show 28cabb36-… --last 5")
def show(
    ctx: typer.Context,
    session: _Id,
    *,
    last: Annotated[
        int | None, typer.Option("--last", min=1, help="Only the last entries.")
    ] = None,
    as_json: _Json = False,
) -> None:
    """Print the conversation; with --json every entry as it is stored."""
    with clear_errors(as_json=as_json), _store(ctx) as store:
        for entry in store.transcript(session, last=last or -1):
            if as_json:
                print_json(entry)
            else:
                for line in _lines(entry):
                    sys.stdout.write(line + "\n")


def _lines(entry: dict[str, Any]) -> Iterator[str]:
    message = entry.get("message")
    role = entry.get("type")
    if role not in {"user", "assistant"} or not isinstance(message, dict) or entry.get("isMeta"):
        return
    content = message.get("content")
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
    for block in blocks if isinstance(blocks, list) else ():
        if isinstance(block, dict):
            yield from _block(str(role), block)


def _block(role: str, block: dict[str, Any]) -> Iterator[str]:
    kind = block.get("type")
    if kind == "text":
        yield f"{role}: {printable(str(block.get('text', '')))}"
    elif kind == "tool_use":
        given = json.dumps(block.get("input"), ensure_ascii=False)
        yield f"  → {one_line(str(block.get('name')))} {one_line(given, 160)}"
    elif kind == "tool_result":
        content = block.get("content")
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        yield f"  ← {one_line(text, 160)}"


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog='Example: ringfence sessions resume 28cabb36-… "And now the tests" --preset ci',
)
def resume(
    ctx: typer.Context,
    session: _Id,
    prompt: Annotated[str, typer.Argument(help="What to do next.")],
) -> None:
    """Go on with a session: the same as `ringfence run PROMPT --resume SESSION` and its options."""
    with clear_errors():
        with _store(ctx) as store:
            store.require(session)
        ctx.obj.run(["run", prompt, "--resume", session, *ctx.args])


@app.command(epilog="Example: ringfence sessions fork 28cabb36-…")
def fork(ctx: typer.Context, session: _Id, *, as_json: _Json = False) -> None:
    """Copy a session under a new id, and print that."""
    with clear_errors(as_json=as_json), _store(ctx) as store:
        new = store.fork(session, record=lambda new: _note(ctx, new, "forked", parent=session))
        if as_json:
            print_json({"session_id": new, "parent": session})
        else:
            sys.stdout.write(new + "\n")


@app.command(epilog="Example: ringfence sessions delete 28cabb36-…")
def delete(ctx: typer.Context, session: _Id, *, as_json: _Json = False) -> None:
    """Delete a session and its subagents' transcripts for good; not while a run holds it."""
    with clear_errors(as_json=as_json), _store(ctx) as store:
        store.remove(session, record=lambda: _note(ctx, session, "deleted"))
        if as_json:
            print_json({"deleted": session})
        else:
            sys.stdout.write(f"deleted {session}\n")
