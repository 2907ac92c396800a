"""What only the host can judge, beside the judges of `ringfence check` (ringfence.check.hostside)."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fence import CANARY, KEY, PROFILE, RULES, Fence

from ringfence.check.canaries import enclosed
from ringfence.model import WorkspaceMode
from ringfence.sandbox.overlay import read_changes
from ringfence.sandbox.patch import render


@pytest.fixture(scope="module")
def fence() -> Iterator[Fence]:
    fence = Fence()
    fence.start()
    try:
        yield fence
        fence.assert_only_what_was_granted_came_out()
    finally:
        fence.stop()


def _reaches(fence: Fence, sandbox: object) -> bool:
    command = "python3 -c 'from h import *; r=tun(req()); print(r.decode(\"latin-1\"))'"
    output, _ = fence.probe(command, sandbox)
    return "x-upstream: 1" in output


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


def test_proc_42_sees_whose_the_processes_of_a_sandbox_are() -> None:
    """Also those of a kernel of its own; and no process that is not enclosed."""
    flags = ["-p"] if os.geteuid() == 0 else ["-Up"]
    sleep = ["--fork", "--kill-child", "sleep", "30"]
    enclosing = subprocess.Popen(["unshare", *flags, *sleep])
    plain = subprocess.Popen(["sleep", "30"])
    try:
        children = Path(f"/proc/{enclosing.pid}/task/{enclosing.pid}/children")
        deadline = time.monotonic() + 10
        while not (found := children.read_text().split()) and time.monotonic() < deadline:
            time.sleep(0.02)
        seen = enclosed()
        assert found
        assert int(found[0]) in seen
        assert not {plain.pid, enclosing.pid} & set(seen)
    finally:
        for process in (enclosing, plain):
            process.kill()
            process.wait()
