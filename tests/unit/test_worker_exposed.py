"""What a run may not be given: the state directory, by whatever name it goes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ringfence.errors import DeniedError
from ringfence.worker.prepare import refuse_exposed


@pytest.fixture
def state(tmp_path: Path) -> Path:
    state = tmp_path / "home" / "state"
    (state / "vault").mkdir(parents=True)
    (tmp_path / "home" / "project").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "home")
    return state


@pytest.mark.parametrize(
    "shown", ["home", "home/state", "home/state/vault", "link", "link/state", "."]
)
def test_what_shows_the_state_directory_is_refused(state: Path, shown: str) -> None:
    root = state.parent.parent
    with pytest.raises(DeniedError) as caught:
        refuse_exposed(state, [str(root / "home/project"), str(root / shown)])
    assert caught.value.code == "state-exposed"


@pytest.mark.parametrize("shown", ["home/project", "home/absent", "link/project"])
def test_what_lies_beside_it_is_not(state: Path, shown: str) -> None:
    refuse_exposed(state, [str(state.parent.parent / shown)])


def test_a_loop_of_links_shows_nothing(state: Path, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    refuse_exposed(state, [str(tmp_path / "loop")])


def test_a_linked_state_directory_is_its_target(state: Path) -> None:
    other = state.parent.parent / "other"
    other.symlink_to(state)
    with pytest.raises(DeniedError):
        refuse_exposed(other, [str(state.parent)])


@pytest.mark.root
def test_a_bind_mount_is_the_same_directory(state: Path, tmp_path: Path) -> None:
    """In a mount namespace of the test's own."""
    (tmp_path / "bound").mkdir()
    script = (
        f"mount --bind {state.parent} {tmp_path / 'bound'} && exec {sys.executable} -c '"
        "from pathlib import Path; import sys; from ringfence.worker.prepare import refuse_exposed;"
        f'refuse_exposed(Path("{state}"), ["{tmp_path / "bound"}"])\''
    )
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert "state-exposed" in done.stderr or "would show the agent" in done.stderr, done.stderr
