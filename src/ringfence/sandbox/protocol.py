"""The sandbox seam. Its docstrings are the contract; `ringfence.testing` holds it to them.

Order of a sandbox's life: `Backend.probe` (what can this host enforce) → `Backend.start` →
any number of `Sandbox.exec` → `Sandbox.stop` → `Sandbox.changes` (review mode). A control that
the host cannot enforce and the profile does not accept stops `start` with UnavailableError
`control-unenforceable`, naming the control and the mend.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Protocol, runtime_checkable

from ringfence.policy.compiled import SandboxProfile

INSIDE_WORKSPACE = "/workspace"
INSIDE_HOME = "/home/agent"
INSIDE_SESSION_FILES = "/mnt/session"
INSIDE_EGRESS_DIR = "/run/ringfence"
INSIDE_EGRESS_SOCKET = "/run/ringfence/egress.sock"
INSIDE_PROXY_PORT = 3128
INSIDE_CLAUDE = "/opt/ringfence/bin/claude"
INSIDE_UID = 1000
WAITING_GATE = ".ringfence-waits"
"""A FIFO in /workspace while that is still to come: opening it to read takes until it is there."""


class Control(StrEnum):
    """What a backend enforces; a policy may name one under `accept_unenforced`."""

    MEMORY = "memory"
    CPU = "cpu"
    PIDS = "pids"
    DISK = "disk"
    """Size of /tmp, the home directory and review mode's changes."""
    WORKSPACE_DISK = "workspace_disk"
    """Size of what `direct` mode writes to the host's own disk."""
    SECCOMP = "seccomp"
    NETWORK = "network"
    USER_NAMESPACE = "user_namespace"
    TMP_NOEXEC = "tmp_noexec"
    UID_PER_SANDBOX = "uid_per_sandbox"
    """A host uid of its own; an ordinary user has only one, so there it is never claimed."""
    CLAUDE_UNREADABLE = "claude_unreadable"
    """The claude process is not dumpable, so that a tool of its uid cannot read its memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ControlState:
    """Whether this host enforces a control, how, and what would mend it."""

    control: Control
    enforced: bool
    how: str
    mend: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Enforcement:
    """The words of a backend about a control: `probe` and the table of the docs say the same.

    Attributes:
        how: when it holds. otherwise: what there is when it does not, empty when it always holds.
        mend: what would make it hold.
    """

    how: str
    otherwise: str = ""
    mend: str = ""

    def state(self, control: Control, *, enforced: bool) -> ControlState:
        """As `probe` reports it."""
        how = self.how if enforced else self.otherwise
        return ControlState(
            control=control, enforced=enforced, how=how, mend="" if enforced else self.mend
        )


REQUIRED = frozenset(
    {
        *(Control.MEMORY, Control.CPU, Control.PIDS, Control.DISK, Control.WORKSPACE_DISK),
        *(Control.SECCOMP, Control.NETWORK, Control.USER_NAMESPACE),
    }
)
"""Without one of these nothing starts, unless the policy accepts it by name."""


def stopping(states: Sequence[ControlState], accepted: Container[str]) -> list[ControlState]:
    """The states that stop a start."""
    return [
        state
        for state in states
        if state.control in REQUIRED and not state.enforced and state.control.value not in accepted
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class SandboxSpec:
    """One sandbox to start.

    Attributes:
        sandbox_id: `sb_` and 26 characters of Crockford base 32; names cgroups and directories.
        profile: the compiled rules.
        workspace: absolute host directory.
        state_dir: host directory of ringfence's own (0700), for staging.
        egress_dir: host directory that holds `egress.sock`, already listening; None for none.
        claude: host path of the claude binary; None for commands only.
        home_files: relative path below INSIDE_HOME to content, written before the first exec,
            owned by the agent; how a transcript is materialised (requirement H). Paths are
            validated: relative, normal, no `..`.
        ca_certificate: PEM added to the trust stores inside; None adds none.
        session_files: host directory that is INSIDE_SESSION_FILES, read-only; its files and
            directories can be read by everybody. None for none.
    """

    sandbox_id: str
    profile: SandboxProfile
    workspace: Path
    state_dir: Path
    egress_dir: Path | None = None
    claude: Path | None = None
    home_files: Mapping[str, bytes] | None = None
    ca_certificate: bytes | None = None
    session_files: Path | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class WaitingSpec:
    """One sandbox to start before it is known for what: no workspace, no session's files.

    Attributes: as those of `SandboxSpec`; `egress_dir` is empty, nothing listens there yet.
        placeholders: files that /workspace holds meanwhile, by relative path. A program may look
            once, at its start, what kind of workspace it has.
        programs: executables that stand beside claude, first in PATH; name to text.
    """

    sandbox_id: str
    profile: SandboxProfile
    state_dir: Path
    egress_dir: Path | None = None
    claude: Path | None = None
    ca_certificate: bytes | None = None
    placeholders: Mapping[str, bytes] = field(default_factory=dict)
    programs: Mapping[str, str] = field(default_factory=dict)


class Process(Protocol):
    """One program inside, with its stdio outside.

    `stdin`/`stdout` are one end of a socketpair each, never a pipe: a pipe can be reopened
    through /proc/PID/fd by any process of the same uid, a socket cannot (requirement A).
    """

    @property
    def returncode(self) -> int | None:
        """Exit status; 128 + n when signal n ended it, as shells say; None while it runs."""
        ...

    async def read(self, limit: int = 65536) -> bytes:
        """Next bytes of standard output; empty at its end."""
        ...

    async def write(self, data: bytes) -> None:
        """Write to standard input, waiting for space. Raises BrokenPipeError when it is shut."""
        ...

    async def close_stdin(self) -> None:
        """End of input. Idempotent."""
        ...

    async def stderr(self) -> bytes:
        """Tail of standard error so far: at most the last 64 KiB."""
        ...

    async def wait(self) -> int:
        """Wait for the end; returns `returncode`."""
        ...

    async def kill(self) -> None:
        """SIGKILL to the program and all its descendants; returns when they are dead."""
        ...


class Sandbox(Protocol):
    """A started place. One session only; never handed to another."""

    @property
    def sandbox_id(self) -> str:
        """The spec's."""
        ...

    @property
    def controls(self) -> Sequence[ControlState]:
        """What is enforced on this very sandbox, read back from the kernel."""
        ...

    @property
    def hidden(self) -> Sequence[str]:
        """Workspace-relative paths masked at start: sockets, devices, secrets (requirement E).

        A mask stays on its file, whatever a folder above it is named later. In review and
        readonly mode sockets and FIFOs that the host makes later are dead inside too; in direct
        mode they are not.
        """
        ...

    @property
    def proxy_listener(self) -> int | None:
        """Descriptor of a TCP socket listening on 127.0.0.1:INSIDE_PROXY_PORT of the sandbox's
        own network namespace, for egress to accept on. The caller does not close it.
        """
        ...

    async def exec(
        self,
        argv: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        cwd: str = INSIDE_WORKSPACE,
        merge_stderr: bool = False,
    ) -> Process:
        """Start a program as uid 1000 inside, in a PID namespace of its own.

        The environment holds what is given plus PATH, HOME, LANG, TMPDIR, and nothing of the
        host's. A program that does not exist inside ends with 127, one that may not
        run with 126. Every process of it is dead when the returned process has ended, and one
        second after ringfence itself is killed.

        Raises:
            UnavailableError: `sandbox-start-failed`, with the tail of the technology's own words.
        """
        ...

    async def copy_in(self, files: Mapping[str, bytes]) -> None:
        """Write files; keys are absolute paths below /workspace, /tmp or INSIDE_HOME."""
        ...

    async def copy_out(self, path: str, *, limit: int = 1 << 26) -> bytes:
        """Content of one regular file below /workspace, /tmp or INSIDE_HOME.

        Never follows a link, never opens a FIFO, device or socket.

        Raises:
            FileNotFoundError, IsADirectoryError: as the builtins mean.
            DeniedError: `path-escapes` for a link or special file anywhere on the way.
            AgentError: `file-too-large` past `limit` bytes.
        """
        ...

    async def freeze(self) -> bool:
        """Stop all processes where they stand; False when this host cannot, and they go on. Those
        of a ringfence that was killed meanwhile are dead within a second, as others are.
        """
        ...

    async def thaw(self) -> None:
        """Undo `freeze`."""
        ...

    async def stop(self) -> None:
        """Kill every process and free what `changes` does not need. Idempotent. Afterwards no
        process of the sandbox is alive.
        """
        ...

    async def changes(self) -> Changes:
        """What the agent changed in the workspace; only after `stop`, only in review mode.

        Computed without following links and without running any program (requirement F).
        """
        ...

    async def close(self) -> None:
        """Free everything, `changes` included. Idempotent; implies `stop`."""
        ...


