"""Deliberately weak sandboxes, one a layer: the check must fail on each, with the right id.

A check that never fails proves nothing. Each is bubblewrap with one thing taken from it; the same
ids pass on the whole one (test_probes.py), so that the weakness alone makes the difference.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fence import PROFILE

from ringfence.check import takenover
from ringfence.check.finding import Outcome, exit_status
from ringfence.check.live import Attack
from ringfence.check.place import RULES, Place
from ringfence.check.probes.definition import Probe, Twin, built_in
from ringfence.sandbox import bubblewrap, staged
from ringfence.sandbox.bubblewrap import BubblewrapBackend

Weaken = Callable[[Any, Any], None]


class WeakBackend(BubblewrapBackend):
    """Bubblewrap whose sandboxes are weakened after they have started."""

    def __init__(self, state: Path, weaken: Weaken) -> None:
        super().__init__(state_dir=state)
        self._weaken = weaken

    async def start(self, spec: Any) -> Any:
        sandbox = await super().start(spec)
        # what prepared the place stands in it already: the first program must be as weak
        launcher, sandbox._ready = sandbox._ready, None
        await launcher.end()
        self._weaken(sandbox, spec)
        return sandbox


def attacked(weaken: Weaken, *ids: str) -> dict[str, tuple[Outcome, str]]:
    found = []
    probes = [probe for probe in built_in() if probe.check.id in ids]
    assert len(probes) == len(ids)
    attack = Attack(
        "bubblewrap", lambda state: WeakBackend(state, weaken), PROFILE, probes, found.append
    )
    asyncio.run(attack.run())
    return {finding.check.id: (finding.outcome, finding.evidence) for finding in found}


def nothing(_sandbox: Any, _spec: Any) -> None:
    """The sandbox as it is."""


@pytest.fixture
def options(
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[list[Callable[[list[str], Any], list[str]]]]:
    """What is done to bubblewrap's options before each program."""
    changes: list[Callable[[list[str], Any], list[str]]] = []
    real = bubblewrap.enclose_options

    def changed(rules: Any, facts: Any, **more: Any) -> list[str]:
        found = real(rules, facts, **more)
        for change in changes:
            found = change(found, facts)
        return found

    monkeypatch.setattr(bubblewrap, "enclose_options", changed)
    return changes


def before_the_end(found: list[str], *more: str) -> list[str]:
    """Mounts go before the root is made read-only."""
    at = len(found) - 1 - found[::-1].index("--remount-ro")
    return [*found[:at], *more, *found[at:]]


@pytest.fixture
def shared() -> Iterator[str]:
    """A directory of the host that every uid can enter and write; pytest's own are 0700 above."""
    with tempfile.TemporaryDirectory(prefix="ringfence-weak-") as name:
        os.chmod(name, 0o777)
        yield name


@pytest.mark.root
def test_a_network_that_only_variables_deny() -> None:
    """The PraisonAI trap: proxy variables, and the host's network behind them."""

    def weaken(sandbox: Any, _: Any) -> None:
        os.close(sandbox._net)
        sandbox._net = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    found = attacked(weaken, "NET-06", "NET-15")
    assert found["NET-06"][0] is Outcome.FAIL, found
    assert "listener" in found["NET-06"][1]
    assert found["NET-15"][0] is Outcome.FAIL, found


def test_a_model_route_that_grants_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answers lack the upstream's own headers, by which all other probes see what got through."""
    model = replace(RULES.model, server_tools=("web_",), url_sources=True, mcp_servers=True)
    monkeypatch.setitem(Place.__init__.__kwdefaults__, "rules", replace(RULES, model=model))
    found = attacked(nothing, "API-10", "API-30", "API-31", "API-32")
    for probe in ("API-10", "API-30", "API-31"):
        assert found[probe][0] is Outcome.FAIL, found
    assert found["API-32"][0] is Outcome.PASS, found


