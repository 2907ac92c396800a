"""Who ends a frozen sandbox when this process is killed.

The kernel kills it with us (die-with-parent), but the freezer of control groups version 1 holds a
SIGKILL back until the group is thawed: its processes would stay, with their memory, until another
worker's sweep. So while one is frozen a shell waits at a pipe whose other end only this process
has; when that is closed it kills what is frozen and thaws it. Version 2 needs nobody: there a
frozen process can be killed.

Who could lie: nobody inside reaches the freezer, and the numbers that the shell reads are those of
processes that stand still, which nobody else can get.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

_WATCH = """
read -r word
[ "$word" = thawed ] && exit
[ "$(cat "$1/freezer.state")" = FROZEN ] || exit
while read -r pid; do
    [ "$pid" -gt 0 ] && kill -9 "$pid"
done < "$1/cgroup.procs"
echo THAWED > "$1/freezer.state"
"""


class Watch:
    """The shell of one group of the freezer. Blocks for milliseconds."""

    def __init__(self, group: Path) -> None:
        self._shell = subprocess.Popen(
            ["/bin/sh", "-c", _WATCH, "sh", str(group)],
            # our end is closed by the kernel, whatever becomes of us: nobody else has it
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={"PATH": "/usr/bin:/bin"},
            cwd="/",
            # a Ctrl-C is for us
            start_new_session=True,
        )

    def over(self) -> None:
        """The group is thawed."""
        try:
            self._shell.communicate(b"thawed\n")
        except BrokenPipeError:
            self._shell.wait()
