"""Asking the person at the terminal (requirement G); where there is none, everything is denied."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from rich.console import Console
from rich.markup import escape

from ringfence.agent.permissions import Answer, Approver, DenyApprover, Question
from ringfence.record.safe_text import printable

EXPIRES_SECONDS = 600.0
_SHOWN = 2000


def approver(view: Any) -> Approver:
    """The terminal, when there is one on both sides."""
    if sys.stdin.isatty() and sys.stderr.isatty():
        return TerminalApprover(getattr(view, "console", Console(stderr=True)))
    return DenyApprover()


class TerminalApprover:
    """Shows the call with escapes stripped, and takes one letter. No answer in time denies."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._one_at_a_time = asyncio.Lock()

    async def ask(self, question: Question) -> Answer:
        """See Approver."""
        async with self._one_at_a_time:
            self._show(question)
            try:
                async with asyncio.timeout(EXPIRES_SECONDS):
                    return await self._answer(question)
            except TimeoutError:
                return Answer(allowed=False, message="nobody answered in time")

    def _show(self, question: Question) -> None:
        body = json.dumps(question.input, ensure_ascii=False, indent=2, default=str)
        if len(body) > 2 * _SHOWN:
            # what is left out is said where it is: an end out of sight would be a place to hide
            left = len(body) - 2 * _SHOWN
            body = f"{body[:_SHOWN]}\n[… {left} characters are not shown …]\n{body[-_SHOWN:]}"
        name = escape(printable(question.name))
        self._console.print(f"[bold yellow]? {name}[/]")
        self._console.print(escape(printable(body)))
        self._console.print(
            f"[bold]a[/]llow once · allow every {name} of this [bold]r[/]un · "
            "[bold]d[/]eny (d MESSAGE tells the agent why)"
        )

    async def _answer(self, question: Question) -> Answer:
        while True:
            line = (await _read_line()).strip()
            letter, _, words = line.partition(" ")
            if letter == "a":
                return Answer(allowed=True, message="allowed once by the person")
            if letter == "r":
                return Answer(allowed=True, for_this_run=True, message="allowed by the person")
            if letter in {"d", ""}:
                return Answer(allowed=False, message=words or "denied by the person")
            self._console.print(f"a, r or d, for {escape(question.name)}?")


async def _read_line() -> str:
    """A line of the terminal without a thread, so that a timeout leaves nobody reading it."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_reader(sys.stdin, _settle, ready)
    try:
        await ready
        return sys.stdin.readline()
    finally:
        loop.remove_reader(sys.stdin)


def _settle(future: asyncio.Future[None]) -> None:
    """The descriptor is ready; it may say so twice before the reader is removed."""
    if not future.done():
        future.set_result(None)
