"""Judges on the host's side, for what cannot be decided inside: floods, leaks, what outlives.

Each is given a stage and gives (outcome, evidence); each holds its own positive control where the
twin of the probe is not enough.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import sqlite3
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ringfence.check.canaries import enclosed, processes, readable
from ringfence.check.finding import Outcome
from ringfence.check.judge import Saw, judge
from ringfence.check.place import HOST, TUNNEL, Lane, Place, run_inside
from ringfence.check.probes.definition import Probe
from ringfence.policy.compiled import EgressRules
from ringfence.record.verify import verify
from ringfence.sandbox.protocol import Sandbox

Verdict = tuple[Outcome, str]
_SECONDS = 45.0
_REACH = "python3 -c 'from h import *; r=tun(req()); print(r.decode(\"latin-1\"))'"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What a judge works with: the fence, and a lane that nothing else uses meanwhile."""

    place: Place
    lane: Lane

    async def inside(
        self,
        command: str,
        sandbox: Sandbox | None = None,
        more: Mapping[str, str] | None = None,
    ) -> Saw:
        """Run a command in the lane's sandbox, or in another."""
        environment = {**self.lane.environment(), **(more or {})}
        return await run_inside(
            sandbox or self.lane.sandbox,
            command,
            environment,
            seconds=_SECONDS * self.place.patience,
        )

    async def reaches(self, sandbox: Sandbox | None = None) -> bool:
        """Whether an allowed request comes back from the upstream."""
        return "x-upstream: 1" in (await self.inside(_REACH, sandbox)).output

    def judged(self, probe: Probe, saw: Saw) -> Verdict:
        """The verdict that would be given without the host's eyes."""
        return judge(probe.command, saw, (self.place.secret, self.place.key), must_say=True)


Judge = Callable[[Stage, Probe], Awaitable[Verdict]]


def held(good: bool, evidence: str) -> Verdict:  # noqa: FBT001
    """Pass or fail."""
    return (Outcome.PASS if good else Outcome.FAIL), evidence


async def empty_list(stage: Stage, _: Probe) -> Verdict:
    """CVE-2025-66479 was the other way round: nothing listed, everything allowed."""
    closed = EgressRules(model=replace(stage.place.rules.model, enabled=False))
    sandbox = await stage.place.open(closed)
    nonce = secrets.token_hex(8)
    saw = await stage.inside(
        f'python3 -c \'from h import *; tun(req(p="/v1/models?{nonce}")); '
        f'print([conn(h+":443") for h in ("{HOST}","a.com","x.test")])\'',
        sandbox,
    )
    quiet = not any(nonce in seen.path for seen in stage.place.upstream.seen)
    return held("[False, False, False]" in saw.output and quiet, saw.output.strip()[-200:])


async def mixed_answer(stage: Stage, probe: Probe) -> Verdict:
    """A name with a public and an inward address: neither is dialled."""
    before = stage.lane.canaries.hits()
    saw = await stage.inside(probe.command)
    said = await stage.inside(
        "python3 -c 'from h import *; print(px(\"CONNECT rebind-mixed.test:443 HTTP/1.1\\r\\n"
        "Host: rebind-mixed.test:443\\r\\n\\r\\n\")[:60])'"
    )
    good = "403" in said.output and stage.lane.canaries.hits() == before
    return held(good and "ESCAPED" not in saw.output, said.output.strip()[-200:])


async def no_descriptors(stage: Stage, _: Probe) -> Verdict:
    """Descriptors sent to egress leave none behind there."""
    place = f"/proc/{stage.place.egress_process.pid}/fd"
    if os.geteuid() != 0:
        return Outcome.NOT_AVAILABLE, "only root may count the descriptors of the egress process"
    before = len(os.listdir(place))  # noqa: PTH208
    await stage.inside(
        "python3 -c '\nfrom h import *\nfor _ in range(50):\n s=dial()\n"
        ' socket.send_fds(s,[b"GET / HTTP/1.1\\r\\n"],[0,1,2])\n s.close()\''
    )
    await asyncio.sleep(0.5)
    after = len(os.listdir(place))  # noqa: PTH208
    # other lanes talk to egress meanwhile: what 150 kept descriptors would show is far above
    return held(after - before < 60, f"{before} before, {after} after 150 were sent")


def _resident_kb(pid: int) -> int:
    for line in readable(f"/proc/{pid}/status").decode().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    return 0