def test_an_extra_mount(options: list[Any]) -> None:
    def show(found: list[str], facts: Any) -> list[str]:
        place = str(Path(facts.egress_dir).parents[2])
        return before_the_end(found, "--ro-bind", place, place)

    options.append(show)
    found = attacked(nothing, "FS-40", "FS-41")
    assert found["FS-40"][0] is Outcome.FAIL, found
    assert found["FS-41"][0] is Outcome.PASS, "a read-only mount is not writable"


def test_a_writable_directory_of_the_host(options: list[Any], shared: str) -> None:
    options.append(lambda found, _: before_the_end(found, "--bind", shared, "/srv"))
    assert attacked(nothing, "FS-41")["FS-41"][0] is Outcome.FAIL


def test_no_seccomp(options: list[Any]) -> None:
    def drop(found: list[str], _: Any) -> list[str]:
        at = found.index("--seccomp")
        return found[:at] + found[at + 2 :]

    options.append(drop)
    found = attacked(nothing, "PROC-10", "PROC-20")
    assert found["PROC-10"][0] is Outcome.FAIL, found
    assert found["PROC-20"][0] is Outcome.FAIL, found


def test_a_filter_that_allows_everything() -> None:
    """`Seccomp: 2` alone is no proof."""

    def weaken(sandbox: Any, _: Any) -> None:
        os.ftruncate(sandbox._seccomp, 0)
        os.pwrite(sandbox._seccomp, struct.pack("HBBI", 0x06, 0, 0, 0x7FFF0000), 0)

    found = attacked(weaken, "PROC-10", "PROC-20")
    assert found["PROC-10"][0] is Outcome.PASS, found
    assert found["PROC-20"][0] is Outcome.FAIL, found


def test_a_shared_tmp(options: list[Any], shared: str) -> None:
    options.append(lambda found, _: before_the_end(found, "--bind", shared, "/tmp"))
    assert attacked(nothing, "FS-05")["FS-05"][0] is Outcome.FAIL


def test_an_extra_capability(options: list[Any]) -> None:
    def add(found: list[str], _: Any) -> list[str]:
        at = found.index("--cap-drop")
        return [*found[:at], "--cap-add", "CAP_NET_ADMIN", *found[at + 2 :]]

    options.append(add)
    found = attacked(nothing, "PROC-40")
    assert found["PROC-40"][0] is Outcome.FAIL, found
    assert "CapEff" in found["PROC-40"][1]


@pytest.mark.root
def test_a_writable_cgroup(options: list[Any]) -> None:
    shown: list[str] = []

    def weaken(sandbox: Any, _: Any) -> None:
        group = Path(sandbox._groups.paths[0])
        group = group if group.is_dir() else group.parent
        shown[:] = [str(group)]
        for path in (group, *group.iterdir()):
            os.chown(path, sandbox._facts.uid, sandbox._facts.uid)

    options.append(lambda found, _: before_the_end(found, "--bind", shown[0], "/sys/fs/cgroup"))
    found = attacked(weaken, "FS-43")
    assert found["FS-43"][0] is Outcome.FAIL, found


def test_a_key_in_the_environment() -> None:
    def weaken(sandbox: Any, _: Any) -> None:
        real = sandbox.exec

        async def leaking(argv: Any, *, environment: Any = None, **more: Any) -> Any:
            key = {"ANTHROPIC_API_KEY": "sk-ant-api03-of-the-operator"}
            return await real(argv, environment={**(environment or {}), **key}, **more)

        sandbox.exec = leaking

    found = attacked(weaken, "SEC-14", "SEC-01")
    assert found["SEC-14"][0] is Outcome.FAIL, found
    assert found["SEC-01"][0] is Outcome.FAIL, found


def test_a_daemon_that_outlives() -> None:
    """A judge on the host's side fails, too: the command ends and its daemon is left."""
    from ringfence.check import hostside
    from ringfence.check.judge import Saw

    class Leaves(hostside.Stage):
        async def inside(self, command: str, *_: Any, **__: Any) -> Saw:
            marker = command.split("exec -a ")[1].split()[0]
            self.lane.append(
                await asyncio.create_subprocess_exec("bash", "-c", f"exec -a {marker} sleep 60")
            )
            await asyncio.sleep(0.5)
            return Saw(output="started", status=0)

    async def run() -> tuple[Outcome, str]:
        left: list[Any] = []
        verdict = await hostside.outlives(Leaves(place=None, lane=left), built_in()[0])
        for process in left:
            process.kill()
            await process.wait()
        return verdict

    assert asyncio.run(run())[0] is Outcome.FAIL


