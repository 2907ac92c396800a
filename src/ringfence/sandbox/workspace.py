"""What a workspace carries in, and what of it is masked before anything runs (requirement E).

A bind mount, even a read-only one, leaves unix sockets connectable, and a FIFO or device is a
door as well; all three are masked wherever they lie. Files that hold credentials are masked by
pattern, and a git configuration by what it says.
"""

from __future__ import annotations

import fnmatch
import os
import re
import stat
from dataclasses import dataclass

from ringfence.errors import AgentError, RingfenceError
from ringfence.sandbox.safeopen import open_beneath, read_link, read_regular, walk

_CONFIG_CAP = 1 << 20
_MAX_LINKS = 8

MAX_MASKS = 4000
"""bubblewrap looks through all mounts once for each; with more a start takes many seconds."""

_GIT_CONFIG = re.compile(
    r"(?:.*/)?(?:\.?git(?:config|modules)|(?:[^/]*\.git|modules/.+|worktrees/.+)/config(?:\.worktree)?"
    r"|[^/]*\.git/(?:fetch_head|logs/.+|[^/]*\.inc(?:lude)?))",
    re.IGNORECASE | re.DOTALL,
)
"""The files in which git keeps URLs and headers: configurations of repositories, bare ones,
worktrees and submodules, the workspace's own, and what a fetch or a clone wrote down."""

