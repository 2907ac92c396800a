"""The contract holds with an image as the system of the sandbox, and nothing of the host's /usr."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from backends import machines, needs
from images import copy_of_small
from ringfence.images.store import ImageStore
from ringfence.policy.compiled import SandboxProfile
from ringfence.sandbox.bubblewrap import BubblewrapBackend
from ringfence.sandbox.container import ContainerBackend
from ringfence.sandbox.gvisor import GvisorBackend
from ringfence.sandbox.microvm import MicrovmBackend
from ringfence.sandbox.protocol import Backend
from ringfence.testing.sandbox_contract import SandboxContract


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The images of every clause's state directory: they go from one to the next, so that their
    files are read once.
    """
    place = tmp_path_factory.mktemp("kept") / "state"
    copy_of_small(place)
    yield place / "images"
    shutil.rmtree(place, ignore_errors=True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kernel and snapshots of every clause's machines."""
    return machines() or tmp_path_factory.mktemp("machines")


# the first to come builds the image, of files of the host; under load that takes its time
pytestmark = pytest.mark.timeout(600)


class ImageContract(SandboxContract):
    technology: type[Backend]
    rules = replace(SandboxProfile(), image="small")

    @pytest.fixture
    def state(self, tmp_path: Path, kept: Path) -> Iterator[Path]:
        state = tmp_path / "state"
        state.mkdir(mode=0o700, exist_ok=True)
        images = kept.rename(state / "images")
        yield state
        images.rename(kept)

    @pytest.fixture
    def backend(self, state: Path) -> Backend:
        return self.technology(state_dir=state)  # type: ignore[call-arg]

    def test_what_is_inside_is_the_image(self, backend: Backend, place: Path) -> None:
        """The contract would hold as well if an image were silently left out."""
        listed = ImageStore(place / "state").find("small").rootfs / "var/lib/dpkg/status"
        command = "cat /var/lib/dpkg/status"
        assert self.inside(backend, self.spec(backend, place), command) == (0, listed.read_text())
        without = replace(self.spec(backend, place, 1), profile=self._without(backend, place))
        assert self.inside(backend, without, command) == (1, "")

    def _without(self, backend: Backend, place: Path) -> SandboxProfile:
        return replace(self.spec(backend, place).profile, image=None)


@needs("bubblewrap")
class TestBubblewrap(ImageContract):
    technology = BubblewrapBackend


@pytest.mark.storm
@needs("container")
class TestContainer(ImageContract):
    technology = ContainerBackend


@pytest.mark.storm
@needs("gvisor")
class TestGvisor(ImageContract):
    technology = GvisorBackend
    shares_a_kernel = False


@pytest.mark.storm
@pytest.mark.timeout(900)
@needs("microvm")
class TestMicrovm(ImageContract):
    patience = 6.0
    rules = replace(ImageContract.rules, emulation=True)

    @pytest.fixture
    def backend(self, state: Path, saved: Path) -> Backend:
        return MicrovmBackend(state_dir=state, machines=saved)
