"""The parts of `ringfence check` that decide: judging, counting, versions, reports, rendering."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from ringfence.check import acts, coverage, render, report, run, static, versions
from ringfence.check.canaries import Canaries
from ringfence.check.catalogue import catalogue, select
from ringfence.check.finding import Check, Finding, Line, Outcome, Severity, exit_status
from ringfence.check.hostside import ALONE, JUDGES, LAST
from ringfence.check.judge import Saw, judge
from ringfence.check.live import Attack
from ringfence.check.probes.definition import FAMILIES, built_in, read_attacks
from ringfence.check.spool import Spool
from ringfence.cli import checktable
from ringfence.config import Config
from ringfence.errors import CallerError, DeniedError
from ringfence.policy.compile import compile_policy
from ringfence.policy.compiled import SandboxProfile
from ringfence.policy.load import from_mapping, load_policy
from ringfence.sandbox import container, gvisor
from ringfence.sandbox.bubblewrap import BubblewrapBackend
from ringfence.sandbox.container import ContainerBackend
from ringfence.sandbox.gvisor import GvisorBackend
from ringfence.sandbox.protocol import Control, ControlState, engine_of

CHECK = Check(
    id="X-1", line=Line.NETWORK, layer="network", title="A <b>title</b>", severity=Severity.HIGH,
    live=True, expect="nothing", mend="mend it", source="CVE-0",
)  # fmt: skip


def finding(outcome: Outcome, evidence: str = "", isolation: str = "bubblewrap") -> Finding:
    return Finding(check=CHECK, outcome=outcome, evidence=evidence, isolation=isolation)


def result(*findings: Finding) -> report.Result:
    tried = report.Tried(name="bubblewrap", available=True, start_seconds=0.2, seconds=9)
    return report.Result(
        time="2026-11-26T01:00:00Z", seconds=9.0, policy="ab" * 32, policy_source="strict",
        isolations=(tried,), findings=findings,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("command", "saw", "outcome"),
    [
        ("x", Saw(output="contained\n", status=0), "pass"),
        ("x", Saw(output="fine\nESCAPED by air\n", status=0), "fail"),
        ("x", Saw(output="not at the start ESCAPED\n", status=0), "pass"),
        ("x", Saw(output="ESCAPED\nTraceback (most recent call last)\n", status=1), "fail"),
        ("x", Saw(output="s3cret\n", status=0), "fail"),
        ("x", Saw(output="contained\n", status=0, hits=("listener",)), "fail"),
        ("x", Saw(output="Traceback (most recent call last)\n", status=1), "error"),
        ("x", Saw(output="bash: nosuch: command not found\n", status=127), "error"),
        ("x", Saw(output="contained\n", status=None), "error"),
        ("x", Saw(output="contained\n", status=137), "error"),
        ("x", Saw(output="\x1b[31mESCAPED\x1b[0m in red\n", status=0), "fail"),
        ("x", Saw(output="bash: line 1: nosuch: command not found\ncontained", status=0), "error"),
        ("x", Saw(output="bash: line 1: /tmp/x: Permission denied\n", status=126), "pass"),
        ("x", Saw(output="cannot execute binary file: Exec format error\n", status=126), "error"),
        ("x", Saw(output="", status=255), "pass"),
        ("x", Saw(output="", status=192), "error"),
        ("esc(1)", Saw(output="", status=0), "error"),
        ("esc(1)", Saw(output="contained\n", status=0), "pass"),
    ],
)
def test_judging(command: str, saw: Saw, outcome: str) -> None:
    found, evidence = judge(command, saw, ("s3cret",))
    assert found.value == outcome
    assert "s3cret" not in evidence


def test_silence_is_no_pass_of_a_built_in_probe() -> None:
    """A search that breaks or is cut off is as quiet as one that found nothing."""
    for said in ("", "/srv/key\n", "what was planted is not found\n"):
        silent = Saw(output=said, status=0)
        assert judge("x", silent, ())[0] is Outcome.PASS
        assert judge("x", silent, (), must_say=True)[0] is Outcome.ERROR
    said = Saw(output="contained\n", status=0)
    assert judge("x", said, (), must_say=True)[0] is Outcome.PASS
    for probe in built_in():
        if not (probe.host or probe.residual):
            assert any(word in probe.command for word in ("esc(", "verdict ", "contained"))
            assert "; echo contained" not in probe.command or "find" not in probe.command
            assert "-xdev" not in probe.command, "an extra mount is what has to be found"


GENERIC = 424
"""From here up all processors have the same numbers (pidfd_send_signal, Linux 5.1)."""


def test_a_probe_by_number_says_whose_number_it_is() -> None:
    asked = {probe.check.id: probe for probe in built_in() if "sysc(" in probe.command}
    for name, probe in asked.items():
        numbers = [int(number) for number in re.findall(r"sysc\((\d+)", probe.command)]
        apart = "x86_64" in probe.command or any(number < GENERIC for number in numbers)
        assert (probe.unless == "other_processor") == apart, name
    assert {f"PROC-{number}" for number in (13, 17, 20, 50, 51, 52, 53, 54)} <= set(asked)


@pytest.mark.parametrize(("machine", "asked"), [("x86_64", True), ("aarch64", False)])
def test_a_probe_by_number_is_not_available_on_another_processor(
    monkeypatch: pytest.MonkeyPatch, machine: str, asked: bool
) -> None:
    """Never passed: a call that is not there is refused by any kernel."""
    monkeypatch.setattr(platform, "machine", lambda: machine)
    probes = [probe for probe in built_in() if probe.unless == "other_processor"]
    found: list[Finding] = []
    profile = compile_policy(load_policy(None)).sandbox
    attack = Attack("bubblewrap", lambda _: pytest.fail("started"), profile, probes, found.append)
    attack._settle_unasked()
    assert len(found) == (0 if asked else len(probes))
    assert {one.outcome for one in found} <= {Outcome.NOT_AVAILABLE}
    assert all("not aarch64" in one.evidence for one in found)


@pytest.mark.parametrize("size", [10, 700_000, 5_000_000])
def test_a_verdict_is_found_however_much_is_printed(size: int) -> None:
    for said, outcome in (("ESCAPED late", "fail"), ("s3cret", "fail"), ("fine", "pass")):
        for after in (0, 3_000_000):
            spool = Spool(("s3cret",))
            text = b"x" * size + b"\n" + said.encode() + b"\n" + b"y\n" * (after // 2)
            for at in range(0, len(text), 65_537):
                spool.feed(text[at : at + 65_537])
            assert len(spool.text()) < 1_100_000
            assert judge("x", Saw(output=spool.text(), status=0), ("s3cret",))[0] == outcome


def test_a_verdict_cut_between_two_reads_is_whole() -> None:
    text = b"x" * 700_000 + b"\nESCAPED by a hair\n" + b"y" * 1_500_000
    for cut in range(700_000, 700_020):
        spool = Spool()
        for part in (text[:cut], text[cut:]):
            spool.feed(part)
        assert judge("x", Saw(output=spool.text(), status=0), ())[0] is Outcome.FAIL, cut


def test_only_the_host_is_believed_of_a_probe_that_is_blind() -> None:
    said = Saw(output="ESCAPED? written\n", status=1)
    assert judge("x", said, (), believe=False)[0] is Outcome.PASS
    assert judge("x", replace(said, hits=("file",)), (), believe=False)[0] is Outcome.FAIL
    assert judge("x", said, ("written",), believe=False)[0] is Outcome.FAIL


@pytest.mark.parametrize(
    ("outcomes", "status"),
    [("pass", 0), ("pass not", 0), ("pass error", 4), ("fail error pass", 1), ("not", 4), ("", 4)],
)
def test_exit_status(outcomes: str, status: int) -> None:
    names = {"not": Outcome.NOT_AVAILABLE}
    found = [finding(names.get(name) or Outcome(name)) for name in outcomes.split()]
    assert exit_status(found) == status


def test_ids_are_unique_and_every_probe_can_be_judged() -> None:
    ids = [check.id for check in catalogue()]
    assert len(ids) == len(set(ids))
    from ringfence.check import artefacts

    judged = {*JUDGES, *LAST, *artefacts.JUDGES, *acts.JUDGED, *ALONE}
    for probe in built_in():
        assert probe.command or probe.check.id in judged
        if probe.host and not probe.residual:
            assert probe.check.id in judged, probe.check.id
    assert judged <= set(ids)


def test_every_attack_of_the_suite_has_a_probe_and_somebody_who_decides() -> None:
    rows = coverage.suite()
    assert len({row.row for row in rows}) == len(rows) == 144
    ids = {check.id for check in catalogue()}
    for row in rows:
        assert set(row.ids) == {row.row} <= ids, row.row
        assert row.decides, row.row
    nobody = {row.row for row in rows if row.decides.startswith("nobody")}
    assert nobody == {"DST-20", "API-21", "API-22", "PROC-32", "PROC-36"}
    assert {check.line for check in catalogue()} == set(Line)
    assert len(built_in()) >= 144 + 15
    assert len(FAMILIES) == 9


def test_every_precedent_is_answered() -> None:
    rows = coverage.fell()
    assert [row.row for row in rows] == [f"P{number}" for number in range(1, 33)]
    ids = {check.id for check in catalogue()}
    for row in rows:
        assert set(row.ids) <= ids, row.attack
        assert row.ids, row.attack


def test_a_misspelt_id_selects_nothing_silently() -> None:
    known = ["NET-01", "NET-02", "own.a"]
    chosen = select(["NET-*"], known)
    assert chosen.takes("NET-01")
    assert not chosen.takes("own.a")
    with pytest.raises(CallerError, match="NET-99"):
        select(["NET-01", "NET-99"], known)


def test_lines_without_a_feature_are_never_passed() -> None:
    policy = compile_policy(load_policy(None))
    outcomes = {f.check.line: f.outcome for f in static.feature_findings(policy)}
    assert outcomes[Line.ERROR_BUDGET] is Outcome.NOT_AVAILABLE
    assert outcomes[Line.DEGRADATION] is Outcome.NOT_AVAILABLE


def test_policy_lint_is_a_check() -> None:
    clean = {f.check.id: f for f in static.policy_findings(load_policy(None), exists=bool)}
    loose = from_mapping({"preset": "strict", "accept_unenforced": ["network"]})
    found = {f.check.id: f for f in static.policy_findings(loose, exists=bool)}
    assert clean["POL031"].outcome is Outcome.PASS
    assert found["POL031"].outcome is Outcome.FAIL
    assert "accept_unenforced" in found["POL031"].evidence


def test_a_control_that_is_accepted_does_not_hold() -> None:
    states = [
        ControlState(control=Control.MEMORY, enforced=False, how="no cgroup", mend="be root"),
        ControlState(control=Control.SECCOMP, enforced=True, how="filter"),
    ]
    found = {f.check.id: f for f in static.control_findings("b", states, frozenset({"memory"}))}
    assert found["HOST-memory"].outcome is Outcome.FAIL
    assert "the policy accepts it" in found["HOST-memory"].evidence
    assert found["HOST-seccomp"].outcome is Outcome.PASS
    assert found["HOST-cpu"].outcome is Outcome.NOT_AVAILABLE


def test_where_nothing_starts_there_is_nothing_to_attack(tmp_path: Path) -> None:
    """Said once, by the controls: neither passed nor an error of each probe."""
    state = ControlState(control=Control.MEMORY, enforced=False, how="no cgroup", mend="be root")

    class Weak:
        def probe(self, _: Any) -> list[ControlState]:
            return [state]

    told: list[Finding] = []
    question = run.Question(
        config=Config(state_dir=tmp_path),
        backends={"weak": lambda _: Weak()},  # type: ignore[dict-item]
        document=load_policy(None),
        source="strict",
        isolation="weak",
        selection=select(["HOST-*", "NET-*"], [check.id for check in catalogue()]),
    )
    done = asyncio.run(run.check(question, told.append))
    (tried,) = done.isolations
    assert not tried.available
    assert "memory" in tried.why
    assert "accept_unenforced" in tried.why
    outcomes = {finding.check.id: finding.outcome for finding in told}
    assert outcomes["HOST-memory"] is Outcome.FAIL
    assert not any(name.startswith("NET") for name in outcomes)
    assert done.status == 1


HOLES = [
    ("1.1.12", None, "pass"), ("1.1.5", None, "fail"), ("1.2.0", None, "pass"),
    ("1.1.5+ds1-1+deb12u1", "bookworm", "pass"), ("1.1.5+ds1-1", "bookworm", "fail"),
    ("1.1.5+ds1-1+deb12u1", "", "fail"), ("unknown", None, "error"),
]  # fmt: skip


@pytest.mark.skipif(shutil.which("dpkg") is None, reason="needs dpkg, which orders versions")
@pytest.mark.parametrize(("version", "release", "outcome"), HOLES)
def test_a_version_is_judged_by_who_patched_it(
    version: str, release: str | None, outcome: str
) -> None:
    there = versions.Installed(
        version=version, package=None if release is None else "runc", release=release or ""
    )
    found = {
        f.check.id: f for f in versions.findings(["container"], lambda _: there, engine="runc")
    }
    assert found["VER-runc-CVE-2024-21626"].outcome.value == outcome


@pytest.mark.parametrize(
    ("program", "hole", "version", "outcome"),
    [
        ("runc", "CVE-2025-31133", "1.2.7", "fail"), ("runc", "CVE-2025-31133", "1.2.8", "pass"),
        ("runc", "CVE-2025-31133", "1.3.0", "fail"), ("runc", "CVE-2025-31133", "1.4.0", "pass"),
        ("node", "CVE-2025-23166", "20.20.2", "pass"), ("node", "CVE-2025-23166", "22.1.0", "fail"),
        ("runsc", "CVE-2018-16359", "0.0~20240729.0-4", "pass"),
        ("qemu", "CVE-2024-3446", "1:8.2.0", "fail"),
    ],
)  # fmt: skip
def test_a_fix_closes_its_own_branch(program: str, hole: str, version: str, outcome: str) -> None:
    there = versions.Installed(version=version)
    users = ["container", "gvisor", "microvm", "runtime"]
    engine = program if program == "runc" else "auto"  # an ordinary user has crun
    found = {f.check.id: f for f in versions.findings(users, lambda _: there, engine=engine)}
    assert found[f"VER-{program}-{hole}"].outcome.value == outcome


def test_only_what_makes_containers_here_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hole of a runtime that is installed and never started lets nobody out."""
    old = versions.Installed(version="0.1")
    all_there, only_crun = (lambda _: old), (lambda p: old if p["commands"] == ["crun"] else None)

    def judged(look: Any, engine: str, uid: int) -> set[str]:
        monkeypatch.setattr(os, "geteuid", lambda: uid)
        found = versions.findings(["container"], look, engine=engine)
        return {
            f.check.id.split("-")[1]
            for f in found
            if f.outcome is Outcome.FAIL and "claude" not in f.check.id
        }

    assert judged(all_there, "auto", 0) == {"runc"}
    assert judged(only_crun, "auto", 0) == {"crun"}
    assert judged(all_there, "auto", 1000) == {"crun"}
    assert judged(all_there, "crun", 0) == {"crun"}
    assert judged(all_there, "podman", 0) == {"podman", "crun"}
    assert judged(all_there, "docker", 0) == {"docker", "runc", "crun"}