async def slow_reader(stage: Stage, _: Probe) -> Verdict:
    """An answer of 64 MiB that nobody reads stays at the upstream."""
    pid = stage.place.egress_process.pid
    before = _resident_kb(pid)
    saw = await stage.inside(
        "python3 -c '\nfrom h import *\n"
        's=dial(); a=ALLOW+":443"\n'
        's.sendall(("CONNECT %s HTTP/1.1\\r\\nHost: %s\\r\\n\\r\\n"%(a,a)).encode())\n'
        "s.recv(4096)\n"
        "c=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT); c.check_hostname=False; c.verify_mode=0\n"
        'x=c.wrap_socket(s,server_hostname=ALLOW); x.sendall(req(p="/big").encode())\n'
        'time.sleep(2); print("waited")\''
    )
    grown = _resident_kb(pid) - before
    if "waited" not in saw.output or not before:
        return Outcome.ERROR, f"the big answer was never asked for: {saw.output.strip()[-200:]}"
    return held(grown < 48 << 10, f"egress grew by {grown} kB")


async def inbound(stage: Stage, _: Probe) -> Verdict:
    """The host knocks while a program inside listens on every address."""
    listening = asyncio.ensure_future(
        stage.inside(
            'python3 -c \'import socket; s=socket.create_server(("0.0.0.0",18999)); '
            's.settimeout(2)\ntry: s.accept(); print("ESCAPED accepted")\n'
            'except TimeoutError: print("contained nobody came")\''
        )
    )
    reached = False
    while not listening.done():
        with socket.socket() as peer:
            peer.settimeout(0.2)
            reached = reached or peer.connect_ex(("127.0.0.1", 18999)) == 0
        await asyncio.sleep(0.1)
    output = (await listening).output
    if "contained" not in output and "ESCAPED" not in output:
        return Outcome.ERROR, f"nothing listened inside: {output.strip()[-200:]}"
    return held("ESCAPED" not in output, output.strip()[-200:])


def _ours() -> set[str]:
    return {HOST, TUNNEL}


async def nothing_foreign(stage: Stage, probe: Probe) -> Verdict:
    """The command may do what it wants: the host looks where its requests arrived."""
    saw = await stage.inside(probe.command)
    verdict = stage.judged(probe, saw)
    foreign = _foreign(stage.place)
    if verdict[0] is Outcome.FAIL or foreign:
        return Outcome.FAIL, ", ".join(foreign) or verdict[1]
    return Outcome.PASS, f"nothing of it arrived upstream: {saw.output.strip()[-160:]}"


def _foreign(place: Place) -> list[str]:
    found = set()
    for seen in place.upstream.seen:
        headers = {name.lower(): value for name, value in seen.headers}
        model = seen.path.partition("?")[0] in {"/v1/messages", "/v1/messages/count_tokens"}
        granted = seen.method == "GET" or (seen.method == "POST" and model)
        if headers.get("host") not in _ours() or not granted:
            found.add(f"{seen.method} {headers.get('host')}{seen.path}"[:120])
        if "x-forwarded-for" in headers:
            found.add("x-forwarded-for")
        if headers.get("accept-encoding") not in {"identity", None}:
            found.add("an answer that egress could not have read")
    return sorted(found)


async def only_granted(stage: Stage, _: Probe) -> Verdict:
    """After all probes: the methods and hosts that the upstream saw."""
    foreign = _foreign(stage.place)
    seen = len(stage.place.upstream.seen)
    return held(not foreign, ", ".join(foreign) or f"{seen} requests, each of them granted")


async def uid_zero(stage: Stage, probe: Probe) -> Verdict:
    """Commands behind other commands run; what they are must not matter."""
    saw = await stage.inside(probe.command)
    return held("uid=0" not in saw.output, saw.output.strip()[-200:])


