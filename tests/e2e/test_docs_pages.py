"""The command blocks of the how-tos are played, with what a page says that they print; those that
are not say why, and are counted.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from anthropic import Anthropic, PermissionDeniedError
from harness import Box, bash, script
from pages import HOW_TO, ROOT, blocks, console, fits, played, write_files
from platform_rig import started

from images import copy_of_small
from ringfence.images.store import ImageStore

NOT_RUN = {
    "installs": 8,
    "minutes": 5,
    "needs a key": 2,
    "needs a cloud": 1,
    "a test of its own": 2,
}
"""Blocks by the reason for which no test plays them: a new one is added here, or is played."""
ELSEWHERE = {
    "tutorial.md": 8,
    "secrets.md": 1,
    "simulator.md": 5,
    "check.md": 1,
    "README.md": 4,
}
"""Blocks that tests/e2e/test_docs.py plays: as whole pages, or by their headings."""
HERE = {
    "images.md": 4,
    "platform.md": 3,
    "approvals.md": 1,
    "slo.md": 1,
    "gateway.md": 1,
    "observability.md": 1,
}
"""And by those of this file."""


def test_every_command_block_is_played_or_says_why_not() -> None:
    pages = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *HOW_TO.glob("*.md")]
    pages += ROOT.glob("docs/decisions/*.md")
    every = [block for page in pages for block in blocks(page, "sh", "bash", "console", "shell")]
    assert Counter(block.why for block in every if block.why) == NOT_RUN
    assert Counter(block.page.name for block in every if not block.why) == ELSEWHERE | HERE


def test_what_a_page_shows_is_compared_word_by_word() -> None:
    assert fits("a … c\n…\nlast", "a  b c\n1\n2\nlast\n")
    assert fits("", "anything")
    assert not fits("rfk_…", "http://x\nrfk_1\n")
    assert not fits("wrkspc_… 0 of 4", "wrkspc_1   0 of 5\n")


@pytest.mark.storm
def test_the_pages_about_sessions_of_a_platform_run(box: Box) -> None:
    """As they are read: start it, ask for work, answer a call, set a limit, look at promises."""
    write_files(HOW_TO / "platform.md", box.place)
    first, work, limit = played(HOW_TO / "platform.md", "console")
    (answers,) = played(HOW_TO / "approvals.md", "console")
    (promises,) = played(HOW_TO / "slo.md", "console")
    with console(box) as terminal:
        terminal.swaps["ringfence vault set"] = "printf sk-ant-any-value | ringfence vault set"
        terminal.settings["RINGFENCE_SLO__SUCCESS"] = "0.99"
        said = terminal.play(first)
        terminal.settings["RINGFENCE_API_KEY"] = said.split()[-1]
        terminal.play(work)
        look, *words = [f"$ {line}" for line in answers.text.removeprefix("$ ").split("\n$ ")]
        for line in words:
            _asks(box, terminal.settings)
            session, call, *_ = terminal.play(replace(answers, text=look)).split()
            terminal.swaps["sesn_… sevt_…"] = f"{session} {call}"
            terminal.play(replace(answers, text=line))
        assert not box.call("approvals", "list", **terminal.settings).out
        terminal.play(limit)
        assert "success 0.99 in 30 days" in terminal.play(promises)


def _asks(box: Box, settings: dict[str, str]) -> None:
    """A turn that stops at the call of the page."""
    prompt = script(bash("make publish"), {"text": "ok"})
    asked = ("submit", prompt, "--agent", "coder", "--environment", "place", "--follow")
    done = box.call(*asked, **settings)
    assert "requires_action" in done.out, done.err


def test_the_page_about_the_gateway_runs(box: Box) -> None:
    """Its ceiling, its key, and its environment, which the ceiling has to allow."""
    page = HOW_TO / "gateway.md"
    write_files(page, box.place)
    (block,) = played(page, "console")
    (python, *_) = (one.text for one in blocks(page, "python"))
    with console(box) as terminal:
        key = terminal.play(block).split()[0]
        assert key.startswith("rfk_")
        with Anthropic(base_url=terminal.settings["RINGFENCE_URL"], api_key=key) as client:
            given = {"client": client}
            lines = [line for line in python.splitlines() if "Anthropic" not in line]
            exec("\n".join(lines), given)
            found = [one.name for one in client.beta.environments.list()]
        assert found == ["build"]
        assert (box.place / "ceiling.yaml").read_text() in page.read_text()


@pytest.mark.parametrize("pattern", ["long-running", "multi-agent"])
def test_the_places_of_the_page_are_allowed_by_its_policy(box: Box, pattern: str) -> None:
    """And by that of the preset alone they are not."""
    page = HOW_TO / "platform.md"
    texts = [block.text for block in blocks(page, "yaml")]
    (policy,) = (yaml.safe_load(one) for one in texts if one.startswith("# policy.yaml"))
    (place,) = (yaml.safe_load(one) for one in texts if pattern.replace("-", "_") in one[:150])
    assert policy["hosting"]["pattern"] == "long-running"
    policy["hosting"]["pattern"] = pattern
    place["ringfence"].pop("isolation", None)  # what a host may lack
    for given, fits_in in ((policy, True), ({"version": 1, "preset": "ci"}, False)):
        with serving(box, str(box.policy(given))) as client:
            if fits_in:
                made = client.beta.environments.create(
                    name=place["name"],
                    config=place["config"],
                    extra_body={"ringfence": place["ringfence"]},
                )
                assert made.name == place["name"]
                continue
            with pytest.raises(PermissionDeniedError):
                client.beta.environments.create(
                    name="other",
                    config=place["config"],
                    extra_body={"ringfence": place["ringfence"]},
                )


@contextmanager
def serving(box: Box, policy: str) -> Iterator[Anthropic]:
    made = box.call("keys", "create", "--tenant", "default", "--json")
    with started(box, "serve", "--policy", policy, "--port", "0") as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        with Anthropic(base_url=url, api_key=made.json["key"]) as client:
            yield client


@pytest.mark.storm
@pytest.mark.timeout(600)  # the first to come builds the image
def test_the_page_about_images_runs(box: Box) -> None:
    """But for the minutes in which an image is made: one of this host's files is there."""
    page = HOW_TO / "images.md"
    _with_agent(box)
    write_files(page, box.workspace)
    policy = box.policy({"preset": "strict", "filesystem": {"image": "agent"}})
    shutil.copy(policy, box.workspace / "policy.yaml")
    text = "\n".join(block.text for block in played(page, "sh"))
    # the tests' image is a small one
    text = text.replace("import anthropic", "import json")
    for program, kind in (("mksquashfs", "squashfs"), ("mke2fs", "ext4")):
        if shutil.which(program, path="/usr/bin:/bin:/usr/sbin:/sbin") is None:
            text = re.sub(rf"^.*--format {kind} .*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"^ringfence ", f"{sys.executable} -m ringfence ", text, flags=re.MULTILINE)
    done = subprocess.run(
        ["bash", "-euc", text],
        cwd=box.workspace,
        env=box.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "CycloneDX" in done.stdout
    assert (box.workspace / "agent.oci.tar").stat().st_size > 1_000_000


def _with_agent(box: Box) -> None:
    """The image of the tests, under the name of the page."""
    source = copy_of_small(box.place / "imaged")
    (source / "images").rename(box.state / "images")
    store = ImageStore(box.state)
    store.set_name("agent", store.find("small").digest)


def test_the_address_of_the_metrics_is_found_as_the_page_says(tmp_path: Path) -> None:
    """The command of the page, but for what it asks there."""
    (block,) = played(HOW_TO / "observability.md", "sh")
    (tmp_path / "up-1.json").write_text('[{"targets": ["127.0.0.1:40297"], "labels": {}}]')
    command = block.text.replace("/run/ringfence/targets", str(tmp_path))
    command = command.replace("curl -s", "echo").removesuffix(" | head")
    done = subprocess.run(["bash", "-euc", command], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "http://127.0.0.1:40297/metrics"