def test_a_report_says_what_made_the_sandboxes(capsys: pytest.CaptureFixture[str]) -> None:
    tried = report.Tried(name="bubblewrap", available=True, engine="podman with crun")
    one = replace(result(finding(Outcome.PASS)), isolations=(tried,))
    assert one.to_json()["isolations"][0]["engine"] == "podman with crun"
    assert "made by podman with crun" in render.html(one)
    checktable.print_table(one)
    assert "podman with crun" in capsys.readouterr().out
    assert "made by" not in render.html(result(finding(Outcome.PASS)))


def test_a_backend_names_its_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container, "find_runtime", lambda name, **_: Path("/usr/bin") / name)
    monkeypatch.setattr(gvisor, "find_engine", lambda name: None if name == "auto" else Path(name))
    backends = [kind(state_dir=tmp_path) for kind in (ContainerBackend, GvisorBackend)]
    for engine, wanted in (
        ("podman", ["podman with crun", "podman with runsc"]),
        ("auto", ["auto", "runsc"]),
    ):
        profile = SandboxProfile(engine=engine)
        assert [engine_of(backend, profile) for backend in backends] == wanted
    assert engine_of(BubblewrapBackend(state_dir=tmp_path), SandboxProfile()) == ""


def test_podman_is_judged_where_it_calls_gvisor() -> None:
    old = versions.Installed(version="0.1")
    for engine, wanted in (("podman", Outcome.FAIL), ("auto", Outcome.NOT_AVAILABLE)):
        found = versions.findings(["gvisor"], lambda _: old, engine=engine)
        outcomes = {f.outcome for f in found if f.check.id.startswith("VER-podman")}
        assert outcomes == {wanted}