async def host_uid(stage: Stage, probe: Probe) -> Verdict:
    """Decision 8: what runs inside is nobody of the host's. The map that a program inside sees
    names ids of the namespace above it, which may be no more than one of ours.
    """
    marker = f"rf-uid-{secrets.token_hex(6)}"
    said = stage.judged(probe, await stage.inside(probe.command))
    running = asyncio.ensure_future(stage.inside(f"(exec -a {marker} sleep 1.5); echo slept"))
    uids: set[str] = set()
    while not running.done():
        for pid in await asyncio.to_thread(_of_the_sandbox, marker.encode()):
            status = readable(f"/proc/{pid}/status").decode()
            uids |= {line for line in status.splitlines() if line.startswith("Uid:")}
        await asyncio.sleep(0.05)
    await running
    if not uids:
        return Outcome.ERROR, "nothing of the sandbox was seen on the host"
    if any("0" in line.split()[1:] for line in uids):
        return Outcome.FAIL, f"a program inside is root of the host: {sorted(uids)}"
    return (
        said if said[0] is not Outcome.PASS else (Outcome.PASS, f"{said[1]}; host: {sorted(uids)}")
    )


def _of_the_sandbox(marker: bytes) -> list[int]:
    """A kernel of its own shows this host none of its programs, but what runs that kernel."""
    return [*processes(marker), *enclosed()]


async def core_dumps(stage: Stage, probe: Probe) -> Verdict:
    """core_pattern may name a program of the host, which would run as its root."""
    saw = await stage.inside(f'echo "hard limit: $(ulimit -Hc)"; {probe.command}')
    return held("hard limit: 0" in saw.output.splitlines(), saw.output.strip()[-200:])


async def no_module(stage: Stage, probe: Probe) -> Verdict:
    """Sockets and file systems inside load no module of the host's kernel."""
    before = readable("/proc/modules")
    await stage.inside(probe.command)
    new = {line.split()[0] for line in readable("/proc/modules").splitlines()}
    new -= {line.split()[0] for line in before.splitlines()}
    return held(not new, f"loaded meanwhile: {sorted(new)}" if new else "no module was loaded")


async def outlives(stage: Stage, _: Probe) -> Verdict:
    """A daemon that forks twice is dead when its command has ended."""
    marker = f"rf-outlives-{secrets.token_hex(6)}"
    start = f"setsid nohup bash -c 'exec -a {marker} sleep 300' >/dev/null 2>&1 &"
    running = asyncio.ensure_future(stage.inside(f"{start} sleep 1; echo started"))
    seen = False
    while not running.done():
        seen = seen or bool(await asyncio.to_thread(processes, marker.encode()))
        await asyncio.sleep(0.05)
    left = await asyncio.to_thread(processes, marker.encode())
    # a technology with a kernel of its own shows the host nothing: what it said must do
    if "started" not in (await running).output:
        return Outcome.ERROR, "the daemon was never started"
    return held(not left, f"seen while it ran: {seen}; left over: {left}")


async def flood(stage: Stage, _: Probe) -> Verdict:
    """Requirement K: denials are counted, and neither terminal escapes nor lines are forged."""
    name = f"flood-{secrets.token_hex(4)}"
    before = len(stage.place.records())
    saw = await stage.inside(
        f'python3 -c \'\nfrom h import *\nfor i in range(200):\n conn("{name}-%d.test:443" % i)\n'
        'px("GET /\\r\\nFAKE audit line HTTP/1.1\\r\\nHost: a\\r\\n\\r\\n")\n'
        'print("asked", conn("x\\x1b[2J.example:443"))\''
    )
    await asyncio.sleep(0.5)
    records = stage.place.records()
    text = repr(records)
    good = "asked False" in saw.output and "\\x1b" not in text and "\\r\\nFAKE" not in text
    there = f"{name}-0.test" in text
    return held(good and there, f"{len(records) - before} records for 200 refusals")


async def no_leak(stage: Stage, _: Probe) -> Verdict:
    """The key in no file that ringfence wrote; the vault holds it sealed."""
    found = await asyncio.to_thread(_files_with, stage.place.state, stage.place.key.encode())
    return held(not found, f"the key is in {found}" if found else "in none of ringfence's files")


def _files_with(directory: Path, value: bytes) -> list[str]:
    return [
        str(path.relative_to(directory))
        for path in directory.rglob("*")
        # what a technology has mounted or copied there for a sandbox is judged inside
        if path.is_file() and path.stat().st_size < 64 << 20 and value in path.read_bytes()
    ]


