"""`ringfence audit`: show, verify, export, checkpoint, key."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sqlite3
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import ringfence
from ringfence.cli import completion
from ringfence.cli.group import group
from ringfence.cli.output import clear_errors, print_json
from ringfence.errors import CallerError, UnavailableError, words
from ringfence.model import Usage
from ringfence.record import ocsf
from ringfence.record import verify as verifier
from ringfence.record.merkle import leaf_hash
from ringfence.record.read import AuditReader
from ringfence.record.safe_text import one_line
from ringfence.record.usage import RequestUsage, total

_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

app = group("Read and verify the audit log: what was asked, decided, sent, spent and ended.")
_FOLLOW_SECONDS = 0.25
_BAD = 3
_HEAD = ("index", "time", "source", "type", "run_id", "session_id", "sandbox_id")


def _directory(ctx: typer.Context) -> Path:
    return Path(ctx.obj.state_dir) / "audit"


@app.command(
    epilog="Examples: ringfence audit show --run run_01J…   ·   ringfence audit show --follow"
)
def show(
    ctx: typer.Context,
    *,
    run: Annotated[
        str | None, typer.Option("--run", help="Only this run.", autocompletion=completion.runs)
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Go on as records come.")] = False,
    last: Annotated[int, typer.Option("--last", min=1, help="How many, without --run.")] = 50,
    as_json: Annotated[bool, typer.Option("--json", help="One record a line, as stored.")] = False,
) -> None:
    """Print records, oldest first; the last 50 unless a run is named."""
    with clear_errors(as_json=as_json), AuditReader(_directory(ctx)) as reader:
        after = -1
        for record in reader.all_events(run) if run else reader.last(last):
            _print(record, as_json=as_json)
            after = record["index"]
        if follow:
            for record in _follow(reader, run, after):
                _print(record, as_json=as_json)


def _follow(reader: AuditReader, run: str | None, after: int) -> Iterator[dict[str, Any]]:
    """New records until Ctrl-C, which is how one leaves and no error."""
    try:
        while True:
            for record in reader.events(run, after=after):
                after = record["index"]
                yield record
            time.sleep(_FOLLOW_SECONDS)
    except KeyboardInterrupt:
        return


def _print(record: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(record)
        return
    rest = " ".join(
        f"{name}={one_line(str(value), 120)}"
        for name, value in record.items()
        if name not in _HEAD and value not in ("", None, [], {})
    )
    head = f"{record['index']:>7} {record.get('time', '')} {record.get('source', ''):<8} "
    sys.stdout.write(one_line(f"{head}{record.get('type', ''):<18} {rest}") + "\n")
    sys.stdout.flush()


@app.command(epilog="Example: ringfence audit verify --anchor /mnt/another-host/checkpoints")
def verify(
    ctx: typer.Context,
    *,
    path: Annotated[Path | None, typer.Argument(help="A copied log; this host's own.")] = None,
    public_key: Annotated[Path | None, typer.Option("--public-key", help="Its public key.")] = None,
    anchor: Annotated[
        list[Path] | None,
        typer.Option(
            "--anchor", metavar="FILE", help="A file of checkpoints that were kept elsewhere."
        ),
    ] = None,
    as_json: _Json = False,
) -> None:
    """Verify the log. Exit status 0 when it is good, 3 when not: the first bad index is named."""
    with clear_errors(as_json=as_json):
        log = path or _directory(ctx) / "log.sqlite"
        key = public_key or log.parent / "public.key"
        if not log.is_file():
            raise CallerError(
                "audit-invalid", f"{log} is not there", hint="name a log, or run first"
            )
        try:
            texts = [_read_anchor(entry) for entry in anchor or []]
            head = log.parent / "head"
            if path is None and head.exists():
                texts.append(_read(head))
            warnings = [] if path else _add_own_anchor(ctx, texts)
            # a copy may have been made in the middle of a run; this host's own log goes on
            now = None if path else time.time()
            report = verifier.verify(log, _read(key), texts, now=now)
            report.warnings += warnings
        except verifier.UsageError as error:
            raise CallerError("audit-invalid", str(error)) from None
        if as_json:
            print_json(report.to_json())
        else:
            for line in verifier.describe(report).splitlines():
                sys.stdout.write(one_line(line) + "\n")
        if not report.ok:
            raise typer.Exit(_BAD)


def _add_own_anchor(ctx: typer.Context, texts: list[str]) -> list[str]:
    """The file that the settings have recorders anchor this log in; a warning while it is not
    there, which is how it looks before the first run, and after somebody took it away.
    """
    file: Path | None = ctx.obj.config.audit.anchor.file
    if file is None:
        return []
    if not file.exists():
        return [f"there is no checkpoint at {file}: nothing but this host vouches for the log"]
    texts.append(_read_anchor(file))
    return []


def _read_anchor(path: Path) -> str:
    """Of a line that was cut off half a character may be left, which spoils no other."""
    return _read(path, errors="replace")


def _why(error: OSError | UnicodeDecodeError) -> str:
    return words(error) if isinstance(error, OSError) else "it is not text"


def _read(path: Path, errors: str = "strict") -> str:
    try:
        return path.read_text(encoding="utf-8", errors=errors)
    except (OSError, UnicodeDecodeError) as error:
        raise CallerError("audit-invalid", f"{path} cannot be read: {_why(error)}") from None


@app.command(
    epilog="Examples: ringfence audit export --verifier --jsonl --out evidence   ·   "
    "ringfence audit export --format ocsf --after 41999 --out -"
)
def export(
    ctx: typer.Context,
    *,
    out: Annotated[Path, typer.Option("--out", help="A directory; made if absent.")] = Path(),
    jsonl: Annotated[
        bool,
        typer.Option("--jsonl", help="Add records.jsonl: a record a line, the bytes as hashed."),
    ] = False,
    with_verifier: Annotated[
        bool, typer.Option("--verifier", help="Add verify.py, which needs nothing of ringfence.")
    ] = False,
    form: Annotated[
        Literal["log", "ocsf"],
        typer.Option("--format", help="ocsf: events of OCSF 1.8.0 in ocsf.jsonl, and no log."),
    ] = "log",
    after: Annotated[
        int, typer.Option("--after", min=-1, help="ocsf: only records after this index.")
    ] = -1,
    as_json: _Json = False,
) -> None:
    """Copy the log, its public key and its last checkpoint, for whoever is to verify it.

    With --format ocsf, write its records as events for a SIEM instead; `--out -` prints them.
    """
    with clear_errors(as_json=as_json):
        directory = _directory(ctx)
        if form == "ocsf":
            _export_ocsf(directory, out, after, as_json=as_json)
            return
        if after != -1:
            raise CallerError("usage", "--after goes with --format ocsf: a log is whole")
        with AuditReader(directory) as reader:
            notes = reader.checkpoints()
        if out.resolve() == directory.resolve():
            # recorders would go on with a file that has no name any more
            raise CallerError("usage", f"{out} holds the log itself; name another directory")
        try:
            out.mkdir(parents=True, exist_ok=True)
            names = ["log.sqlite", "public.key", "checkpoint"]
            _copy_database(directory / "log.sqlite", out / "log.sqlite")
            if jsonl:
                _write_lines(out)
                names.append("records.jsonl")
            shutil.copyfile(directory / "public.key", out / "public.key")
            (out / "checkpoint").write_text(notes[-1][1] if notes else "", encoding="utf-8")
            if with_verifier:
                shutil.copyfile(str(verifier.__file__), out / "verify.py")
                names.append("verify.py")
        except (OSError, sqlite3.Error) as error:
            raise UnavailableError(
                "store-unavailable", f"cannot export to {out}: {error}"
            ) from None
        if as_json:
            print_json({"out": str(out), "files": names})
        else:
            sys.stdout.write("".join(f"{out / name}\n" for name in names))


def _export_ocsf(directory: Path, out: Path, after: int, *, as_json: bool) -> None:
    """Whole or not at all in a directory; as they come on standard output."""
    with AuditReader(directory) as reader:
        if out == Path("-"):
            for line in _ocsf_lines(reader, after):
                sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()
            return
        part = out / "ocsf.jsonl.part"
        try:
            out.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                file.writelines(_ocsf_lines(reader, after))
            part.replace(out / "ocsf.jsonl")
        except OSError as error:
            raise UnavailableError(
                "store-unavailable", f"cannot export to {out}: {error}"
            ) from None
    if as_json:
        print_json({"out": str(out), "files": ["ocsf.jsonl"]})
    else:
        sys.stdout.write(f"{out / 'ocsf.jsonl'}\n")


def _ocsf_lines(reader: AuditReader, after: int) -> Iterator[bytes]:
    for index, body in reader.bodies(after):
        try:
            told = ocsf.event(
                json.loads(body),
                index=index,
                leaf=leaf_hash(body).hex(),
                version=ringfence.__version__,
            )
            line = json.dumps(told, separators=(",", ":"), allow_nan=False)
        except (ValueError, TypeError, AttributeError, RecursionError):
            raise UnavailableError(
                "audit-invalid", f"record {index} cannot be read", hint="ringfence audit verify"
            ) from None
        yield line.encode() + b"\n"


def _write_lines(out: Path) -> None:
    """From the copy, so that both say the same."""
    part = out / "records.jsonl.part"
    with AuditReader(out) as reader, part.open("wb") as file:
        file.writelines(body + b"\n" for _, body in reader.bodies())
    part.replace(out / "records.jsonl")


def _copy_database(source: Path, target: Path) -> None:
    """One consistent file, whatever recorders write meanwhile; replaces an older copy whole."""
    part = target.with_name(target.name + ".part")
    part.unlink(missing_ok=True)
    reading = sqlite3.connect(f"{source.absolute().as_uri()}?mode=ro", uri=True)
    writing = sqlite3.connect(part)
    try:
        reading.backup(writing)
        writing.execute("PRAGMA journal_mode=DELETE")
    finally:
        writing.close()
        reading.close()
    part.replace(target)


@app.command(epilog="Example: ringfence audit usage --run run_01J… --json")
def usage(
    ctx: typer.Context,
    *,
    run: Annotated[
        str | None,
        typer.Option("--run", help="Each model request of it.", autocompletion=completion.runs),
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="How many runs.")] = 20,
    as_json: _Json = False,
) -> None:
    """Tokens and dollars: of the latest runs, or of one run's model requests."""
    with clear_errors(as_json=as_json), AuditReader(_directory(ctx)) as reader:
        if run:
            _print_requests(reader.usage(run), as_json=as_json)
        else:
            _print_runs(reader, limit, as_json=as_json)


