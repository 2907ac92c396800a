"""Groups of commands: the list of a group's commands says whole sentences."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

_SENTENCE = 300


class Group(TyperGroup):
    """As Typer's, which ends what a command does with `...` where the line ends."""

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