async def persists(stage: Stage, _: Probe) -> Verdict:
    """What one sandbox leaves in its scratch places, another does not find."""
    mark = secrets.token_hex(8)
    where = "/tmp /var/tmp /dev/shm ~"  # noqa: S108  inside
    wrote = await stage.inside(f"for d in {where}; do echo {mark} > $d/left-{mark}; done; ls /tmp")
    other = await stage.place.open()
    saw = await stage.inside(f"for d in {where}; do cat $d/left-{mark}; done; echo looked", other)
    if f"left-{mark}" not in wrote.output or "looked" not in saw.output:
        return Outcome.ERROR, "one of the two sandboxes wrote or read nothing"
    return held(f"\n{mark}\n" not in f"\n{saw.output}", saw.output.strip()[-200:])


async def meets(stage: Stage, _: Probe) -> Verdict:
    """No port, abstract socket or shared memory is common to two sandboxes."""
    other = await stage.place.open()
    name = f"meet-{secrets.token_hex(6)}"
    listen = (
        "python3 -c '\nimport socket,time\n"
        'a=socket.create_server(("127.0.0.1",18998)); a.settimeout(3)\n'
        f'open("/dev/shm/{name}","w").write("x")\n'
        "try: b=socket.socket(socket.AF_UNIX)\nexcept PermissionError: b=None\n"
        f'if b: b.bind("\\0{name}"); b.listen(); b.settimeout(0)\n'
        'try: a.accept(); print("ESCAPED tcp")\nexcept TimeoutError: print("contained")\n'
        'try: b and b.accept() and print("ESCAPED abstract")\nexcept BlockingIOError: pass\''
    )
    knock = (
        "python3 -c '\nimport os,socket,time\nfor _ in range(15):\n"
        ' a=socket.socket(); r=a.connect_ex(("127.0.0.1",18998))\n'
        f' try: q=socket.socket(socket.AF_UNIX).connect_ex("\\0{name}")\n'
        " except PermissionError: q=1\n"
        f' if r==0 or q==0 or os.path.exists("/dev/shm/{name}"): print("ESCAPED",r,q); break\n'
        " time.sleep(0.1)\n'"
    )
    first, second = await asyncio.gather(stage.inside(listen), stage.inside(knock, other))
    if "contained" not in first.output and "ESCAPED" not in first.output:
        return Outcome.ERROR, f"nothing listened: {first.output.strip()[-200:]}"
    both = first.output + second.output
    return held("ESCAPED" not in both, both.strip()[-200:] or "they did not meet")


_EIGHT = """python3 - <<'EOF'
from h import *
import json, threading
body = json.dumps({"model": "claude-sonnet-5", "max_tokens": 9,
                   "messages": [{"role": "user", "content": "MARK"}]})
head = ("POST /v1/messages HTTP/1.1\\r\\nHost: model.internal\\r\\n"
        "Content-Type: application/json\\r\\nContent-Length: %d\\r\\n\\r\\n")
got = []
def ask():
    got.append(code(px(head % len(body) + body, 8)))
threads = [threading.Thread(target=ask) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(sorted(got))
EOF
"""


async def budget(stage: Stage, _: Probe) -> Verdict:
    """Eight requests at once under a limit of two: the limit is the run's, not the stream's."""
    rules = stage.place.rules
    sandbox = await stage.place.open(replace(rules, model=replace(rules.model, max_requests=2)))
    mark = secrets.token_hex(6)
    saw = await stage.inside(_EIGHT.replace("MARK", mark), sandbox)
    count = sum(mark.encode() in seen.body for seen in stage.place.upstream.seen)
    if not count:
        return Outcome.ERROR, f"not even the first came through: {saw.output.strip()[-200:]}"
    return held(count <= 2, f"{count} of 8 came through; answers {saw.output.strip()[-100:]}")


async def recorded_refusal(stage: Stage, probe: Probe) -> Verdict:
    """Blocked and logged."""
    name = f"audit-{secrets.token_hex(6)}.test"
    await stage.inside(probe.command, more={"AUDIT_HOST": name})
    found = await _record(stage.place, "egress.refused", name)
    return held(found is not None, f"recorded: {found}" if found else "no record of the refusal")


async def recorded_use(stage: Stage, _: Probe) -> Verdict:
    """An allowed request is in the log, with the host that it went to."""
    if not await stage.reaches():
        return Outcome.ERROR, "the allowed request did not come through"
    found = await _record(stage.place, "egress.allowed", HOST)
    return held(found is not None, f"recorded: {found}" if found else "no record of it")


