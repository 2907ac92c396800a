"""The phase of `launch.py` for one agent among several: standard library only, loaded when it is
asked for.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ringfence.sandbox import launch as kernel
    from ringfence.sandbox import launch_network as network
    from ringfence.sandbox.launch import Plan
else:
    import launch as kernel
    import launch_network as network


def seat(plan: Plan, descriptors: list[int]) -> tuple[Plan, list[int]]:
    """A copy of the shared place's mounts with this agent's own over them, and a network of its
    own. The shared place never has these mounts, so that no copy for another agent has them; they
    are gone with the last process that stands here and the worker's descriptors. A network is an
    agent's own because abstract sockets and ports of the loopback belong to it, and because who
    connects to the proxy's port could not be told apart.
    """
    workspace, mnt, user = descriptors
    idmap = kernel.enter_workspace(plan, workspace)
    if not plan["as_root"]:
        kernel.setns(user, kernel.CLONE_NEWUSER)
    kernel.unshare(kernel.CLONE_NEWNS)
    kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    trees, copying = kernel.clone_all(plan, max(idmap, 0))
    kernel.setns(mnt, kernel.CLONE_NEWNS)
    kernel.unshare(kernel.CLONE_NEWNS)
    kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    os.fchdir(workspace)  # setns() has left it, and a copy is made of the working directory
    listener = network.listener(plan["proxy_port"])
    kernel.scratch(plan, plan["uid"])
    kernel.fill(plan, trees, copying, "workspace")
    own = [os.open(f"/proc/self/ns/{name}", os.O_RDONLY | os.O_CLOEXEC) for name in _OWN]
    return {"ok": True}, [*own, listener, *kernel.handles(plan)]


_OWN = ("mnt", "net", "user")
