"""What comes out of a review: one hostile tree, made inside, read on the host and not followed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from ringfence.check.finding import Outcome
from ringfence.check.hostside import Verdict, held
from ringfence.check.place import Place, run_inside
from ringfence.model import WorkspaceMode
from ringfence.sandbox.hostfiles import host_files
from ringfence.sandbox.patch import render
from ringfence.sandbox.protocol import Changes

MAKE = r"""
ln -s /etc/passwd to-passwd; ln -s ../../../../etc/shadow up; mkfifo pipe; ln -s / out
python3 -c 'import socket; socket.socket(1).bind("sock")'; truncate -s 8T sparse
python3 -c 'import tarfile; t=tarfile.open("x.tar","w"); t.addfile(tarfile.TarInfo("../../pwn"))'
mkdir -p .git/hooks sub/.git; echo 'touch /tmp/PWN' > .git/hooks/post-checkout
echo 'gitdir: /somewhere/else' > sub/.git/x; printf 'gitdir: /root/.git' > worktree.git
echo 'export LD_PRELOAD=/x' > .envrc; mkdir .vscode; echo '{}' > .vscode/tasks.json
mkdir -p .github/workflows; echo x > .github/workflows/ci.yml; echo x > Dockerfile
echo '{"scripts": {"postinstall": "x"}}' > package.json; echo x > sitecustomize.py; echo x > .bashrc
echo a > Name; echo b > NAME; printf 'x' > $'new\nline'; printf x > $'esc\e[31m'
mkdir -p bare/objects bare/refs .hg; echo 'ref: refs/heads/main' > bare/HEAD; echo x > .hg/hgrc
printf '[core]\n\tbare = true\n\tfsmonitor = touch /tmp/PWN\n' > bare/config; echo x > .gdbinit
echo x > .dir-locals.el; echo x > .mise.toml; echo x > .cursorrules; echo x > binding.gyp
printf x > plain.txt; echo made
"""


def _names(changes: Changes) -> tuple[set[str], set[str]]:
    """Files that run on the host later: those held back until a person names them, and all."""
    files = host_files(changes)
    return {file.path for file in files if file.held}, {file.path for file in files}


def _links(changes: Changes) -> Verdict:
    found = {change.path: change for change in changes.items}
    good = (
        found["to-passwd"].after == b"/etc/passwd"
        and found["up"].mode == 0o120000
        and found["out"].mode == 0o120000
        and b"root:x" not in render(changes)
    )
    return held(good, "links are links, and what they name is not read")


def _archive(changes: Changes) -> Verdict:
    found = {change.path for change in changes.items}
    good = "x.tar" in found and not any("pwn" in path for path in found)
    return held(good, "an archive is one file: nothing of it is unpacked")


def _special(changes: Changes) -> Verdict:
    refused, taken = dict(changes.refused), {change.path for change in changes.items}
    # a kernel of its own keeps them to itself: then there is nothing that could come out
    good = not {"pipe", "sock"} & taken
    size = sum(len(change.after or b"") for change in changes.items)
    return held(good and size < 1 << 20, f"refused: {sorted(refused)}; {size} bytes taken")


def _bytewise(changes: Changes) -> Verdict:
    found = {change.path for change in changes.items}
    patch = render(changes)
    good = {"Name", "NAME", "new\nline"} <= found and b"\x1b" not in patch
    return held(good, "names are bytes; none becomes a line or a colour of the patch")


def _held_back(*wanted: str) -> Callable[[Changes], Verdict]:
    def look(changes: Changes) -> Verdict:
        kept, _ = _names(changes)
        missing = sorted(set(wanted) - kept)
        return held(not missing, f"not held back: {missing}" if missing else "held back by name")

    return look


def _listed(*wanted: str) -> Callable[[Changes], Verdict]:
    def look(changes: Changes) -> Verdict:
        _, listed = _names(changes)
        missing = sorted(set(wanted) - listed)
        # the twin: advice that names every file names none
        good = not missing and "plain.txt" not in listed
        return held(good, f"not listed: {missing}" if missing else "listed for the person")

    return look


JUDGES: Mapping[str, Callable[[Changes], Verdict]] = {
    "FS-06": _links,
    "FS-08": _archive,
    "FS-09": _special,
    "FS-28": _bytewise,
    "AGT-15": _held_back(".git/hooks/post-checkout", "sub/.git/x"),
    "AGT-30": _held_back("bare/HEAD", ".hg/hgrc", ".gdbinit", ".dir-locals.el", ".mise.toml"),
    "AGT-17": _listed("sitecustomize.py", ".envrc"),
    "AGT-18": _held_back(".envrc", ".vscode/tasks.json", ".bashrc"),
    "AGT-19": _listed(".github/workflows/ci.yml", "package.json", "Dockerfile"),
}


async def collect(place: Place) -> tuple[Changes | None, str]:
    """The changes of one hostile sandbox in review mode; None with the reason."""
    sandbox = await place.open(profile=replace(place.profile, workspace_mode=WorkspaceMode.REVIEW))
    saw = await run_inside(sandbox, MAKE, {}, seconds=30 * place.patience)
    if "made" not in saw.output:
        return None, f"the tree was not made: {saw.output.strip()[-200:]}"
    await sandbox.stop()
    return await sandbox.changes(), ""


def verdict(probe_id: str, changes: Changes | None, why: str) -> Verdict:
    """Of one probe; the positive control is that the harmless file came out."""
    if changes is None:
        return Outcome.ERROR, why
    if "plain.txt" not in {change.path for change in changes.items}:
        return Outcome.ERROR, "the harmless file did not come out"
    try:
        return JUDGES[probe_id](changes)
    except KeyError as error:
        return Outcome.FAIL, f"{error.args[0]!r} is missing from the changes"