async def _record(place: Place, kind: str, host: str) -> str | None:
    for _ in range(20):
        for record in place.records():
            named = record.get("host") or str(record.get("target")).rpartition(":")[0]
            if record["type"] == kind and named == host:
                return f"{kind} {host} {record.get('rule') or record.get('reason')}"
        await asyncio.sleep(0.1)
    return None


async def log_verifies(stage: Stage, _: Probe) -> Verdict:
    """A copy verifies; the same copy with one changed byte does not."""
    return await asyncio.to_thread(_log_verifies, stage.place)


def _log_verifies(place: Place) -> Verdict:
    audit, copy = place.state / "audit", place.directory / "copy.sqlite"
    source = sqlite3.connect(f"file:{audit / 'log.sqlite'}?mode=ro", uri=True)
    target = sqlite3.connect(copy)
    try:
        source.backup(target)
        key = (audit / "public.key").read_text()
        good = verify(copy, key, [])
        with target:
            for (name,) in target.execute(
                "SELECT name FROM sqlite_master WHERE type = 'trigger'"
            ).fetchall():
                target.execute(f"DROP TRIGGER {name}")
            (body,) = target.execute("SELECT body FROM record WHERE idx = 0").fetchone()
            changed_body = bytes([*body[:-2], body[-2] ^ 1, body[-1]])
            target.execute("UPDATE record SET body = ? WHERE idx = 0", (changed_body,))
        changed = verify(copy, key, [])
    finally:
        source.close()
        target.close()
        copy.unlink(missing_ok=True)
    if not good.records:
        return Outcome.ERROR, "the log is empty"
    return held(good.ok and not changed.ok, f"{good.records} records; changed copy: {changed.ok}")


async def recorder_dies(stage: Stage, _: Probe) -> Verdict:
    """Write-ahead fails closed. Ends the place: the last of all judges."""
    if not await stage.reaches():
        return Outcome.ERROR, "the allowed request did not come through before"
    os.kill(stage.place.recorder_process.pid, 9)
    await asyncio.sleep(0.3)
    before = len(stage.place.upstream.seen)
    reached = await stage.reaches()
    quiet = len(stage.place.upstream.seen) == before
    return held(quiet and not reached, "nothing left after the recorder was killed")


async def egress_dies(stage: Stage, _: Probe) -> Verdict:
    """Fail closed: without egress there is no way out at all. Needs a place of its own."""
    place = stage.place
    if not await stage.reaches():
        return Outcome.ERROR, "the allowed request did not come through before"
    await asyncio.to_thread(place.egress_process.kill)
    before, started = len(place.upstream.seen), time.monotonic()
    reached = await stage.reaches()
    saw = await stage.inside(
        'python3 -c \'\nimport socket\nr=[]\nfor a in (("127.0.0.1",3128),("192.0.2.1",443)):\n'
        " s=socket.socket(); s.settimeout(3); e=s.connect_ex(a)\n"
        " try: r.append((e, s.recv(10)))\n except OSError as x: r.append((e, str(x)))\nprint(r)'"
    )
    quiet = len(place.upstream.seen) == before and "HTTP" not in saw.output
    seconds = time.monotonic() - started
    return held(quiet and not reached, f"dead in {seconds:.1f} s: {saw.output.strip()[-120:]}")


JUDGES: Mapping[str, Judge] = {
    "NET-22": inbound,
    "NET-24": empty_list,
    "NET-19": no_descriptors,
    "DST-18": mixed_answer,
    "HTTP-30": slow_reader,
    "API-18": nothing_foreign,
    "API-20": nothing_foreign,
    "API-23": budget,
    "FS-05": persists,
    "PROC-19": no_module,
    "PROC-29": outlives,
    "PROC-31": core_dumps,
    "PROC-42": host_uid,
    "AGT-12": nothing_foreign,
    "AGT-13": uid_zero,
    "AGT-25": flood,
    "AGT-26": meets,
    "AUD-01": recorded_refusal,
    "AUD-02": recorded_use,
    "AUD-03": log_verifies,
}
"""Run in a lane, one after the other."""

LAST: Mapping[str, Judge] = {
    "NET-26": only_granted,
    "SEC-09": no_leak,
    "AUD-05": recorder_dies,
}
"""Run when everything else has ended, in this order."""

ALONE: Mapping[str, Judge] = {"DST-27": egress_dies}
"""Each in a place of its own, which it breaks."""