class WaitingSandbox(Sandbox, Protocol):
    """A started place without a workspace: /workspace is a directory that nobody can write, and
    holds nothing but the placeholders and WAITING_GATE.

    Programs may be started in it, and then the workspace comes to them.
    """

    async def attach(self, workspace: Path) -> None:
        """Put the workspace at /workspace, for the programs that run, too. Once.

        What is masked, in which mode it is mounted and what is refused is as at `Backend.start`,
        and `hidden` and `controls` are of this moment: every limit is read back again. What runs
        inside sees nothing of the workspace, or it whole with its masks. A program that began in
        /workspace still stands in the empty directory until it changes to that path again. Who
        connected to the proxy's port before is hung up.

        Raises:
            UnavailableError: `sandbox-start-failed`; the sandbox is fit for nothing then.
            CallerError: `workspace-missing`, `workspace-refused`.
        """
        ...


class ChangeKind(StrEnum):
    """What happened to one path."""

    ADDED = "added"
    MODIFIED = "modified"
    DELETED = "deleted"


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One changed path of the workspace.

    Attributes:
        path: workspace-relative bytes decoded with surrogateescape, normal, no `..`.
        kind: what happened.
        mode: git file mode: 0o100644, 0o100755 or 0o120000 (link); 0 when deleted.
        old_mode: the same before; 0 when added.
        before: content before, or a link's target; None when added.
        after: content after, or a link's target; None when deleted.
    """

    path: str
    kind: ChangeKind
    mode: int
    old_mode: int
    before: bytes | None
    after: bytes | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Changes:
    """All changes of a review-mode workspace.

    Attributes:
        items: sorted by path.
        refused: paths left out with the reason, such as special files or files past the cap.
        repositories: folders above a change that git takes for a repository, whatever they are
            called: one with a file HEAD in the workspace as it was. Empty is the workspace itself.
    """

    items: tuple[Change, ...] = ()
    refused: tuple[tuple[str, str], ...] = ()
    repositories: tuple[str, ...] = ()


class Backend(Protocol):
    """An isolation technology."""

    @property
    def name(self) -> str:
        """As a policy names it."""
        ...

    def probe(self, profile: SandboxProfile) -> Sequence[ControlState]:
        """What this host can enforce of each Control for this profile, tried and not guessed.

        Raises:
            UnavailableError: `isolation-unavailable` when the technology cannot run here at all;
                the hint says what to install or set.
        """
        ...

    async def start(self, spec: SandboxSpec) -> Sandbox:
        """Make the place. Returns when its limits are set and read back.

        Raises:
            UnavailableError: `control-unenforceable`, `isolation-unavailable`,
                `sandbox-start-failed`.
            CallerError: `workspace-missing`; `workspace-refused` for a directory of the host
                itself or one below the state directory; `profile-path-refused`.
        """
        ...

    def warm(self) -> None:
        """Have ready what can be made before a run is known; later starts are shorter for it.
        Needs a running event loop.
        """
        ...

    async def close(self) -> None:
        """End what is kept ready. Sandboxes are closed apart. Idempotent."""
        ...


@runtime_checkable
class Emulating(Protocol):
    """A backend whose virtual machines may lack the processor's help."""

    @property
    def emulated(self) -> bool:
        """Whether they do on this host. Then it is no boundary against someone hostile."""
        ...


