"""Probes that only the host can judge: what leaks out, outlives, floods or hides.

The `host` probes of probes.json run here (or in tests/e2e, named beside their id below), each with
a check of its own on this side of the fence.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fence import CANARY, KEY, PROFILE, RULES, Fence, narrowed

from ringfence.model import WorkspaceMode
from ringfence.policy.compiled import EgressRules
from ringfence.sandbox.hostfiles import host_files
from ringfence.sandbox.overlay import read_changes
from ringfence.sandbox.patch import render

HOST_PROBES = {
    probe["id"]: probe
    for probe in json.loads((Path(__file__).parent / "probes.json").read_text())
    if probe["where"] == "host"
}

JUDGED_ELSEWHERE = {
    "AGT-01": "tests/e2e/test_modes.py::test_a_hostile_workspace_configures_nothing",
    "AGT-03": "tests/e2e/test_modes.py::test_a_hostile_workspace_configures_nothing",
    "AGT-04": "tests/e2e/test_modes.py::test_a_hostile_workspace_configures_nothing",
    "AGT-05": "tests/e2e/test_modes.py::test_a_hostile_workspace_configures_nothing",
    "AGT-06": "tests/e2e/test_modes.py::test_a_hostile_workspace_configures_nothing",
    "AGT-07": "tests/e2e/test_modes.py::test_a_hostile_workspace_configures_nothing",
    "AGT-08": "tests/e2e/test_modes.py::test_a_hostile_workspace_configures_nothing",
    "AGT-09": "tests/e2e/test_modes.py::test_a_hostile_workspace_configures_nothing",
    "AGT-11": "the CLI's own sandbox is not used; ours is outside of its reach",
    "AGT-26": "private /tmp a sandbox: contract test_two_sandboxes_do_not_meet",
    "API-23": "tests/unit/test_egress_model.py::test_parallel_streams_do_not_multiply_a_budget",
    "SEC-09": "tests/e2e/test_run.py::test_the_credential_is_nowhere",
}
"""Host probes whose verdict is a test of its own elsewhere, or a design that leaves no target."""

NOT_STOPPED = {
    "API-21": "an allowed host can count what it is asked: an allowlist is a grant of capability",
    "API-22": "timing and size of allowed calls carry information; docs/threat-model.md says so",
}
"""What no fence of this kind stops; named in docs/threat-model.md."""

JUDGED_HERE = {
    "NET-24", "DST-27", "FS-05", "FS-06", "FS-08", "FS-09", "FS-28", "PROC-19", "PROC-29",
    "AGT-15", "AGT-17", "AGT-18", "AGT-19", "AGT-25",
}  # fmt: skip


@pytest.fixture(scope="module")
def fence() -> Iterator[Fence]:
    fence = Fence()
    fence.start()
    try:
        yield fence
        fence.assert_only_what_was_granted_came_out()
    finally:
        fence.stop()


def test_every_host_probe_is_judged_somewhere() -> None:
    judged = JUDGED_HERE | set(JUDGED_ELSEWHERE) | set(NOT_STOPPED)
    assert set(HOST_PROBES) - judged == set()
    threats = (Path(__file__).parents[2] / "docs" / "threat-model.md").read_text()
    assert "Covert channels" in threats
    assert "An allowlist is a grant of capability" in threats


def _reaches(fence: Fence, sandbox: object) -> bool:
    command = "python3 -c 'from h import *; r=tun(req()); print(r.decode(\"latin-1\"))'"
    output, _ = fence.probe(command, sandbox)
    return "x-upstream: 1" in output


def test_net_24_an_empty_list_denies_all(fence: Fence) -> None:
    """CVE-2025-66479 was the other way round."""
    closed = EgressRules(model=replace(RULES.model, enabled=False))
    sandbox = fence.run(fence.open(closed))
    before = len(fence.upstream.seen)
    assert not _reaches(fence, sandbox)
    output, _ = fence.probe(
        'python3 -c \'from h import *; print([conn(h+":443") for h in (ALLOW,"a.com","x.test")])\'',
        sandbox,
    )
    assert "[False, False, False]" in output
    assert len(fence.upstream.seen) == before
    assert _reaches(fence, fence.sandbox)


def test_dst_18_a_mixed_answer_dials_nobody(fence: Fence) -> None:
    before = len(fence.host_hits)
    output, _ = fence.probe("python3 -c 'from h import *; print(conn(\"rebind-mixed.test:443\"))'")
    assert "False" in output
    assert len(fence.host_hits) == before


def test_net_19_no_descriptors_are_taken(fence: Fence) -> None:
    """Sending descriptors to egress leaves none behind."""

    def descriptors() -> int:
        return len(os.listdir(f"/proc/{fence.egress_process.pid}/fd"))

    if os.geteuid() != 0:
        pytest.skip("the egress process is not dumpable: only root may count its descriptors")
    before = descriptors()
    fence.probe(
        "python3 -c '\nfrom h import *\nfor _ in range(50):\n s=dial()\n"
        ' socket.send_fds(s,[b"GET / HTTP/1.1\\r\\n"],[0,1,2])\n s.close()\''
    )
    time.sleep(0.3)
    assert descriptors() <= before + 2


def test_http_30_a_slow_reader_does_not_grow_egress(fence: Fence) -> None:
    """A 64 MiB answer that nobody reads stays at the upstream."""

    def resident() -> int:
        text = Path(f"/proc/{fence.egress_process.pid}/status").read_text()
        return int(next(line for line in text.splitlines() if line.startswith("VmRSS")).split()[1])

    before = resident()
    fence.probe(
        "python3 -c '\nfrom h import *\nimport time\n"
        's=dial(); a=ALLOW+":443"\n'
        's.sendall(("CONNECT %s HTTP/1.1\\r\\nHost: %s\\r\\n\\r\\n"%(a,a)).encode()); s.recv(4096)\n'
        "c=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT); c.check_hostname=False; c.verify_mode=0\n"
        'x=c.wrap_socket(s,server_hostname=ALLOW); x.sendall(req(p="/big").encode()); time.sleep(3)\''
    )
    assert resident() - before < 24 * 1024, "kB"


def test_sec_10_no_answer_of_the_upstream_shows_the_key(fence: Fence) -> None:
    for path in ("/leaky", "/error-echo", "/401", "/500"):
        output, _ = fence.probe(
            f'python3 -c \'from h import *; print(tun(req(p="{path}")).decode("latin-1"))\''
        )
        assert KEY not in output
        assert "[redacted]" in output, f"{path}: {output}"
        assert "set-cookie" not in output.lower()


def test_an_opaque_tunnel_holds_name_and_sni_together(fence: Fence) -> None:
    """Requirement D: tunnelled only by name, and recorded as opaque."""
    dial = (
        'python3 -c \'\nfrom h import *\nimport sys\ns=dial(); a="tunnel.test:443"\n'
        's.sendall(("CONNECT %s HTTP/1.1\\r\\nHost: %s\\r\\n\\r\\n"%(a,a)).encode()); s.recv(4096)\n'
        "c=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT); c.check_hostname=False; c.verify_mode=0\n"
        'x=c.wrap_socket(s,server_hostname="SNI"); x.sendall(req(host="tunnel.test").encode()); '
        "print(rd(x).decode())'"
    )
    good, _ = fence.probe(dial.replace("SNI", "tunnel.test"))
    assert "x-upstream: 1" in good, good
    assert "x-injected: 0" in good
    bad, _ = fence.probe(dial.replace("SNI", "evil.example"))
    assert "x-upstream" not in bad
    records = [r for r in fence.records() if r["type"] == "egress.allowed" and r["opaque"]]
    assert records
    assert records[0]["host"] == "tunnel.test"


def test_agt_25_a_flood_of_denials_is_coalesced(fence: Fence) -> None:
    """Requirement K: one sandbox cannot fill the log; the denials stay counted."""
    output, _ = fence.probe(
        'python3 -c \'\nfrom h import *\nfor i in range(300):\n conn("evil%d.example:443" % i)\n'
        'print(conn("x\\x1b[2J.example:443"))\'',
        seconds=60,
    )
    assert "False" in output
    time.sleep(0.3)
    text = json.dumps(fence.records())
    assert "\\u001b" not in text
    assert "evil299.example" in text


def test_fs_05_nothing_persists_between_sandboxes(fence: Fence) -> None:
    fence.probe("echo canary-a > /tmp/left; echo canary-a > ~/left; echo canary-a > /dev/shm/left")
    other = fence.run(fence.open(RULES))
    output, _ = fence.probe("cat /tmp/left ~/left /dev/shm/left; echo done", other)
    assert "canary-a" not in output
    assert "done" in output


ARTEFACTS = """
ln -s /etc/passwd to-passwd; ln -s ../../../../etc/shadow up; mkfifo pipe;
python3 -c 'import socket; socket.socket(1).bind("sock")'
mkdir -p .git/hooks sub/.git; echo 'touch /tmp/PWN' > .git/hooks/post-checkout
echo 'gitdir: /somewhere/else' > sub/.git/x; printf 'gitdir: /root/.git' > worktree.git
echo 'export LD_PRELOAD=/x' > .envrc; mkdir .vscode; echo '{}' > .vscode/tasks.json
mkdir -p .github/workflows; echo x > .github/workflows/ci.yml; echo x > Dockerfile
echo '{"scripts": {"postinstall": "x"}}' > package.json; echo x > sitecustomize.py; echo x > .bashrc
echo a > Name; echo b > NAME; printf 'x' > $'new\\nline'; printf x > $'esc\\e[31m'
printf x > plain.txt
"""


def test_artefacts_are_read_without_being_followed(fence: Fence) -> None:
    """FS-06, FS-08, FS-09, FS-28, AGT-15, AGT-17, AGT-18, AGT-19: what comes out of a review."""
    sandbox = fence.run(fence.open(RULES))
    fence.probe(ARTEFACTS, sandbox)
    fence.run(sandbox.stop())
    changes = fence.run(sandbox.changes())
    found = {change.path: change for change in changes.items}
    assert found["to-passwd"].after == b"/etc/passwd"
    assert found["up"].mode == 0o120000
    refused = dict(changes.refused)
    assert {"pipe", "sock"} <= set(refused)
    assert "pipe" not in found
    held = {file.path for file in host_files(changes) if file.held}
    assert {".git/hooks/post-checkout", ".envrc", ".vscode/tasks.json", ".bashrc"} <= held
    assert {".github/workflows/ci.yml", "to-passwd", "up", "sub/.git/x"} <= held
    late = {file.path for file in host_files(changes)}
    assert {"package.json", "sitecustomize.py", "Dockerfile"} <= late
    assert "plain.txt" not in late
    patch = render(changes)
    assert b"\x1b" not in patch.replace(b"\\033", b"")
    assert b"root:x" not in patch
    assert {"Name", "NAME"} <= set(found)


def test_a_link_swapped_in_is_not_followed(tmp_path: Path) -> None:
    """The reader of changes is given an upper directory full of lies."""
    lower, upper = tmp_path / "lower", tmp_path / "upper"
    lower.mkdir()
    upper.mkdir()
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key").write_text(CANARY)
    (upper / "dir").symlink_to(secret)
    (lower / "dir").mkdir()
    (upper / "file").symlink_to(secret / "key")
    lower_fd, upper_fd = (os.open(path, os.O_RDONLY | os.O_DIRECTORY) for path in (lower, upper))
    try:
        changes = read_changes(lower_fd, upper_fd, begun_ns=time.time_ns())
    finally:
        os.close(lower_fd)
        os.close(upper_fd)
    assert CANARY.encode() not in render(changes)
    assert {change.path for change in changes.items} == {"dir", "file"}


def test_proc_19_no_module_is_loaded(fence: Fence) -> None:
    modules = Path("/proc/modules")
    before = modules.read_text() if modules.exists() else ""
    fence.probe(HOST_PROBES["PROC-19"]["probe"])
    assert (modules.read_text() if modules.exists() else "") == before


def test_proc_29_nothing_outlives(fence: Fence) -> None:
    sandbox = fence.run(fence.open(RULES))
    marker = f"rf-outlives-{os.getpid()}"
    fence.probe(
        f"setsid nohup bash -c 'exec -a {marker} sleep 300' >/dev/null 2>&1 & sleep 0.3", sandbox
    )
    lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if _readable(path)]
    assert not any(line.split(b"\0")[0] == marker.encode() for line in lines)


def _readable(path: Path) -> bool:
    try:
        path.read_bytes()
    except OSError:
        return False
    return True


def test_net_17_other_users_of_the_host_cannot_reach_the_socket(fence: Fence) -> None:
    """Its directory lies below a 0700 state directory."""
    assert (fence.place / "state").stat().st_mode & 0o077 == 0


def test_direct_mode_hides_secrets_too(fence: Fence) -> None:
    direct = replace(
        PROFILE,
        workspace_mode=WorkspaceMode.DIRECT,
        accept_unenforced=PROFILE.accept_unenforced | {"workspace_disk"},
    )
    sandbox = fence.run(fence.open(RULES, direct))
    output, _ = fence.probe("cat .env; mv .env x; cat x; cp README.md y; cat y", sandbox)
    assert CANARY not in output
    assert "a workspace to attack from" in output


def test_dst_27_when_egress_dies_nothing_gets_out() -> None:
    fence = Fence()
    fence.start()
    try:
        assert _reaches(fence, fence.sandbox)
        fence.egress_process.kill()
        before = len(fence.upstream.seen)
        assert not _reaches(fence, fence.sandbox)
        output, _ = fence.probe(
            "python3 -c '\nimport socket\ns=socket.socket(); s.settimeout(3)\n"
            'print(s.connect_ex(("127.0.0.1", 3128)))\ntry:\n print(repr(s.recv(10)))\n'
            "except OSError as e: print(e)'"
        )
        assert "b'HTTP" not in output
        assert len(fence.upstream.seen) == before
        with pytest.raises(Exception, match="egress process has ended"):
            fence.run(fence.open(narrowed()))
    finally:
        fence.stop()


def test_a_dead_recorder_stops_what_carries_a_credential() -> None:
    """Write-ahead fails closed."""
    fence = Fence()
    fence.start()
    try:
        assert _reaches(fence, fence.sandbox)
        os.kill(fence.recorder_process.pid, 9)
        time.sleep(0.3)
        before = len(fence.upstream.seen)
        assert not _reaches(fence, fence.sandbox)
        assert len(fence.upstream.seen) == before
    finally:
        fence.stop()


def test_many_large_bodies_do_not_fill_the_memory_of_egress(fence: Fence) -> None:
    """Forty clients that each send most of a body and wait: a few are held, the rest refused."""
    output, _ = fence.probe(
        "python3 -c '\nfrom h import *\nheld=[]; refused=0\n"
        'head=b"POST /v1/messages HTTP/1.1\\r\\nHost: model.internal\\r\\nContent-Length: %d\\r\\n\\r\\n"%(31<<20)\n'
        "for _ in range(12):\n"
        "    s=dial(8)\n"
        "    try:\n"
        '        s.sendall(head); s.sendall(b"x"*(30<<20)); held.append(s)\n'
        "    except OSError: refused+=1\n"
        'print("held",len(held),"refused",refused)\''
    )
    assert "held 2 refused 10" in output, output
    assert _reaches(fence, fence.sandbox)


def test_the_end_of_a_tunnel_keeps_its_last_bytes(fence: Fence) -> None:
    """The upstream answers 64 MiB and closes; all of it arrives (`/big` says how much)."""
    output, _ = fence.probe(
        "python3 -c '\nfrom h import *\n"
        's=dial(20); a="tunnel.test:443"\n'
        's.sendall(("CONNECT %s HTTP/1.1\\r\\nHost: %s\\r\\n\\r\\n"%(a,a)).encode()); s.recv(4096)\n'
        "c=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT); c.check_hostname=False; c.verify_mode=0\n"
        'x=c.wrap_socket(s,server_hostname="tunnel.test")\n'
        'x.sendall(b"GET /big HTTP/1.0\\r\\nHost: tunnel.test\\r\\n\\r\\n"); n=0\n'
        "while True:\n"
        "    d=x.recv(1<<16)\n"
        "    if not d: break\n"
        "    n+=len(d); time.sleep(0.002)\n"
        'print("got", n>=64<<20)\''
    )
    assert "got True" in output, output
