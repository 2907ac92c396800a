"""The demo shows what is so, and says so when it is not."""

from __future__ import annotations

import asyncio
import copy
import os
import pty
import signal
import subprocess
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml
from harness import Box, processes_with

from backends import needs
from ringfence.cli.context import AppContext
from ringfence.cli.demo import _play
from ringfence.config import load_config
from ringfence.wiring import launcher

STORY = yaml.safe_load(
    (resources.files("ringfence.simulator") / "scenarios" / "demo.yaml").read_text()
)


def play(place: Path, story: dict[str, Any]) -> dict[str, Any]:
    config = load_config({"HOME": str(place), "RINGFENCE_STATE_DIR": str(place / "state")})
    context = AppContext(config=config, launcher=lambda: launcher(config), run=lambda _: None)
    return asyncio.run(_play(context, story, place, quiet=True))


def test_the_demo_as_a_newcomer_sees_it(box: Box) -> None:
    done = box.call("demo", seconds=110)
    assert done.code == 0, done.out + done.err
    shown = done.err
    for words in (
        "tests before: FAILED",
        "tests after the patch: OK",
        "+        if len(self.prices) >=",
    ):
        assert words in shown
    assert shown.count("blocked  ") == 5
    assert "ESCAPED" not in shown
    assert "nothing else" in shown
    assert "Traceback" not in shown
    assert "\x1b[" not in shown, "no colours into a pipe"


@pytest.mark.parametrize(
    "isolation",
    [
        pytest.param("container", marks=needs("container")),
        pytest.param("gvisor", marks=needs("gvisor")),
        pytest.param("runtime", marks=[needs("runtime"), pytest.mark.storm]),
        pytest.param("microvm", marks=[needs("microvm"), pytest.mark.storm]),
    ],
)
@pytest.mark.timeout(1800)
def test_the_demo_in_another_fence(box: Box, isolation: str) -> None:
    done = box.call("demo", "--isolation", isolation, "--json", seconds=1700)
    assert done.code == 0, done.out + done.err
    assert done.json["held"]
    assert done.json["tests_pass"] == {"before": False, "after": True}
    assert [attack["held"] for attack in done.json["attacks"]] == [True] * 5


def test_a_fence_that_is_not_there_is_no_demo(box: Box, tmp_path: Path) -> None:
    """A weaker one in its place would be a lie."""
    done = box.call("demo", "--isolation", "runtime", "--json", RINGFENCE_RUNTIME=str(tmp_path))
    assert done.code == 4
    assert done.json["error"]["code"] == "isolation-unavailable"


def test_what_it_claims_is_looked_at(tmp_path: Path) -> None:
    """Five lies in one story, each of which has to be found."""
    story = copy.deepcopy(STORY)
    story["steps"] = [{"text": "Fixed. All tests pass."}]
    story["attacks"] = [
        {"title": "works", "script": "echo ESCAPED"},
        {"title": "works and hides it", "script": "echo ESCAPED; echo all is well"},
        {"title": "says nothing", "script": "true"},
        {"title": "is held", "script": "echo refused"},
    ]
    outcome = play(tmp_path, story)
    assert outcome["status"] == "succeeded"
    assert outcome["tests_pass"] == {"before": False, "after": False}
    assert [attack["held"] for attack in outcome["attacks"]] == [False, False, False, True]
    assert outcome["held"] is False


@pytest.mark.parametrize("attack", STORY["attacks"], ids=lambda attack: attack["title"][:20])
def test_every_attack_works_where_there_is_no_fence(attack: dict[str, str], tmp_path: Path) -> None:
    """An attack that finds nothing anywhere would be no proof: outside, each says ESCAPED or
    cannot even run to its end.
    """
    script = attack["script"]
    if "/etc/cron.d/x" in script:
        # not on the host itself: the same five writes, to a place that may be written
        places = ("/etc/cron.d/x", "/usr/bin/x", "/root/x", "/opt/ringfence/bin/claude", "/tmp/x")
        for path in places:
            script = script.replace(path, str(tmp_path / path.replace("/", "-")))
        script = script.replace("/proc/sys/kernel/core_pattern", str(tmp_path / "pattern"))
    done = subprocess.run(
        ["unshare", "-Urn" if os.geteuid() else "-n", "bash", "-c", script],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "KEY": "CANARY"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    held = done.stdout.strip() and "ESCAPED" not in done.stdout
    assert not held, done.stdout


def test_ctrl_c_ends_the_demo_and_leaves_nothing(box: Box) -> None:
    main, other = pty.openpty()
    process = subprocess.Popen(
        box.command("demo"),
        env=box.environment | {"TERM": "xterm", "TMPDIR": str(box.place)},
        cwd=box.place,
        stdin=other,
        stdout=other,
        stderr=other,
        start_new_session=True,
    )
    os.close(other)
    shown = b""
    try:
        while b"tests before" not in shown:
            shown += os.read(main, 65536)
        process.send_signal(signal.SIGINT)
        try:
            while part := os.read(main, 65536):
                shown += part
        except OSError:
            pass  # the other side is closed
        assert process.wait(30) != 0
    finally:
        process.kill()
        os.close(main)
    assert b"Traceback" not in shown, shown.decode()
    assert not list(box.place.glob("ringfence-demo-*"))
    assert not processes_with(f"{box.place}/ringfence-demo-")
