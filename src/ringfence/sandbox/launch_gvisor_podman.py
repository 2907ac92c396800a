"""The second phase of `launch.py` for podman with gVisor below it: standard library only, loaded
when it is asked for.

The processes are those of `launch_podman.py`; podman's monitor is the parent of sentry and gofer.
What holds these two is read from this kernel, as in `launch_gvisor.py`. What the program is shown
is mounted in gVisor's own kernel, where nobody outside can look: instead, the configuration that
podman wrote is read before gVisor is started with it, and has to say what ours would.
"""

from __future__ import annotations

import errno
import json
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

    from ringfence.sandbox import launch as kernel
    from ringfence.sandbox import launch_gvisor as gvisor
    from ringfence.sandbox import launch_oci as oci
    from ringfence.sandbox import launch_podman as podman
    from ringfence.sandbox.launch_oci import Plan, Stdio
else:
    import launch as kernel
    import launch_gvisor as gvisor
    import launch_oci as oci
    import launch_podman as podman

_KINDS = ("bind", "rbind")
_WORDS = ("ro", "nosuid", "nodev", "noexec")
_OF_GVISOR = ("cgroup", "devpts")


def become(plan: Plan, descriptors: list[int], *, inside: bool) -> NoReturn:
    """Be the outer process; see launch_oci."""
    oci.become(plan, descriptors, inside=inside, run=_run)


def _run(plan: Plan, stdio: Stdio, tell: int, seen: Plan) -> int:
    kernel.mount("proc", "/proc", "proc", kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC)
    oci.put_away_control_groups(hidden=True)
    bundle = f"{plan['stage']}/bundle"
    made, go = podman.make_bundle(plan, bundle)
    podman.shut_below(plan["read_only"])
    oci.limit(os.getpid(), plan["host_rlimits"])
    wait, open_gate = os.pipe()
    engine = podman.call(plan, bundle, {plan["gate"]: wait, **podman.numbered(stdio)})
    if not podman.was_made(made, engine):
        return podman.refused(bundle, tell)
    _settle(os.read(made, 4096), json.loads(plan["wanted"]), bundle)
    os.write(go, b"1\n")
    podman.bury(engine, bundle)
    sentry = int(podman.content(f"{bundle}/pid"))
    monitor = podman.parent(sentry)
    watched = os.pidfd_open(sentry), os.pidfd_open(monitor)
    wrong = gvisor.verify(sentry, seen["network"], plan, parent=monitor)
    if wrong:
        raise OSError(errno.EPROTO, "gVisor is not what was asked for: " + wrong[0])
    oci.insist(oci.in_groups(monitor, plan["cgroups"]))
    _insist_apart(sentry, monitor)
    nothing = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    for descriptor in stdio:
        os.dup2(nothing, descriptor, inheritable=False)
    os.write(tell, b"1")
    os.write(open_gate, b"1")
    for descriptor in (wait, open_gate):
        os.close(descriptor)
    return podman.end(bundle, *watched)


_OURS = ("args", "capabilities", "env")
"""Of a process: never podman's.

A command line is for every user of the host to read, and the program's environment is among the
words of our first program; podman has variables of its own. And podman cannot ask for a capability
that is not in the bounding set, which gVisor would give to the sentry, too: it asks for none, and
what our first program gives away at once is added.
"""


def _settle(said: bytes, wanted: Any, bundle: str) -> None:
    """Read the configuration that podman's monitor was told of; complete it with what is ours."""
    place = os.fsdecode(said).strip()
    if not place.startswith(f"{bundle}/"):
        raise OSError(errno.EPROTO, "podman made its container elsewhere")
    found = json.loads(podman.content(f"{place}/config.json"))
    if differences := compare(found, wanted, bundle):
        raise OSError(errno.EPROTO, "podman asks gVisor for something else: " + differences[0])
    for name in _OURS:
        found["process"][name] = wanted["process"][name]
    found["linux"].update(_apart(found["linux"].get("namespaces", [])))
    with open(f"{place}/config.json", "w") as file:
        json.dump(found, file)


