"""`ringfence image`: the root file system that an agent sees, made here, without a registry."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ringfence.cli import completion
from ringfence.cli.context import AppContext
from ringfence.cli.group import group
from ringfence.cli.output import clear_errors, print_json
from ringfence.errors import CallerError
from ringfence.record.safe_text import one_line

if TYPE_CHECKING:
    from ringfence.images.build import Watcher
    from ringfence.images.definition import ImageDefinition
    from ringfence.images.image import Image

app = group("Root file systems for agents, built on this host without a container registry.")

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Name = Annotated[
    str,
    typer.Argument(help="Name or sha256:… digest of an image.", autocompletion=completion.images),
]
Definition = Annotated[
    Path | None, typer.Argument(metavar="[FILE]", help="Definition (YAML); the built-in one.")
]


class Form(StrEnum):
    """How an image leaves."""

    TAR = "tar"
    DOCKER = "docker-archive"
    OCI = "oci"
    EXT4 = "ext4"
    SQUASHFS = "squashfs"


@app.command(
    "build",
    short_help="Build an image, or say at once that it is built.",
    epilog="Examples: ringfence image build   ·   ringfence image build mine.yaml "
    "--name mine   ·   ringfence image build --from-host",
)
def build(
    context: typer.Context,
    definition: Definition = None,
    *,
    name: Annotated[str, typer.Option(help="What to call it.")] = "agent",
    from_host: Annotated[
        bool,
        typer.Option(
            "--from-host", help="Take packages installed on this host; needs no mmdebstrap."
        ),
    ] = False,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Ask the mirrors again, though it is built already.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Build an image, or say at once that it is built.

    Packages come from the Debian mirrors that this host uses (mmdebstrap), wheels from the index
    of its pip. The same packages give the same digest, as root or not. Progress is on stderr.
    """
    with clear_errors(as_json=as_json), _ended_cleanly():
        from ringfence.images.build import build as build_image
        from ringfence.worker.launch import claude_binary, private_directory

        state: AppContext = context.obj
        wanted = _definition(definition)
        if from_host:
            wanted = _from_host(wanted)
        private_directory(state.state_dir)
        with _watched() as watcher:
            built = build_image(
                state.state_dir,
                wanted,
                name=name,
                claude=claude_binary(state.config),
                watcher=watcher,
                rebuild=rebuild,
            )
        if as_json:
            print_json({**_row([name], built.image), "cached": built.cached})
        else:
            how = "was built before" if built.cached else "is built"
            typer.echo(f"{name} {how}: {built.image.digest}")


def _definition(path: Path | None) -> ImageDefinition:
    from importlib.resources import files

    from ringfence.images.definition import loads

    if path is None:
        return loads((files("ringfence.images") / "agent.yaml").read_bytes(), source="agent.yaml")
    try:
        return loads(path.read_bytes(), source=str(path))
    except OSError as error:
        raise CallerError("usage", f"{path} cannot be read: {error.strerror}") from None


def _from_host(definition: ImageDefinition) -> ImageDefinition:
    """The same packages, from this host; what such a definition may not say is refused."""
    from ringfence.images.definition import loads

    return loads(json.dumps({**definition.model_dump(mode="json"), "source": "host"}))