SEARCHES = ("SEC-03", "SEC-04", "SEC-15", "AUD-04", "NET-16", "FS-11")


def test_searches_find_what_is_mounted(options: list[Any], shared: str) -> None:
    """Files, a socket and a device, each a mount of its own or below one: a search that stays on
    one file system, or believes what a directory says of a kind, sees none of them.
    """
    place = Path(shared)
    texts = {
        "log.sqlite": "",
        "server.key": "PRIVATE KEY",
        "kept.txt": "sk-ant-api03-x",
        "vault.json": "",
    }
    for name, text in texts.items():
        (place / name).write_text(text)
        (place / name).chmod(0o644)
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(f"{shared}/docker.sock")
        more = ("--ro-bind", shared, "/srv/ringfence")
        more += ("--bind", f"{shared}/docker.sock", "/opt/docker.sock")

        def show(found: list[str], _: Any) -> list[str]:
            device = found.index("/dev") + 1  # before it is made read-only
            found[device:device] = ["--dev-bind", "/dev/null", "/dev/sdz"]
            return before_the_end(found, *more)

        options.append(show)
        found = attacked(nothing, *SEARCHES)
    assert {name: outcome.value for name, (outcome, _) in found.items()} == dict.fromkeys(
        SEARCHES, "fail"
    ), found
    assert "/opt/docker.sock" in found["NET-16"][1] or "/srv/" in found["NET-16"][1]


def test_a_key_that_claude_was_started_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(staged.BASE_ENVIRONMENT, "LEFT", takenover.KEY)
    assert attacked(nothing, "SEC-06")["SEC-06"][0] is Outcome.FAIL


YES = ("SEC-04", "grep", "good")
QUIET = {"quiet": "exit 1", "good": "exit 0", "killed": "kill -9 $$"}


@pytest.mark.parametrize("how", QUIET)
def test_a_search_that_breaks_is_no_pass(options: list[Any], shared: str, how: str) -> None:
    """Programs that searches are made of find nothing, or are killed, one after the other."""
    blind = Path(shared) / "blind"
    blind.write_text(f"#!/bin/bash\n{QUIET[how]}\n")
    blind.chmod(0o755)
    uses = {
        "find": ("SEC-04", "SEC-15", "AUD-04", "NET-16"),
        "grep": ("SEC-01", "SEC-02", "SEC-03", "SEC-04", "SEC-14", "PROC-03"),
        "cat": ("SEC-02", "PROC-03"),
    }
    for program, ids in uses.items():
        path = os.path.realpath(f"/usr/bin/{program}")
        options[:] = [lambda found, _, at=path: before_the_end(found, "--ro-bind", str(blind), at)]
        # to a grep that says yes, every file holds a key
        found = attacked(nothing, *(i for i in ids if (i, program, how) != YES))
        # by its own word, and not because what works beside it did not
        assert {outcome for outcome, _ in found.values()} == {Outcome.ERROR}, (program, found)
        assert all("to no verdict" in why or "killed" in why for _, why in found.values()), found


def test_an_agent_that_finds_a_canary(options: list[Any]) -> None:
    """An extra mount, seen through a real claude."""

    def show(found: list[str], facts: Any) -> list[str]:
        place = str(Path(facts.egress_dir).parents[2])
        return before_the_end(found, "--ro-bind", place, place)

    options.append(show)
    found = attacked(nothing, "AGT-11")
    assert found["AGT-11"][0] is Outcome.FAIL, found
    assert "CANARY_SECRET" not in found["AGT-11"][1], "the evidence does not repeat it"