def test_the_engines_are_those_of_the_backend() -> None:
    from ringfence.sandbox import container

    order = versions.data()["engines"]
    assert order["root"] == list(container.RUNTIMES)
    assert set(order["user"]) < set(order["root"])


def test_every_number_has_a_source() -> None:
    for program in versions.data()["programs"].values():
        assert all(hole["source"] and hole["upstream"] for hole in program["holes"])


def test_the_sandbox_runtime_and_its_node_are_looked_for_where_they_are(tmp_path: Path) -> None:
    package = tmp_path / "node_modules" / "@anthropic-ai" / "sandbox-runtime"
    package.mkdir(parents=True)
    (package / "package.json").write_text('{"version": "0.0.15"}')
    node = tmp_path / "node" / "bin" / "node"
    node.parent.mkdir(parents=True)
    node.write_text("#!/bin/sh\necho v22.1.0\n")
    node.chmod(0o755)
    found = {f.check.id: f for f in versions.findings(["runtime"], runtime=tmp_path)}
    assert found["VER-sandbox-runtime-CVE-2025-66479"].outcome is Outcome.FAIL
    assert found["VER-node-CVE-2025-23166"].outcome is Outcome.FAIL
    assert "22.1.0" in found["VER-node-CVE-2025-23166"].evidence
    (package / "package.json").write_text('{"version": "0.0.83"}')
    found = {f.check.id: f for f in versions.findings(["runtime"], runtime=tmp_path)}
    assert found["VER-sandbox-runtime-CVE-2025-66479"].outcome is Outcome.PASS


