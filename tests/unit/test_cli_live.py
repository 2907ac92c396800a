"""What a person sees while a run starts."""

from __future__ import annotations

import io

from rich.console import Console

from ringfence.agent.messages import Notice, Progress
from ringfence.cli.live import LiveView


def shown(*, terminal: bool) -> str:
    view, out = LiveView(command=False), io.StringIO()
    view.console = Console(file=out, force_terminal=terminal, width=80, highlight=False)
    for message in (
        Progress(waits_for="sandbox"),
        Notice(kind="x", text="not enforced"),
        Progress(waits_for="agent"),
        Progress(waits_for="ready"),
    ):
        view.show(message)
    return out.getvalue()


def test_a_terminal_says_what_is_waited_for() -> None:
    text = shown(terminal=True)
    assert text.index("starting the sandbox…") < text.index("starting claude…")
    assert "not enforced" in text
    assert text.count("\x1b[2K") == 4, "each line takes the place of the one before"


def test_a_log_holds_no_passing_line() -> None:
    assert shown(terminal=False).splitlines() == ["! not enforced"]
