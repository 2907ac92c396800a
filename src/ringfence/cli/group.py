"""Groups of commands: the list of a group's commands says whole sentences."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

from ringfence.cli.output import quiet_end

_SENTENCE = 300


@contextmanager
def _plain_words() -> Iterator[None]:
    """A choice that is none is refused in words that begin with the name of a Python class."""
    try:
        yield
    except typer.BadParameter as error:
        error.message = error.message.removeprefix("Value error, ")
        raise


class Group(TyperGroup):
    """As Typer's, which ends what a command does with `...` where the line ends."""

    def make_context(self, *given: Any, **more: Any) -> Any:
        """See click; here the help of the first group is printed."""
        with quiet_end(), _plain_words():
            return super().make_context(*given, **more)

    def invoke(self, ctx: Any) -> Any:
        """See click: whatever command it is, it runs in here."""
        with quiet_end(), _plain_words():
            return super().invoke(ctx)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """See click: called when help is printed."""
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        rows = [(n, c.get_short_help_str(_SENTENCE)) for n, c in commands if c and not c.hidden]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def group(text: str, **more: Any) -> typer.Typer:
    """A group that prints its help when it is called with nothing."""
    defaults = {"no_args_is_help": True, "rich_markup_mode": None}
    return typer.Typer(cls=Group, help=text, **(defaults | more))
