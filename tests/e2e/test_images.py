"""A model turn in an image: the real claude, which is the host's own, among the image's files."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path
from typing import Any

import pytest
from harness import Box, bash, script

import ringfence
from backends import needs
from images import copy_of_small
from ringfence.images.store import ImageStore
from ringfence.simulator.server import Simulator

# the first to come builds the image, of files of the host; under load that takes its time
pytestmark = pytest.mark.timeout(600)

LOOK = "id -un; python3 -c 'print(6 * 7)'; cat /var/lib/dpkg/status | cksum; command -v git"
WRITE = {"tool": "Write", "input": {"file_path": "/workspace/a.txt", "content": "new\n"}}
TECHNOLOGIES = [
    pytest.param("bubblewrap", marks=needs("bubblewrap")),
    pytest.param("container", marks=[needs("container"), pytest.mark.storm]),
    pytest.param("gvisor", marks=[needs("gvisor"), pytest.mark.storm]),
]


@pytest.fixture
def imaged(box: Box) -> Box:
    (copy_of_small(box.place / "imaged") / "images").rename(box.state / "images")
    return box


def answers(simulator: Simulator) -> str:
    """What tools answered, as the model was told."""
    return str([request.body["messages"][-1] for request in simulator.requests])


def told(box: Box) -> list[str]:
    """What the commands of LOOK say in the image, which has no git."""
    rootfs = ImageStore(box.state).find("small").rootfs
    status = (rootfs / "var/lib/dpkg/status").read_bytes()
    sums = subprocess.run(["cksum"], input=status, capture_output=True, check=True).stdout
    return ["agent", "42", sums.decode().strip()]


@pytest.mark.parametrize("name", TECHNOLOGIES)
def test_a_turn_in_an_image(imaged: Box, simulator: Simulator, name: str) -> None:
    """Its commands are the image's, its change is a patch, and the record has the digest."""
    policy = {"preset": "strict", "isolation": {"backend": name}}
    imaged.policy({**policy, "filesystem": {"image": "small"}})
    done = imaged.run(script(WRITE, bash(LOOK), {"text": "done"}))
    assert done.code == 0, done.err
    assert "\\n".join(told(imaged)) + "'" in answers(simulator).replace('"', "'")
    assert "+new" in next((imaged.state / "runs").glob("*/run.patch")).read_text()
    (started,) = [one for one in imaged.records() if one["type"] == "sandbox.started"]
    digest = ImageStore(imaged.state).find("small").digest
    assert (started["isolation"], started["image"]) == (name, digest)


@needs("bubblewrap")
@pytest.mark.parametrize("tree", ["plain", "git"])
def test_one_that_waits_waits_in_the_image(
    imaged: Box, simulator: Simulator, monkeypatch: pytest.MonkeyPatch, tree: str
) -> None:
    """It serves runs in its image and no others. In a git tree claude would meet our git, which
    waits, in the place of one that the image does not have: such a run starts cold.
    """
    for key, value in imaged.environment.items():
        if key.startswith(("RINGFENCE_", "ANTHROPIC_")):
            monkeypatch.setenv(key, value)
    monkeypatch.setenv("RINGFENCE_WARM__SIZE", "1")
    if tree == "git":
        subprocess.run(["git", "init", "-q"], cwd=imaged.workspace, check=True)

    def call(image: str | None) -> dict[str, Any]:
        path = imaged.place / f"{image}.yaml"
        policy = {"preset": "strict", **({"filesystem": {"image": image}} if image else {})}
        imaged.policy(policy).rename(path)
        return {"workspace": imaged.workspace, "policy": Path(path)}

    async def work() -> list[str]:
        async with ringfence.Worker() as worker:
            if tree == "plain":
                assert await worker.warm(**call("small")) == 1
            else:
                with pytest.raises(ringfence.CallerError, match="git"):
                    await worker.warm(**call("small"))
            with pytest.raises(ringfence.CallerError, match="other"):
                await worker.warm(**call("other"))
            results = [
                await worker.run(script(bash(LOOK), {"text": "ok"}), **call(image))
                for image in (None, "small")
            ]
            assert [result.text for result in results] == ["ok", "ok"]
            return [result.run_id for result in results]

    runs = asyncio.run(asyncio.wait_for(work(), 300))
    started = {one["run_id"]: one for one in imaged.records() if one["type"] == "sandbox.started"}
    assert [started[run]["warm"] for run in runs] == [False, tree == "plain"]
    assert "\\n".join(told(imaged)) + "'" in answers(simulator).replace('"', "'")