@contextmanager
def _ended_cleanly() -> Iterator[None]:
    """SIGTERM and SIGHUP end a build as Ctrl-C does: what it began is taken away."""

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = {each: signal.signal(each, interrupt) for each in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("ringfence: ended; nothing half-built is left", err=True)
        raise typer.Exit(130) from None
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@contextmanager
def _watched() -> Iterator[Watcher]:
    """A line a step with its time; on a terminal also what a program is saying."""
    from rich.console import Console

    from ringfence.images.build import Watcher

    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    began = time.monotonic()
    with console.status("") as status:

        def step(text: str) -> None:
            console.print(f"[{time.monotonic() - began:5.1f} s] {one_line(text)}")
            status.update(one_line(text)[:100])

        def line(text: str) -> None:
            status.update(one_line(text)[:100])

        yield Watcher(step=step, line=line)
        step("done")


@app.command("list", epilog="Example: ringfence image list --json")
def list_(context: typer.Context, *, as_json: Json = False) -> None:
    """Names, digests and what they were made from."""
    with clear_errors(as_json=as_json):
        store = _store(context)
        rows = [_row([name], store.find(name)) for name in store.names()]
        if as_json:
            print_json(rows)
            return
        for row in rows:
            counts = ", ".join(f"{count} {kind}" for kind, count in row["packages"].items())
            typer.echo(f"{row['names'][0]:20} {row['digest'][:19]}…  {row['suite']}  {counts}")
        if not rows:
            typer.echo("There is no image yet. Start with: ringfence image build", err=True)


def _store(context: typer.Context) -> Any:
    from ringfence.images.store import ImageStore

    state: AppContext = context.obj
    return ImageStore(state.state_dir)


def _row(names: list[str], image: Image) -> dict[str, Any]:
    packages = image.manifest["packages"]
    return {
        "names": names,
        "digest": image.digest,
        "suite": image.manifest["suite"],
        "source": image.manifest["definition"]["source"],
        "rootfs": str(image.rootfs),
        "packages": {kind: len(found) for kind, found in packages.items()},
    }


@app.command(
    "show",
    epilog="Examples: ringfence image show agent   ·   ringfence image show agent --sbom",
)
def show(
    context: typer.Context,
    name: Name = "agent",
    *,
    sbom: Annotated[
        bool, typer.Option("--sbom", help="Print a bill of materials (CycloneDX 1.5 JSON).")
    ] = False,
    as_json: Json = False,
) -> None:
    """What is in an image: every package with its version."""
    with clear_errors(as_json=as_json or sbom):
        image = _store(context).require(name)
        if sbom:
            from ringfence.images.contents import cyclonedx

            typer.echo(json.dumps(cyclonedx(image.digest, image.manifest), indent=2))
            return
        names = [each for each, digest in _store(context).names().items() if digest == image.digest]
        if as_json:
            print_json({**_row(names, image), **image.manifest})
            return
        typer.echo(f"digest   {image.digest}\nnames    {', '.join(names)}\nrootfs   {image.rootfs}")
        typer.echo(f"suite    {image.manifest['suite']} ({image.manifest['architecture']})")
        for kind, found in image.manifest["packages"].items():
            for package, version in found.items():
                typer.echo(f"{kind}  {one_line(package):32} {one_line(version)}")


@app.command("verify", epilog="Example: ringfence image verify agent")
def verify(context: typer.Context, name: Name = "agent", *, as_json: Json = False) -> None:
    """Read every file and compare it with the manifest; fails (4) on any difference."""
    with clear_errors(as_json=as_json):
        from ringfence.images.whole import differences

        image = _store(context).find(name)
        found = differences(image)
        if as_json:
            print_json({"digest": image.digest, "whole": not found, "differences": found})
        elif found:
            for line in found:
                typer.echo(one_line(line))
        else:
            typer.echo(f"{image.digest} is whole")
        raise typer.Exit(4 if found else 0)


@app.command(
    "export",
    short_help="Write an image for podman, docker or a virtual machine.",
    epilog="Examples: ringfence image export agent | podman load   ·   ringfence image export "
    "agent --format tar -o agent.tar   ·   ringfence image export agent --format ext4 -o a.ext4",
)
def export(
    context: typer.Context,
    name: Name = "agent",
    *,
    form: Annotated[Form, typer.Option("--format", help="What to write.")] = Form.DOCKER,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File; standard output by default.")
    ] = None,
    tag: Annotated[
        str, typer.Option(help="Name within podman or docker.")
    ] = "localhost/ringfence-agent:latest",
) -> None:
    """Write an image: docker-archive and oci for `podman load`, tar for `podman import`.

    ext4 and squashfs are disks of a virtual machine, made without root. But for ext4, the same
    image gives the same bytes.
    """
    with clear_errors(), _ended_cleanly():
        _check_tag(tag)
        image = _store(context).require(name)
        with image.held():
            if output is None:
                _to_stdout(image, form, tag)
            else:
                _to_file(image, form, tag, output)


