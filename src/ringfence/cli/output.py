"""How every command speaks: results on stdout, everything for people on stderr."""

from __future__ import annotations

import json
import os
import select
import sqlite3
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

from ringfence.errors import EXTRAS, RingfenceError, UnavailableError, missing_library
from ringfence.record.safe_text import one_line


def print_json(value: Any) -> None:
    """One JSON document and a newline on stdout, flushed, so that a reader sees it at once.

    ASCII: an agent's words reach a terminal by this way, too, where U+009B and bidirectional
    controls act, and a lone surrogate has no UTF-8 at all. A reader of JSON gets the same value.
    """
    sys.stdout.write(json.dumps(value, separators=(",", ":"), default=str))
    sys.stdout.write("\n")
    sys.stdout.flush()


READER_LEFT = 141
"""Exit status when nobody reads the output any more, as `| head -1` does: 128 and SIGPIPE, as of
other programs. Not 0, because the answer was cut off, and no status that a command says things by.
"""


def reader_left() -> bool:
    """Whether it is standard output that broke, and no other pipe."""
    poll = select.poll()
    try:
        poll.register(sys.stdout.fileno(), 0)
    except (OSError, ValueError, AttributeError):
        return False
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


@contextmanager
def quiet_end() -> Iterator[None]:
    """End without a word when the reader has left. What is still in the buffer goes nowhere: at the
    interpreter's end it would fail once more, and say so.
    """
    try:
        yield
    except BrokenPipeError as error:
        if not reader_left():
            known = as_known(error)
            report(known)
            raise typer.Exit(known.status) from None
        nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        raise typer.Exit(READER_LEFT) from None


@contextmanager
def clear_errors(*, as_json: bool = False) -> Iterator[None]:
    """Turn an error into its one line and exit status."""
    try:
        yield
    except (typer.Exit, typer.Abort, typer.BadParameter):
        raise
    except Exception as error:  # no traceback reaches a user
        if isinstance(error, BrokenPipeError) and reader_left():
            raise
        known = as_known(error)
        report(known, as_json=as_json)
        raise typer.Exit(known.status) from None


def as_known(error: Exception) -> RingfenceError:
    """The error with a code. What nobody foresaw is the host's fault, or a defect of ours; with
    RINGFENCE_LOG=debug its traceback is printed.
    """
    if isinstance(error, RingfenceError):
        return error
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in EXTRAS:
        return missing_library(error)
    if os.environ.get("RINGFENCE_LOG") == "debug":
        traceback.print_exception(error)
    if isinstance(error, OSError | sqlite3.Error):
        return UnavailableError(
            "host-failed",
            f"{error}",
            hint="see that the disk is not full and the state directory can be written",
        )
    return UnavailableError(
        "internal",
        " ".join(f"{type(error).__name__}: {error}".split()),
        hint="this is a defect: please report it with the output of RINGFENCE_LOG=debug",
    )


def report(error: RingfenceError, *, as_json: bool = False) -> None:
    """Print an error as every command does. Its words may come from inside."""
    if as_json:
        print_json({"error": error.to_json()})
    else:
        lines = [one_line(line) for line in error.render().split("\n")]
        sys.stderr.write("ringfence: " + "\n".join(lines) + "\n")
