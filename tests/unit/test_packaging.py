"""What is shipped: a source distribution that builds, a wheel that is whole, a lock that is plain."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCKS = ("requirements.lock", "requirements-dev.lock")


def build(tree: Path, what: str, out: Path) -> Path:
    """Run the build backend as pip does, without its isolation and so without a network."""
    out.mkdir()
    code = f"import setuptools.build_meta as b; b.build_{what}({str(out)!r})"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=tree,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (made,) = out.iterdir()
    return made


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> tuple[set[str], set[str]]:
    """Names in the source distribution, and in the wheel that is built from it."""
    place = tmp_path_factory.mktemp("build")
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist")
    shutil.copytree(ROOT, place / "tree", ignore=ignored)
    sdist = build(place / "tree", "sdist", place / "sdist")
    (place / "unpacked").mkdir()
    subprocess.run(["tar", "xzf", str(sdist), "-C", str(place / "unpacked")], check=True)
    with tarfile.open(sdist) as archive:
        source = {name.partition("/")[2] for name in archive.getnames()}
    (tree,) = (place / "unpacked").iterdir()
    with zipfile.ZipFile(build(tree, "wheel", place / "wheel")) as archive:
        return source, set(archive.namelist())


def test_the_wheel_holds_every_file_of_the_package(shipped: tuple[set[str], set[str]]) -> None:
    package = ROOT / "src"
    files = {
        str(path.relative_to(package))
        for path in (package / "ringfence").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert files - shipped[1] == set()
    assert "ringfence/py.typed" in files
    assert any(name.endswith("licenses/LICENSE") for name in shipped[1])


def test_the_source_distribution_can_be_tested_and_read(
    shipped: tuple[set[str], set[str]],
) -> None:
    wanted = {"Makefile", "CHANGELOG.md", "LICENSE", *LOCKS, "docs/tutorial.md"}
    wanted |= {"tests/unit/test_packaging.py", "docs/generate.py"}
    assert wanted - shipped[0] == set()
    assert not [name for name in shipped[0] if name.endswith(".pyc")]


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_pins_by_hash_and_names_no_host(name: str) -> None:
    text = (ROOT / name).read_text()
    assert "://" not in text
    assert not re.search(r"^\s*-(-index|-extra-index|-find-links|i |f )", text, re.MULTILINE)
    entries = re.split(r"^(?=[a-z0-9])", text, flags=re.MULTILINE)[1:]
    assert len(entries) > 20
    for entry in entries:
        assert re.match(r"[a-z0-9.-]+(\[[a-z0-9,-]+\])?==\S+", entry), entry.splitlines()[0]
        assert "--hash=sha256:" in entry, entry.splitlines()[0]


def test_the_locks_hold_what_the_project_asks_for() -> None:
    extras = PROJECT["optional-dependencies"]
    asked = {
        "requirements.lock": [*PROJECT["dependencies"], *extras["build"]],
        "requirements-dev.lock": [*extras["dev"], *extras["keyring"]],
    }
    for name, wanted in asked.items():
        pinned = set(re.findall(r"^([a-z0-9.-]+)", (ROOT / name).read_text(), re.MULTILINE))
        for requirement in wanted:
            found = re.match(r"[A-Za-z0-9-]+", requirement)
            assert found is not None
            assert found[0].lower() in pinned, f"{requirement}: make lock"


CORE = (
    *("api", "keeper", "wiring", "egress.process", "worker.launch", "record.recorder"),
    *("check.place", "check.run", "testing"),
    *(f"cli.{name}" for name in ("run", "demo", "check", "audit", "sessions", "policy", "vault")),
    *(f"cli.{name}" for name in ("isolation", "image", "doctor", "simulator", "sources")),
)
ONLY_PINNED = """
import importlib, importlib.metadata, re, sys
pinned = set(re.findall(r"^([a-z0-9.-]+)", open(sys.argv[1]).read(), re.MULTILINE))
places = importlib.metadata.packages_distributions()
plain = lambda name: re.sub(r"[-_.]+", "-", name).lower()
extra = {top for top, dists in places.items() if pinned.isdisjoint(map(plain, dists))}
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in extra - {"ringfence"}:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Absent())
for name in sys.argv[2:]:
    importlib.import_module("ringfence." + name)
try:
    import sqlalchemy
except ModuleNotFoundError:
    print("held")
"""


def test_what_needs_no_extra_is_imported_without_any() -> None:
    lock = str(ROOT / "requirements.lock")
    done = subprocess.run(
        [sys.executable, "-c", ONLY_PINNED, lock, *CORE],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "held\n"), done.stderr


def test_the_two_commands_of_the_readme_are_targets() -> None:
    readme = (ROOT / "README.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"\bmake ([a-z-]+)", readme)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    assert "make test" in (ROOT / ".ci" / "run").read_text()