def _check_tag(tag: str) -> None:
    part = r"[a-z0-9]+(?:[._-]+[a-z0-9]+)*"
    if not re.fullmatch(rf"{part}(?:/{part})*:[A-Za-z0-9_][A-Za-z0-9._-]{{0,127}}", tag):
        raise CallerError("usage", "a tag is written as name:version, as localhost/mine:latest")


def _to_stdout(image: Image, form: Form, tag: str) -> None:
    from ringfence.images.archive import WRITERS

    if form not in WRITERS:
        raise CallerError("usage", f"{form} needs a file", hint="give --output FILE")
    if sys.stdout.isatty():
        raise CallerError(
            "usage", "an archive is not for a terminal", hint="give --output FILE, or a pipe"
        )
    WRITERS[form](image, tag, sys.stdout.buffer)
    sys.stdout.buffer.flush()


def _to_file(image: Image, form: Form, tag: str, output: Path) -> None:
    """Whole or not at all: written beside, then renamed."""
    from ringfence.images import archive, disk

    try:
        handle, name = tempfile.mkstemp(prefix=f".{output.name}.", dir=output.parent)
    except OSError as error:
        raise CallerError("usage", f"{output} cannot be written: {error.strerror}") from None
    os.close(handle)
    written = Path(name)
    try:
        if form is Form.EXT4:
            disk.write_ext4(image, written)
        elif form is Form.SQUASHFS:
            written.unlink()
            disk.write_squashfs(image, written)
        else:
            with written.open("wb") as file:
                archive.WRITERS[form](image, tag, file)
        written.chmod(0o644)
        written.replace(output)
    finally:
        written.unlink(missing_ok=True)


@app.command("remove", epilog="Example: ringfence image remove mine")
def remove(context: typer.Context, name: Name) -> None:
    """Forget a name, and delete the image when no other name has it."""
    with clear_errors():
        typer.echo(f"{name} is removed ({_store(context).remove(name)[:19]}…)", err=True)


@app.command("gc", epilog="Example: ringfence image gc")
def gc(context: typer.Context, *, as_json: Json = False) -> None:
    """Delete images that have no name any more, but for those that a sandbox uses now.

    A policy that names an image by digest does not keep it: give it a name.
    """
    with clear_errors(as_json=as_json):
        from ringfence.images.build import collect

        state: AppContext = context.obj
        with _watched() as watcher:
            gone = collect(state.state_dir, watcher)
        if as_json:
            print_json({"removed": gone.removed, "in_use": gone.in_use})
            return
        for digest in gone.removed:
            typer.echo(f"removed {digest}")
        for digest in gone.in_use:
            typer.echo(f"in use  {digest}")


@app.command("lint", epilog="Example: ringfence image lint mine.yaml --strict")
def lint(
    definition: Definition = None,
    *,
    strict: Annotated[bool, typer.Option("--strict", help="Fail (2) on a warning.")] = False,
    as_json: Json = False,
) -> None:
    """Say what a definition means that its author may not have meant."""
    with clear_errors(as_json=as_json):
        from ringfence.images.lint import lint as findings_of

        findings = findings_of(_definition(definition))
        rows = [
            {
                "id": each.id,
                "severity": each.severity,
                "subject": each.subject,
                "message": each.message,
            }
            for each in findings
        ]
        if as_json:
            print_json(rows)
        for row in rows if not as_json else ():
            typer.echo(f"{row['id']} {row['severity']:7} {row['subject']}: {row['message']}")
        raise typer.Exit(2 if strict and any(r["severity"] == "warning" for r in rows) else 0)


@app.command("schema", epilog="Example: ringfence image schema > image.schema.json")
def schema() -> None:
    """Print the JSON Schema of a definition."""
    from ringfence.images.definition import schema as definition_schema

    typer.echo(json.dumps(definition_schema(), indent=2))