def test_an_agent_that_finds_another_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """A home that is not made anew: the transcript of one session lies in the next one's."""
    kept: dict[str, bytes] = {}

    class Keeps(BubblewrapBackend):
        async def start(self, spec: Any) -> Any:
            kept.update(spec.home_files or {})
            return await super().start(replace(spec, home_files=dict(kept) or None))

    monkeypatch.setattr(sys.modules[__name__], "WeakBackend", lambda s, _: Keeps(state_dir=s))
    found = attacked(nothing, "AGT-21")
    assert found["AGT-21"][0] is Outcome.FAIL, found


def test_a_call_that_nobody_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the clock of calls the run's own ends it, which is not what was asked."""
    from ringfence.agent.calls import ToolCalls

    monkeypatch.setattr(ToolCalls, "_late", lambda *_: None)
    monkeypatch.setattr(takenover, "SECONDS", 20.0)
    assert attacked(nothing, "TMO-04")["TMO-04"][0] is Outcome.FAIL


def test_a_dead_network_is_no_block(options: list[Any]) -> None:
    """Everything is refused where nothing works: an error, and not a pass."""

    def cut(found: list[str], _: Any) -> list[str]:
        at = next(i for i, word in enumerate(found) if word.endswith("/egress"))
        return found[: at - 1] + found[at + 2 :]

    options.append(cut)
    found = attacked(nothing, "DST-01", "NET-02", "API-05")
    assert {outcome for outcome, _ in found.values()} == {Outcome.ERROR}, found


def test_a_host_that_cannot_start_one_proves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(BubblewrapBackend):
        async def start(self, spec: Any) -> Any:
            raise OSError("no more processes")

    monkeypatch.setattr(sys.modules[__name__], "WeakBackend", lambda s, _: Broken(state_dir=s))
    found = attacked(nothing, "FS-40", "DST-27")
    assert {outcome for outcome, _ in found.values()} == {Outcome.ERROR}, found


def test_an_own_probe_that_escapes_and_one_that_breaks() -> None:
    """Operator's probes: the same judge, and none of them counts as passed for being silent."""
    twin = Twin(title="works", witness="inside", command="echo ALLOWED $TWIN_NONCE")
    model = next(probe for probe in built_in() if probe.check.id == "FS-40")

    def own(name: str, command: str) -> Probe:
        check = type(model.check)(
            id=name, line=model.check.line, layer="own probes", title=name,
            severity=model.check.severity, live=True,
        )  # fmt: skip
        return Probe(check=check, command=command, twin=twin)

    probes = [
        own("escapes", "echo ESCAPED it"),
        own("holds", "python3 -c 'from h import *; esc(conn(\"evil.example:443\"))'"),
        own("breaks", "python3 -c 'import nothing'"),
        own("missing", "nosuchprogram"),
        own("mute", "python3 -c 'import os; os._exit(0); esc(0)'"),
        own("kills", "true; kill -9 $$"),
        own("late", "yes x | head -c 3000000; echo ESCAPED late; yes y | head -c 3000000"),
        own("perl", "perl -e 'print qq(contained\\n); exit 3'"),
        own("sh", "exec sh -c 'echo ESCAPED from sh'"),
        own("wrecks", "chmod 000 /workspace; echo contained"),
        own("after", "cat README.md && echo contained"),
        own("parent", "kill -9 $PPID; kill -9 -1; echo contained"),
        own("shuts", "exec >&- 2>&-; exit 7"),
        replace(own("blind", "echo ESCAPED in its own words"), blind="it needs a resolver"),
        replace(own("seen", 'kill -9 -1; cat "$HOST_CANARY"; echo $CANARY'), blind="the host sees"),
    ]
    found = []
    attack = Attack(
        "bubblewrap", lambda s: BubblewrapBackend(state_dir=s), PROFILE, probes, found.append
    )
    asyncio.run(attack.run())
    outcomes = {finding.check.id: finding.outcome.value for finding in found}
    assert outcomes == {
        "escapes": "fail", "holds": "pass", "breaks": "error", "missing": "error",
        "mute": "error", "kills": "error", "late": "fail", "perl": "pass", "sh": "fail",
        "wrecks": "pass", "after": "pass", "parent": "pass", "shuts": "pass",
        "blind": "not available", "seen": "not available",
    }  # fmt: skip
    assert exit_status(found) == 1
