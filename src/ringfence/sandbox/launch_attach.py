"""The phase of `launch.py` for a workspace that comes late: standard library only, loaded when it
is asked for.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ringfence.sandbox import launch as kernel
    from ringfence.sandbox.launch import Plan
else:
    import launch as kernel


def wait_for_workspace(stage: str, gate: str, files: dict[str, bytes]) -> None:
    """Until it is attached, a directory that nobody can write, with nothing in it but the files
    that programs look for: what one does in the directory it began in must fail, and not get lost.
    Shared, so that what is mounted there appears in the namespaces of programs too; bubblewrap
    makes theirs slaves, and nothing comes back.
    """
    place = f"{stage}/workspace"
    os.mkdir(f"{stage}/attached")
    os.mkdir(f"{stage}/waiting")
    kernel.write_files(f"{stage}/waiting", files, 0o644)
    os.mkfifo(f"{stage}/waiting/{gate}", 0o444)
    kernel.mount(f"{stage}/waiting", place, None, kernel.MS_BIND)
    flags = kernel.MS_RDONLY | kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
    kernel.mount("none", place, None, kernel.MS_REMOUNT | kernel.MS_BIND | flags)
    kernel.mount("none", place, None, kernel.MS_SHARED)


def attach(plan: Plan, descriptors: list[int]) -> tuple[Plan, list[int]]:
    """The workspace is put together apart, its masks on it, and moved to its place in one step:
    what waits inside sees nothing of it, or it whole.
    """
    workspace, mnt, user = descriptors
    idmap = kernel.enter_workspace(plan, workspace)
    if not plan["as_root"]:
        kernel.setns(user, kernel.CLONE_NEWUSER)
    kernel.unshare(kernel.CLONE_NEWNS)
    kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    trees, copying = kernel.clone_all(plan, max(idmap, 0))
    kernel.setns(mnt, kernel.CLONE_NEWNS)
    os.fchdir(workspace)  # setns() has left it, and a copy is made of the working directory
    stage = plan["stage"]
    os.utime(f"{stage}/scratch/upper")  # from now on a change on the host is one during the run
    kernel.fill(plan, trees, copying, "attached")
    flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
    tree, place = os.open(f"{stage}/attached", flags), os.open(f"{stage}/workspace", flags)
    kernel.move_mount(tree, place, "workspace")
    # who waits is in open(2) of a FIFO, and goes on while somebody holds its other end; who was
    # late for the old name opens it still
    gate = os.open(f"{stage}/waiting/{plan['gate']}", os.O_RDWR | os.O_CLOEXEC)
    return {"ok": True}, [*kernel.handles(plan), gate]
