"""Programs of the host that build: found or named with the mend, logged, and ended with us."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import NoReturn

from ringfence.errors import UnavailableError

_GRACE = 30.0
"""Seconds for a program to take its own mounts and files away before it is killed."""

_TAIL = 400
_ERRORS = ("E:", "ERROR:", "npm error", "mount:", "chroot:", "unshare:")
_SBIN = "/usr/sbin:/sbin"
_HOST_STORE = "/etc/ssl/certs/ca-certificates.crt"

_PASSED = ("HOME", "LANG", "TMPDIR", "http_proxy", "https_proxy", "no_proxy")
_WITHHELD = ("ANTHROPIC_", "CLAUDE_", "AWS_", "RINGFENCE_", "OTEL_", "PYTHON")

Progress = Callable[[str], None]


def silent(_line: str) -> None:
    """Progress that nobody watches."""


class Tools:
    """Runs programs of one build.

    Attributes:
        log: file that takes everything they say on standard error.
        progress: told each of their lines.
        scratch: their TMPDIR.
    """

    def __init__(self, *, log: Path, scratch: Path, progress: Progress = silent) -> None:
        self.log = log
        self.progress = progress
        self.scratch = scratch

    def run(
        self,
        argv: Sequence[str | Path],
        *,
        environment: Mapping[str, str] | None = None,
        accepted: frozenset[int] = frozenset({0}),
        cleans_up: bool = False,
    ) -> None:
        """Run to the end; when we are interrupted, end it first.

        A program that `cleans_up` gets TERM and time for it. Any other is killed: what runs in an
        image is the first process of a namespace, which TERM does not reach; its mounts go with it.

        Raises:
            UnavailableError: `image-tool-missing`, `image-build-failed` with its last words.
        """
        program = [str(word) for word in argv]
        values = plain_environment() if environment is None else dict(environment)
        values.update(TMPDIR=str(self.scratch), SOURCE_DATE_EPOCH="946684800")
        ending = signal.SIGTERM if cleans_up else signal.SIGKILL
        # should we be killed ourselves, the kernel sends the program the same signal
        dying = [require_tool("setpriv"), "--pdeathsig", ending.name.removeprefix("SIG"), "--"]
        with (
            self.log.open("ab", buffering=0) as log,
            subprocess.Popen(
                [*dying, require_tool(program[0]), *program[1:]],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=values,
                start_new_session=True,
            ) as process,
        ):
            try:
                last = self._follow(process, log)
                status = process.wait()
            except BaseException:
                _end(process, ending)
                raise
        if status not in accepted:
            self._failed(program[0], status, last)

    def _follow(self, process: subprocess.Popen[bytes], log: FileIO) -> str:
        """Pass on what the program says; its first error, or else its last line."""
        assert process.stdout is not None  # noqa: S101  a pipe, by `run`
        last = error = ""
        for line in process.stdout:
            log.write(line)
            text = line.decode("utf-8", "replace").strip()
            if not text:
                continue
            self.progress(text)
            last = text
            # the first is the cause, what follows it is consequence
            error = error or (text if text.startswith(_ERRORS) else "")
        return error or last

    def _failed(self, name: str, status: int, last: str) -> NoReturn:
        raise UnavailableError(
            "image-build-failed",
            f"{Path(name).name} ended with {status}: {last[:_TAIL] or 'it said nothing'}",
            hint=f"everything it said is in {self.log}",
        )


def _end(process: subprocess.Popen[bytes], first: signal.Signals) -> None:
    """A signal to the program's session, time to clean up, then KILL."""
    for number, grace in ((first, _GRACE), (signal.SIGKILL, 5.0)):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            process.communicate(timeout=grace)
            return


def find_tool(name: str) -> str | None:
    """Path of a program; sbin is looked in too, which is on no ordinary user's PATH."""
    return shutil.which(name, path=os.environ.get("PATH", os.defpath) + ":" + _SBIN)


def require_tool(name: str) -> str:
    """Path of a program of the host.

    Raises:
        UnavailableError: `image-tool-missing`, with the package that has it.
    """
    found = find_tool(name)
    if found is None:
        package = _PACKAGES.get(name, name)
        raise UnavailableError(
            "image-tool-missing",
            f"{name} is not installed on this host",
            hint=_HINTS.get(name, f"apt-get install {package}"),
        )
    return found


_PACKAGES = {
    "mke2fs": "e2fsprogs",
    "newuidmap": "uidmap",
    "debugfs": "e2fsprogs",
    "mksquashfs": "squashfs-tools",
    "setpriv": "util-linux",
    "unshare": "util-linux",
}

_HINTS = {
    "mmdebstrap": "apt-get install mmdebstrap (an ordinary user needs uidmap too), or give "
    "--from-host",
    "npm": "apt-get install npm, or take the npm packages out of the definition",
    "apt-get": "images of Debian packages are made on Debian and Ubuntu hosts",
    "dpkg": "images are made on Debian and Ubuntu hosts",
    "dpkg-query": "--from-host takes what dpkg has installed: it needs a Debian or Ubuntu host",
}


def plain_environment() -> dict[str, str]:
    """For programs that run a package's own scripts: where the network is, and nothing else."""
    values = {name: os.environ[name] for name in _PASSED if name in os.environ}
    return {**values, "PATH": f"{os.environ.get('PATH', os.defpath)}:{_SBIN}", "LC_ALL": "C.UTF-8"}


def index_environment() -> dict[str, str]:
    """For pip and npm, which find their index and its certificates in the host's environment."""
    values = {key: value for key, value in os.environ.items() if not key.startswith(_WITHHELD)}
    if os.access(_HOST_STORE, os.R_OK):
        # node trusts what it was built with, where pip and apt trust what the host's admin added
        values.setdefault("NODE_EXTRA_CA_CERTS", _HOST_STORE)
    return {**values, "LC_ALL": "C.UTF-8"}