def test_a_static_finding_is_told_apart_from_a_probe() -> None:
    static_one = replace(finding(Outcome.FAIL), check=replace(CHECK, id="V-1", live=False))
    both = result(finding(Outcome.PASS), static_one)
    document = both.to_json()
    assert document["outcomes_by_kind"]["probe"]["fail"] == 0
    assert document["outcomes_by_kind"]["static"]["fail"] == 1
    assert [f["kind"] for f in document["findings"]] == ["probe", "static"]
    assert document["exit_status"] == 1
    tags = [
        r["properties"]["tags"][1] for r in render.sarif(both)["runs"][0]["tool"]["driver"]["rules"]
    ]
    assert tags == ["probe", "static"]
    assert "static: 0 pass, 1 fail" in render.html(both)


def test_a_program_that_nothing_asked_for_uses_is_not_judged() -> None:
    found = {f.check.id: f for f in versions.findings(["bubblewrap"], lambda _: None)}
    assert found["VER-runc-CVE-2024-21626"].outcome is Outcome.NOT_AVAILABLE
    assert "not asked" in found["VER-runc-CVE-2024-21626"].evidence


def test_a_report_is_signed_and_a_changed_byte_breaks_it(tmp_path: Path) -> None:
    text, public = report.sign(result(finding(Outcome.PASS, "é")), tmp_path / "audit")
    data = text.encode()
    document = report.verify(data, [public])
    assert document["findings"][0]["outcome"] == "pass"
    assert document["host"]["name"] == os.uname().nodename
    assert document["policy"]["sha256"] == "ab" * 32
    for position in range(len(data)):
        changed = bytearray(data)
        changed[position] ^= 1
        with pytest.raises((CallerError, DeniedError)):
            report.verify(bytes(changed), [public])


