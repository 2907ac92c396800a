"""Help of every command: an example that its own parser takes, and words for every argument."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import Any

import pytest
import typer

from ringfence.cli.main import app


def _leaves(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    subcommands = getattr(command, "commands", None)
    if not subcommands:
        yield path, command
    else:
        for name, below in subcommands.items():
            yield from _leaves(below, (*path, name))


COMMANDS = dict(_leaves(typer.main.get_command(app)))
_WORDS = re.compile(r"ringfence ((?:[^\n·|()>]|\([^)]*\))+)")


def _examples(command: Any) -> list[list[str]]:
    """Of the epilog; what stands behind a pipe, a redirection or a gap is not the command's."""
    text = re.sub(r"\s{2,}ringfence", "\nringfence", command.epilog or "")
    return [shlex.split(re.split(r"\s{3,}", each)[0]) for each in _WORDS.findall(text)]


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_a_command_has_an_example_that_it_takes(path: tuple[str, ...]) -> None:
    command = COMMANDS[path]
    ours = [words for words in _examples(command) if tuple(words[: len(path)]) == path]
    assert ours, f"ringfence {' '.join(path)}: no example in its help"
    taken = [command, COMMANDS["run",]] if path == ("sessions", "resume") else [command]
    known = {flag for each in taken for one in each.params for flag in one.opts}
    for words in ours:
        # parsed as when it is typed; nothing is done, and files need not be there
        command.make_context("ringfence", words[len(path) :])
        # what a command hands on to another is not looked at by its parser
        before = words[: [*words, "--"].index("--")]
        assert [w for w in before if w.startswith("--") and w not in known] == []


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_option_and_argument_says_what_it_is(path: tuple[str, ...]) -> None:
    # one that is hidden stands in the command's own sentence
    shown = [one for one in COMMANDS[path].params if not getattr(one, "hidden", False)]
    assert [one.name for one in shown if not getattr(one, "help", None)] == []
