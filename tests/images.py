"""Images for tests: a small one of this host's own packages, built once and kept between sessions
below a name that changes with the builder's code.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import ringfence.images
from ringfence.images.store import ImageStore

PACKAGES = ["bash", "coreutils", "findutils", "perl-base", "python3", "util-linux"]
SMALL = {"version": 1, "source": "host", "claude": False, "packages": {"apt": PACKAGES}}


def cache() -> Path:
    """State directory of this builder's code; those of other code are taken away."""
    code = hashlib.sha256()
    for path in sorted(Path(ringfence.images.__file__).parent.iterdir()):
        if path.is_file():
            code.update(path.read_bytes())
    place = Path.home() / ".cache" / "ringfence-test"
    for old in place.glob("images-*"):
        if old.name != f"images-{code.hexdigest()[:16]}":
            shutil.rmtree(old, ignore_errors=True)
    return place / f"images-{code.hexdigest()[:16]}"


def ringfence_image(
    state: Path, *arguments: str | Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    # RINGFENCE_TEST_CACHE is the tests' own, and no setting of ringfence
    outer = {name: value for name, value in os.environ.items() if not name.startswith("RINGFENCE_")}
    return subprocess.run(
        [sys.executable, "-m", "ringfence", "image", *arguments],
        env={**outer, "RINGFENCE_STATE_DIR": str(state), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def built(state: Path, *arguments: str | Path) -> dict[str, Any]:
    done = ringfence_image(state, "build", "--json", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def small_state() -> Path:
    """A state directory with the image `small`; workers of one session wait for each other."""
    if not Path("/var/lib/dpkg/info/python3.list").exists():
        pytest.skip("needs Debian's python3 on the host, of which the image is made")
    state = cache()
    state.mkdir(parents=True, exist_ok=True)
    with (state / "test.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        definition = state / "small.yaml"
        definition.write_text(json.dumps(SMALL))
        built(state, definition, "--name", "small")
    return state


def copy_of_small(place: Path) -> Path:
    """A state directory of one's own with the image, at `place`, which does not exist yet. Without
    links: what one worker of the tests links or removes, another's image would be seen to change by.
    """
    image = ImageStore(small_state()).find("small")
    place.mkdir(parents=True, mode=0o700)
    trees = place / "images" / "trees"
    for folder in (trees.parent, trees):
        folder.mkdir(mode=0o700)
    subprocess.run(["cp", "-a", "--reflink=auto", image.rootfs.parent, trees], check=True)
    ImageStore(place).set_name("small", image.digest)
    ImageStore(place).require("small")
    return place
