"""What the person at the terminal is shown before they say yes."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from ringfence.agent.permissions import Question
from ringfence.cli.approve import TerminalApprover


def shown(**tool_input: Any) -> str:
    out = io.StringIO()
    question = Question(
        session_id="s",
        tool_use_id="t",
        name="Bash[/]",
        input=tool_input,
        input_sha256="0",
        reason="default",
    )
    TerminalApprover(Console(file=out, width=200))._show(question)
    return out.getvalue()


def test_a_short_call_is_shown_whole() -> None:
    text = shown(command="make test")
    assert '"command": "make test"' in text
    assert "not shown" not in text
    assert "allow every Bash[/] of this run" in text


def test_the_end_of_a_long_call_cannot_hide() -> None:
    text = shown(command="echo " + "a" * 50_000 + "; rm -rf x")
    assert "rm -rf x" in text
    assert "characters are not shown" in text
    assert len(text) < 10_000


def test_no_escape_reaches_the_terminal() -> None:
    text = shown(command="\x1b[2J\u202eevil\x9b")
    assert not set(text) & {"\x1b", "\u202e", "\x9b"}
