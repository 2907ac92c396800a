"""How every command speaks: results on stdout, everything for people on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

from ringfence.errors import RingfenceError
from ringfence.record.safe_text import one_line


def print_json(value: Any) -> None:
    """One JSON document and a newline on stdout, flushed, so that a reader sees it at once.

    ASCII: an agent's words reach a terminal by this way, too, where U+009B and bidirectional
    controls act, and a lone surrogate has no UTF-8 at all. A reader of JSON gets the same value.
    """
    sys.stdout.write(json.dumps(value, separators=(",", ":"), default=str))
    sys.stdout.write("\n")
    sys.stdout.flush()


@contextmanager
def clear_errors(*, as_json: bool = False) -> Iterator[None]:
    """Turn a RingfenceError into its one line and exit status; nothing else is swallowed."""
    try:
        yield
    except RingfenceError as error:
        report(error, as_json=as_json)
        raise typer.Exit(error.status) from None


def report(error: RingfenceError, *, as_json: bool = False) -> None:
    """Print an error as every command does."""
    if as_json:
        print_json({"error": error.to_json()})
    else:
        lines = [one_line(line) for line in error.render().split("\n")]
        sys.stderr.write("ringfence: " + "\n".join(lines) + "\n")
