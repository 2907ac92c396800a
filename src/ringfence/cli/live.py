"""Watching a run: tool calls as they are decided and end, for people or as JSON lines."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from rich.console import Console
from rich.control import Control
from rich.markup import escape
from rich.segment import ControlType
from rich.text import Text as RichText

from ringfence.agent.messages import AgentMessage, Notice, Progress, Text, ToolEnded, ToolStarted
from ringfence.cli.output import print_json
from ringfence.record.safe_text import one_line, printable

_WIDTH = 100
_STARTING = {"sandbox": "starting the sandbox…", "agent": "starting claude…"}


class LiveView:
    """Lines on stderr; a command's own output goes to stdout as it comes.

    Everything that came from inside is stripped of escapes and bidi controls first.
    """

    def __init__(self, *, command: bool) -> None:
        self._command, self._passing = command, False
        self.said = ""
        """What the agent said last, as it was printed."""
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)

    def show(self, message: AgentMessage) -> None:
        """Print one message."""
        if self._passing and not isinstance(message, Progress):
            self._progress("")
        if self._command and isinstance(message, Text):
            sys.stdout.write(printable(message.text))
            sys.stdout.flush()
        elif isinstance(message, Text):
            self.said = printable(message.text.strip())
            self.console.print(RichText(self.said, style="default"))
        elif isinstance(message, ToolStarted):
            self._tool(message)
        elif isinstance(message, ToolEnded):
            mark = {"success": "[green]✓", "failure": "[yellow]✗"}.get(message.outcome, "[red]✗")
            self.console.print(
                f"  {mark}[/] [dim]{escape(message.outcome)}, {message.duration_ms / 1000:.2f} s[/]"
            )
        elif isinstance(message, Progress):
            self._progress(_STARTING.get(message.waits_for, ""))
        elif isinstance(message, Notice):
            self.console.print(f"[yellow]! {escape(one_line(message.text))}[/]")

    def _progress(self, words: str) -> None:
        """One line that the next overwrites: on a terminal only, a log is not for what passes."""
        if self.console.is_terminal and not self._command:
            self.console.control(Control.move_to_column(0), Control((ControlType.ERASE_IN_LINE, 2)))
            self.console.print(f"[dim]{words}[/]", end="")
            self._passing = bool(words)

    def _tool(self, message: ToolStarted) -> None:
        shown = one_line(brief(message.input))
        line = f"[bold cyan]▸ {escape(one_line(message.name))}[/] {escape(shown)}"
        if not message.allowed:
            line += f" [red]denied[/] [dim]({escape(one_line(message.reason))})[/]"
        self.console.print(line)


def brief(tool_input: dict[str, Any]) -> str:
    """The one field of a tool's input that says most, cut to a line."""
    for key in ("command", "file_path", "pattern", "path", "url", "query", "description"):
        if isinstance(tool_input.get(key), str):
            text = tool_input[key]
            break
    else:
        text = json.dumps(tool_input, ensure_ascii=False, default=str) if tool_input else ""
    text = " ".join(text.split())
    return text if len(text) <= _WIDTH else f"{text[:_WIDTH]}…"


class StreamJson:
    """One JSON object a line on stdout."""

    def show(self, message: AgentMessage) -> None:
        """Print one message."""
        print_json(message.to_json())


def said_here(view: object) -> str:
    """What a view has printed last where answers go, too: one terminal, or one file of `2>&1`,
    where the answer would stand twice. Empty when standard output is a place of its own.
    """
    try:
        one_place = os.path.samestat(os.fstat(1), os.fstat(2))
    except OSError:
        return ""  # one of them is closed
    return view.said if one_place and isinstance(view, LiveView) else ""


class Silent(StreamJson):
    """Prints nothing."""

    def show(self, message: AgentMessage) -> None:
        """Print nothing."""


def silent() -> Silent:
    """A view for `--output json`."""
    return Silent()
