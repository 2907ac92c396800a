"""`ringfence run` and `exec` in a virtual machine: the real claude, a simulated model.

On a host without hardware virtualisation the machine is emulated, and all of it is slow: time limits
are those of a busy host, and most of this runs in `make test-all` alone.
"""

from __future__ import annotations

import pytest
from harness import Box, script
from test_run import EDIT

from backends import machines, needs
from ringfence.sandbox.microvm import MicrovmBackend

pytestmark = [needs("microvm"), pytest.mark.timeout(900)]
MACHINE = {"backend": "microvm", "emulation": "allow"}
SHARED = {"RINGFENCE_MACHINES": str(place)} if (place := machines()) else {}
LONG = {"max_duration_seconds": 800, "max_tool_seconds": 200}


def test_a_command_runs_under_the_guests_kernel(box: Box) -> None:
    box.policy({"preset": "strict", "isolation": MACHINE, "execution": LONG})
    done = box.execute("uname -r; echo x > new", seconds=850, **SHARED)
    assert done.code == 0, done.err + done.out
    assert "-cloud-amd64" in done.json["output"]
    assert done.json["changed_files"] == ["new"]
    assert list(box.workspace.iterdir()) == []
    (started,) = [record for record in box.records() if record["type"] == "sandbox.started"]
    assert started["isolation"] == "microvm"


def test_emulation_is_allowed_by_name_and_never_as_something_stronger(box: Box) -> None:
    if not MicrovmBackend(state_dir=box.state).emulated:
        pytest.skip("this host's processor runs machines itself")
    for isolation, more, code, word in (
        ({"backend": "microvm"}, (), 4, "emulation-refused"),
        ({"backend": "bubblewrap", "emulation": "allow"}, ("microvm",), 3, "isolation-denied"),
        ({"threat_model": "hostile_multi_tenant"}, (), 4, "isolation-unavailable"),
        (
            {"threat_model": "hostile_multi_tenant", "emulation": "allow"},
            ("microvm",),
            3,
            "isolation-denied",
        ),
    ):
        box.policy({"preset": "strict", "isolation": isolation})
        done = box.execute("true", *(("--isolation", *more) if more else ()))
        assert (done.code, done.json["error"]["code"]) == (code, word), done.err + done.out
        assert "emulat" in done.out


@pytest.mark.storm
def test_claude_edits_in_a_machine(box: Box) -> None:
    box.policy({"preset": "strict", "isolation": MACHINE, "execution": LONG})
    done = box.run(script(EDIT, {"text": "ok"}), seconds=850, **SHARED)
    assert done.code == 0, done.err + done.out
    assert done.json["status"] == "succeeded"
    assert done.json["changed_files"] == ["new.txt"]
    assert list(box.workspace.iterdir()) == []