def _apart(namespaces: Any) -> Any:
    """A user namespace for sentry and gofer, with the ids of this one.

    gVisor leaves CAP_SYS_PTRACE to the sentry and lets it attach to any process: podman's monitor,
    of the same ids and held by no filter, must not be within its reach (user_namespaces(7)).
    """
    maps = {}
    for kind in ("uid", "gid"):
        with open(f"/proc/self/{kind}_map") as file:
            lines = [[int(word) for word in line.split()] for line in file]
        maps[f"{kind}Mappings"] = [
            {"containerID": first, "hostID": first, "size": size} for first, _, size in lines
        ]
    return {"namespaces": [*namespaces, {"type": "user"}], **maps}


def _insist_apart(sentry: int, monitor: int) -> None:
    """Raise OSError where the sentry is in the user namespace of podman's monitor."""
    spaces = [os.readlink(f"/proc/{pid}/ns/user") for pid in (sentry, monitor)]
    if spaces[0] == spaces[1]:
        raise OSError(errno.EPROTO, "gVisor's sentry could trace podman's monitor")


def compare(found: Any, wanted: Any, bundle: str) -> list[str]:
    """What a configuration allows that another does not: who the program is, what it may, what it
    is shown. PURE. What gVisor has no use for, or takes from nobody, is not looked at.
    """
    return [
        *_process(found["process"], wanted["process"]),
        *_root(found, f"{bundle}/rootfs"),
        *_mounts(found["mounts"], wanted["mounts"], bundle),
    ]


def _process(found: Any, wanted: Any) -> list[str]:
    wrong = [
        f"{field} is {found.get(field)!r}"
        for field in ("cwd", "noNewPrivileges")
        if found.get(field) != wanted[field]
    ]
    user = found["user"]
    if (user["uid"], user["gid"]) != (wanted["user"]["uid"], wanted["user"]["gid"]):
        wrong.append(f"the user is {user['uid']}:{user['gid']}")
    if set(user.get("additionalGids", [])) - {wanted["user"]["gid"]}:
        wrong.append("the user has more groups")
    wrong += [
        f"the {name} capabilities are {held}"
        for name, held in found.get("capabilities", {}).items()
        if held
    ]
    limits = {one["type"]: (one["soft"], one["hard"]) for one in found.get("rlimits", [])}
    return wrong + [
        f"{one['type']} is not {one['hard']}"
        for one in wanted["rlimits"]
        if limits.get(one["type"]) != (one["soft"], one["hard"])
    ]


def _root(found: Any, root: str) -> list[str]:
    wrong = []
    if found["root"].get("path") != root or found["root"].get("readonly") is not True:
        wrong.append("the root is another, or writable")
    if any(found.get("hooks", {}).values()):
        wrong.append("it has hooks")
    if any(name.startswith("dev.gvisor.") for name in found.get("annotations", {})):
        wrong.append("it has words for gVisor of its own")
    if found["linux"].get("devices"):
        wrong.append("it has devices")
    return wrong


def _mounts(found: Any, wanted: Any, bundle: str) -> list[str]:
    # of two at one place the later is seen
    there = {one["destination"]: one for one in found}
    wrong = []
    for one in wanted:
        place, kept = one["destination"], there.get(one["destination"])
        if kept is None:
            wrong.append(f"{place} is not mounted")
            continue
        if one["type"] in _OF_GVISOR:
            wrong += [] if kept["type"] == one["type"] else [f"{place} is of another kind"]
            continue
        words = set(kept.get("options", ()))
        missing = [word for word in _WORDS if word in one["options"] and word not in words]
        if missing:
            wrong.append(f"{place} is mounted without {','.join(missing)}")
        if _shows(kept) != _shows(one):
            wrong.append(f"{place} shows {_shows(kept)}")
    expected = {one["destination"] for one in wanted}
    return wrong + [
        f"{place} shows {_shows(one)}"
        for place, one in there.items()
        if place not in expected and _shows(one) and not _own(one, bundle)
    ]


def _own(mount: Any, bundle: str) -> bool:
    """A file of podman's, of this container alone, by which a program sees that it is in one."""
    return mount["source"].startswith(f"{bundle}/run/") and "ro" in mount.get("options", ())


def _shows(mount: Any) -> str:
    """What of this host a mount shows; empty for a file system of gVisor's own."""
    shown = mount["type"] == "bind" or any(word in _KINDS for word in mount.get("options", ()))
    return mount["source"] if shown else ""
