"""The isolation technologies that the attacks are tried on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from backends import machines
from ringfence.sandbox.bubblewrap import BubblewrapBackend
from ringfence.sandbox.container import ContainerBackend
from ringfence.sandbox.gvisor import GvisorBackend
from ringfence.sandbox.microvm import MicrovmBackend
from ringfence.sandbox.protocol import Backend

PATHS = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin"


def make(name: str, state: Path) -> Backend:
    """A backend by the name that a parameter has."""
    if name == "bubblewrap":
        return BubblewrapBackend(state_dir=state)
    if name == "gvisor":
        return GvisorBackend(state_dir=state)
    if name == "microvm":
        return MicrovmBackend(state_dir=state, machines=machines())
    return ContainerBackend(state_dir=state, engine=name)


def needs(name: str) -> Any:
    missing = name != "bubblewrap" and shutil.which(name, path=PATHS) is None
    reason = f"{name} is not installed: apt-get install {name}"
    return pytest.param(name, marks=pytest.mark.skipif(missing, reason=reason))


# these serve an ordinary user too
BACKENDS = [
    needs("bubblewrap"),
    needs("crun"),
    # every probe in every program that podman starts: half a minute of processor time
    pytest.param("podman", marks=[pytest.mark.storm, *needs("podman").marks]),
    pytest.param("gvisor", marks=pytest.mark.needs("gvisor")),
    # an emulated processor takes minutes for what the others do in seconds
    pytest.param("microvm", marks=[pytest.mark.storm, pytest.mark.needs("microvm")]),
]
ALL = [
    *(one for one in BACKENDS if one.values != ("podman",)),
    needs("podman"),
    pytest.param("runc", marks=[pytest.mark.root, *needs("runc").marks]),
]