@runtime_checkable
class Metered(Protocol):
    """A sandbox whose memory this host keeps an account of."""

    def memory(self) -> int | None:
        """Bytes that it holds now and the kernel could not take back at once; None where nobody
        counts. Blocks for a moment.
        """
        ...

    def memory_kills(self) -> int | None:
        """Processes that this host's kernel has killed because the sandbox was at its limit, until
        now or until `stop`; None where nobody counts. Of a machine's own kernel it knows nothing.
        """
        ...


@runtime_checkable
class Subset(Protocol):
    """A backend that holds a part of the contract only, and says which part it does not."""

    @property
    def not_held(self) -> Mapping[str, str]:
        """Name of a clause, as the contract suite has it without `test_`, to what happens instead.
        The suite expects exactly these to fail. Shown wherever the technology is chosen.
        """
        ...


def not_held(backend: Backend) -> Mapping[str, str]:
    """Clauses of the contract that a backend says it does not hold; empty for a whole one."""
    return backend.not_held if isinstance(backend, Subset) else {}


@runtime_checkable
class Engined(Protocol):
    """A backend whose sandboxes more than one program can make."""

    def engine(self, profile: SandboxProfile) -> str:
        """Which of them makes those of a policy here, for people: `podman with crun`.

        Raises:
            UnavailableError: `isolation-unavailable`.
        """
        ...


def engine_of(backend: Backend, profile: SandboxProfile) -> str:
    """What makes the sandboxes of a policy; empty where there is nothing to choose."""
    return backend.engine(profile) if isinstance(backend, Engined) else ""


@runtime_checkable
class WaitingBackend(Backend, Protocol):
    """A technology whose sandboxes can be started before their workspace is known. One that cannot
    put a mount under programs that run is none, and its runs start cold.
    """

    async def start_waiting(self, spec: WaitingSpec) -> WaitingSandbox:
        """As `start`, without a workspace.

        Raises:
            CallerError: `profile-path-refused` also for a writable path beside the workspace.
        """
        ...