def test_a_report_needs_the_key_that_signed_it(tmp_path: Path) -> None:
    text, _ = report.sign(result(finding(Outcome.PASS)), tmp_path / "a")
    _, other = report.sign(result(finding(Outcome.PASS)), tmp_path / "b")
    for keys in ([other], []):
        with pytest.raises(DeniedError):
            report.verify(text.encode(), keys)
    for bad in (b"", b"\xff", b"ringfence/check\n{}\n\n", text.encode() + b"x", b"x" * (17 << 20)):
        with pytest.raises(CallerError):
            report.verify(bad, [other])
    with pytest.raises(CallerError, match="public key"):
        report.verify(text.encode(), ["nonsense"])


def test_a_checkpoint_is_no_report(tmp_path: Path) -> None:
    """One key signs both: the first line keeps them apart."""
    from ringfence.record.audit import AuditLog

    log = AuditLog(tmp_path / "audit")
    try:
        note, public = log.checkpoint(), log.public_key
    finally:
        log.close()
    with pytest.raises(CallerError):
        report.verify(note.encode(), [public])


BAD = '<script>alert(1)</script>\x1b[2J\u202e" onload=x'


def test_html_escapes_what_came_from_inside() -> None:
    page = render.html(result(finding(Outcome.FAIL, BAD), finding(Outcome.PASS)))
    seen: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: Any) -> None:
            seen.append(tag)
            assert not any(name.startswith("on") or name in {"src", "href"} for name, _ in attrs)

    Reader().feed(page)
    assert "script" not in seen
    assert "b" not in seen
    assert "\x1b" not in page
    assert "\u202e" not in page
    assert "default-src 'none'" in page
    assert "mend it" in page