def _print_requests(entries: list[RequestUsage], *, as_json: bool) -> None:
    if as_json:
        print_json([dataclasses.asdict(entry) for entry in entries])
        return
    for entry in entries:
        head = f"{entry.request_id}  {entry.status}  {entry.model}"
        sys.stdout.write(one_line(f"{head}  {_amounts(entry.usage)}") + "\n")
    sys.stdout.write(f"total  {_amounts(total(entries))}\n")


def _print_runs(reader: AuditReader, limit: int, *, as_json: bool) -> None:
    rows = [(summary, total(reader.usage(summary.run_id))) for summary in reader.runs(limit)]
    if as_json:
        asdict = dataclasses.asdict
        print_json([{**asdict(summary), "usage": asdict(used)} for summary, used in rows])
        return
    if not rows:
        typer.echo("the log holds no run yet", err=True)
    for summary, used in rows:
        head = f"{summary.run_id}  {summary.started[:19]}  {summary.status or 'open'}"
        sys.stdout.write(one_line(f"{head}  {used.requests} requests  {_amounts(used)}") + "\n")


def _amounts(used: Usage) -> str:
    cached = used.cache_creation_input_tokens + used.cache_read_input_tokens
    cost = "unknown price" if used.cost_usd is None else f"${used.cost_usd:.4f}"
    tokens = f"{used.input_tokens} in  {used.output_tokens} out"
    return f"{tokens}  {cached} cached  {cost}" if cached else f"{tokens}  {cost}"