_CREDENTIAL_IN_GIT_CONFIG = re.compile(
    rb"""://[^/\s:@]*:[^/\s@]+@      # a URL with a password
    |://[^/\s:@]{16,}@               # a URL with a token alone
    |(?:^|\])\s*[\w.-]*(?:extraheader|pass|password|passphrase|token|secret)\s*=
    |(?:^|\])\s*helper\s*=\s*.*(?:store|!|password|token)
    |^\s*\[credential\b""",
    re.VERBOSE | re.IGNORECASE | re.MULTILINE,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Scan:
    """What was found; paths are workspace-relative, normal, decoded with surrogateescape.

    Attributes:
        hidden: files and directories whose name matches a pattern. Nothing below a hidden
            directory is listed.
        special: sockets, FIFOs and devices.
        git_configs: git configurations that hold a credential.
        shut: directories that cannot be looked through; what lies in them is anyone's guess.
        directories: those of the above that are directories.
    """

    hidden: tuple[str, ...] = ()
    special: tuple[str, ...] = ()
    git_configs: tuple[str, ...] = ()
    shut: tuple[str, ...] = ()
    directories: frozenset[str] = frozenset()

    @property
    def masked(self) -> dict[str, bool]:
        """Every path to mask, to whether it is a directory."""
        paths = (*self.hidden, *self.special, *self.git_configs, *self.shut)
        return {path: path in self.directories for path in paths}


class Patterns:
    """gitignore-like globs: without a slash a pattern names any component, with one the path.

    `*` and `?` do not cross a slash, `**` does; a trailing `/**` means the directory itself too.
    Case does not matter: SERVER.PEM is a key as well.
    """

    def __init__(self, patterns: tuple[str, ...]) -> None:
        names = [p for p in patterns if "/" not in p]
        paths = [p.strip("/") for p in patterns if "/" in p]
        self._name = _union(fnmatch.translate(p) for p in names)
        self._path = _union(_path_regex(p) for p in paths)

    def match(self, path: str) -> bool:
        """Whether the last component, or the whole path, matches."""
        name = path.rpartition("/")[2]
        return bool(
            (self._name and self._name.match(name)) or (self._path and self._path.match(path))
        )


def _union(expressions: object) -> re.Pattern[str] | None:
    texts = list(expressions)  # type: ignore[call-overload]
    if not texts:
        return None
    return re.compile("|".join(f"(?:{text})" for text in texts), re.IGNORECASE)


def _path_regex(pattern: str) -> str:
    """Regular expression of one pattern with slashes."""
    pattern = pattern.removesuffix("/**")
    pieces = []
    index = 0
    while index < len(pattern):
        if pattern.startswith("**/", index):
            pieces.append("(?:.*/)?")
            index += 3
        elif pattern.startswith("**", index):
            pieces.append(".*")
            index += 2
        elif pattern[index] == "*":
            pieces.append("[^/]*")
            index += 1
        elif pattern[index] == "?":
            pieces.append("[^/]")
            index += 1
        else:
            pieces.append(re.escape(pattern[index]))
            index += 1
    return rf"(?s:{''.join(pieces)})\Z"


def scan(
    workspace_fd: int,
    patterns: tuple[str, ...],
    *,
    shown: tuple[str, ...] = (),
    always: tuple[str, ...] = (),
    max_entries: int = 1_000_000,
) -> Scan:
    """Walk a workspace once. `shown` patterns lift `patterns`, and nothing else: not `always`.

    Raises:
        AgentError: `tree-too-large`; a workspace that cannot be looked through is not mounted,
            nor is one with more than MAX_MASKS files to mask.
    """
    wanted, lifted, firm = Patterns(patterns), Patterns(shown), Patterns(always)
    hidden: dict[str, bool] = {}
    special: list[str] = []
    configs: list[str] = []
    links: list[bytes] = []
    shut: list[bytes] = []
    inside_hidden = "\0"
    for raw, status in walk(workspace_fd, max_entries=max_entries, shut=shut):
        path, kind = os.fsdecode(raw), status.st_mode
        if path.startswith(inside_hidden):
            continue
        if firm.match(path) or (wanted.match(path) and not lifted.match(path)):
            hidden[path] = stat.S_ISDIR(kind)
            inside_hidden = path + "/" if stat.S_ISDIR(kind) else inside_hidden
        elif _is_special(kind):
            special.append(path)
        elif not stat.S_ISDIR(kind) and _GIT_CONFIG.fullmatch(path):
            if _bears_credential(workspace_fd, raw):
                configs.append(path)
        else:
            continue
        if stat.S_ISLNK(kind):
            links.append(raw)
    targets = dict(filter(None, (_target(workspace_fd, link) for link in links)))
    closed = dict.fromkeys((os.fsdecode(path) for path in shut if path), True)
    _refuse_too_many(len(hidden) + len(targets) + len(special) + len(configs) + len(closed))
    return Scan(
        shut=tuple(closed),
        hidden=tuple({**targets, **hidden}),
        special=tuple(special),
        git_configs=tuple(configs),
        directories=frozenset(
            path for path, folder in {**targets, **hidden, **closed}.items() if folder
        ),
    )


def _refuse_too_many(masks: int) -> None:
    if masks > MAX_MASKS:
        raise AgentError(
            "tree-too-large",
            f"more than {MAX_MASKS} files would have to be masked",
            hint="hide the folder that holds them (filesystem.hidden), or show what is harmless",
        )


def _target(workspace_fd: int, link: bytes) -> tuple[str, bool] | None:
    """What of the workspace a link with a secret's name leads to, and whether it is a directory:
    the secret lies there, whatever it is called. None when it leads out or nowhere.
    """
    path = link
    for _ in range(_MAX_LINKS):
        try:
            goal = read_link(workspace_fd, path)
            path = os.path.normpath(os.path.join(os.path.dirname(path), goal))
            if path.split(b"/")[0] in {b"", b".", b".."}:
                return None
            handle = open_beneath(workspace_fd, path, os.O_PATH)
        except (OSError, RingfenceError):
            return None
        kind = os.fstat(handle).st_mode
        os.close(handle)
        if not stat.S_ISLNK(kind):
            return os.fsdecode(path), stat.S_ISDIR(kind)
    return None


def _is_special(mode: int) -> bool:
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode))


def _bears_credential(workspace_fd: int, path: bytes) -> bool:
    try:
        data, _ = read_regular(workspace_fd, path, _CONFIG_CAP)
    except (OSError, RingfenceError):
        return True  # what cannot be looked into is not shown
    # git joins a line that ends in a backslash with the next, and drops the quotes of a value
    plain = data.replace(b"\\\r\n", b"").replace(b"\\\n", b"").replace(b'"', b"")
    return bool(_CREDENTIAL_IN_GIT_CONFIG.search(plain))