def test_sarif_says_what_failed_and_what_passed() -> None:
    log = render.sarif(
        result(
            finding(Outcome.FAIL, BAD), finding(Outcome.PASS),
            finding(Outcome.ERROR), finding(Outcome.NOT_AVAILABLE),
        )
    )  # fmt: skip
    assert log["version"] == "2.1.0"
    (run,) = log["runs"]
    assert [rule["id"] for rule in run["tool"]["driver"]["rules"]] == ["X-1"]
    kinds = [(one["kind"], one["level"]) for one in run["results"]]
    assert kinds == [
        ("fail", "error"),
        ("pass", "none"),
        ("open", "none"),
        ("notApplicable", "none"),
    ]
    assert all(
        run["tool"]["driver"]["rules"][one["ruleIndex"]]["id"] == "X-1" for one in run["results"]
    )
    assert "\x1b" not in json.dumps(log)


def test_sarif_tags_are_unique() -> None:
    same = replace(CHECK, line=Line.AUDIT, layer="audit")
    log = render.sarif(result(replace(finding(Outcome.PASS), check=same)))
    (rule,) = log["runs"][0]["tool"]["driver"]["rules"]
    assert rule["properties"]["tags"] == ["security", "probe", "audit"]


def test_the_matrix_shows_the_worst() -> None:
    found = [finding(Outcome.PASS), finding(Outcome.FAIL), finding(Outcome.NOT_AVAILABLE)]
    assert render.cell(found, "bubblewrap", "network") == (Outcome.FAIL, "1/2")
    assert render.cell(found, "gvisor", "network") == (Outcome.NOT_AVAILABLE, "-")


@pytest.mark.parametrize(
    "entries",
    [
        "{", "{}", "[]", "[1]", '[{"id": "a"}]', '[{"id": "a", "probe": ""}]',
        '[{"id": "../a", "probe": "x"}]', '[{"id": "a", "probe": "x", "run_on": "host"}]',
        '[{"id": "a", "probe": "x"}, {"id": "a", "probe": "y"}]',
        '[{"id": "a", "probe": "x", "severity": "huge"}]', "[" * 100_000,
    ],
)  # fmt: skip
def test_a_bad_file_of_probes_is_refused(tmp_path: Path, entries: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(entries)
    with pytest.raises(CallerError) as caught:
        read_attacks(path)
    assert caught.value.code == "attacks-invalid"


def test_own_probes(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"id": "a", "probe": "x"}, {"id": "b", "probe": "y", "where": "host"}]')
    first, second = read_attacks(path)
    assert first.check.id == "own.a"
    assert not first.blind
    assert second.blind, "nobody judges it on the host"
    with pytest.raises(CallerError):
        read_attacks(tmp_path / "none.json")


def test_canaries_sing_when_they_are_reached_and_not_for_the_host(tmp_path: Path) -> None:
    import socket
    import subprocess
    import sys

    canaries = Canaries(tmp_path, "secret-of-a-canary")
    try:
        assert canaries.alive()
        assert canaries.hits() == ()
        with socket.create_connection(canaries.tcp.getsockname()) as peer:
            assert peer.recv(64) == b"secret-of-a-canary"
        code = "import socket,sys; s=socket.socket(1); s.connect(chr(0)+sys.argv[1]); s.recv(1)"
        subprocess.run([sys.executable, "-c", code, canaries.abstract_name], check=True)
        assert sorted(canaries.hits()) == ["abstract socket", "listener"]
        assert canaries.alive()
        canaries.file.write_text("changed")
        canaries.process.kill()
        canaries.process.wait()
        assert canaries.hits()[-2:] == ("process", "file")
        assert not canaries.alive()
    finally:
        canaries.close()
    assert not canaries.alive()


def test_a_log_of_a_build_hears_of_a_long_check_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr(checktable.time, "monotonic", lambda: now[0])
    with checktable.progress() as tell:
        for _ in range(5):
            now[0] += 20.0
            tell(finding(Outcome.FAIL, isolation="microvm"))
    assert capsys.readouterr().err.splitlines() == [
        "microvm: 2 answered, last X-1",
        "microvm: 4 answered, last X-1",
    ]