@app.command(epilog="Example: ringfence audit checkpoint >> checkpoints")
def checkpoint(ctx: typer.Context, *, as_json: _Json = False) -> None:
    """Sign the log as it is now and print the checkpoint, to be kept where root here cannot."""
    from ringfence.record.audit import AuditLog

    with clear_errors(as_json=as_json):
        _must_exist(ctx)
        log = AuditLog(_directory(ctx))
        try:
            note = log.checkpoint()
        finally:
            log.close()
        if as_json:
            print_json({"checkpoint": note})
        else:
            sys.stdout.write(note)


@app.command(epilog="Example: ringfence audit key > host.key")
def key(
    ctx: typer.Context,
    *,
    rotate: Annotated[
        bool, typer.Option("--rotate", help="Change the signing key; old records stay verifiable.")
    ] = False,
    as_json: _Json = False,
) -> None:
    """Print the public key, which is all that a verifier needs."""
    from ringfence.record.audit import AuditLog

    with clear_errors(as_json=as_json):
        if not rotate:
            _must_exist(ctx)
        log = AuditLog(_directory(ctx))
        try:
            public = log.rotate() if rotate else log.public_key
        finally:
            log.close()
        if as_json:
            print_json({"public_key": public})
        else:
            sys.stdout.write(public + "\n")


def _must_exist(ctx: typer.Context) -> None:
    with AuditReader(_directory(ctx)):
        pass
