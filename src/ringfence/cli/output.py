"""How every command speaks: results on stdout, everything for people on stderr."""

from __future__ import annotations

import json
import os
import sqlite3
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

from ringfence.errors import RingfenceError, UnavailableError
from ringfence.record.safe_text import printable


def print_json(value: Any) -> None:
    """One JSON document and a newline on stdout, flushed, so that a reader sees it at once."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str)
    # a character that was cut in half, and a file name that is no text, have no UTF-8
    sys.stdout.write(text.encode("utf-8", "replace").decode() + "\n")
    sys.stdout.flush()


@contextmanager
def clear_errors(*, as_json: bool = False) -> Iterator[None]:
    """Turn an error into its one line and exit status."""
    try:
        yield
    except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError):
        raise
    except Exception as error:  # noqa: BLE001  no traceback reaches a user
        known = as_known(error)
        report(known, as_json=as_json)
        raise typer.Exit(known.status) from None


def as_known(error: Exception) -> RingfenceError:
    """The error with a code. What nobody foresaw is the host's fault, or a defect of ours; with
    RINGFENCE_LOG=debug its traceback is printed.
    """
    if isinstance(error, RingfenceError):
        return error
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
        f"{type(error).__name__}: {error}",
        hint="this is a defect: please report it with the output of RINGFENCE_LOG=debug",
    )


def report(error: RingfenceError, *, as_json: bool = False) -> None:
    """Print an error as every command does. Its words may come from inside."""
    if as_json:
        print_json({"error": error.to_json()})
    else:
        sys.stderr.write(f"ringfence: {printable(error.render())}\n")
