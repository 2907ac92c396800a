"""`ringfence image` on a small image: what it prints, writes and refuses."""

from __future__ import annotations

import json
import tarfile
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner, Result

from ringfence.cli.main import app
from ringfence.images import layout, store, tree
from ringfence.images.image import Image

FACTS = {
    "format": 1,
    "architecture": "amd64",
    "suite": "bookworm",
    "distribution": "debian",
    "definition": {"source": "debian"},
    "packages": {"apt": {"git": "1:2.39"}, "pip": {"mcp": "1.0"}, "npm": {}},
}


@pytest.fixture
def image(tmp_path: Path) -> Image:
    images = store.ImageStore(tmp_path)
    root = images.root / "building-x" / "rootfs"
    (root / "etc").mkdir(parents=True)
    layout.settle(root, claude=None)
    manifest = tree.render(tree.scan(root))
    (root.parent / "tree").write_bytes(manifest)
    (root.parent / "image.json").write_text(json.dumps(FACTS))
    kept = images.keep(root.parent, tree.digest_of(manifest))
    images.set_name("agent", kept.digest)
    return kept


def run(state: Path, *arguments: str) -> Result:
    return CliRunner().invoke(
        app, ["image", *arguments], obj=SimpleNamespace(state_dir=state, config=None)
    )


def test_an_empty_store_says_how_to_begin(tmp_path: Path) -> None:
    done = run(tmp_path, "list")
    assert done.exit_code == 0
    assert "ringfence image build" in done.stderr
    assert json.loads(run(tmp_path, "list", "--json").stdout) == []
    done = run(tmp_path, "show")
    assert (done.exit_code, done.stderr.splitlines()[1].strip()) == (2, "ringfence image build")


def test_list_and_show_name_what_is_there(image: Image, tmp_path: Path) -> None:
    (row,) = json.loads(run(tmp_path, "list", "--json").stdout)
    assert row["names"] == ["agent"]
    assert row["digest"] == image.digest
    assert row["packages"] == {"apt": 1, "pip": 1, "npm": 0}
    shown = run(tmp_path, "show").stdout
    assert image.digest in shown
    assert "1:2.39" in shown
    assert json.loads(run(tmp_path, "show", "--json").stdout)["packages"] == FACTS["packages"]
    bill = json.loads(run(tmp_path, "show", "--sbom").stdout)
    assert bill["bomFormat"] == "CycloneDX"
    assert len(bill["components"]) == 2


def test_verify_fails_on_what_was_changed(image: Image, tmp_path: Path) -> None:
    assert run(tmp_path, "verify").exit_code == 0
    (image.rootfs / "etc/hosts").write_text("1.2.3.4 api.anthropic.com\n")
    done = run(tmp_path, "verify", "--json")
    assert done.exit_code == 4
    assert json.loads(done.stdout)["differences"] == ["/etc/hosts differs in size"]
    assert run(tmp_path, "show").exit_code == 4


def test_export_is_whole_or_not_at_all(image: Image, tmp_path: Path) -> None:
    target = tmp_path / "out" / "agent.tar"
    target.parent.mkdir()
    assert run(tmp_path, "export", "--format", "tar", "-o", str(target)).exit_code == 0
    with tarfile.open(target) as tar:
        assert "etc/hosts" in tar.getnames()
    before = target.read_bytes()
    (image.rootfs / "home/agent").chmod(0o700)
    (image.rootfs / "etc/machine-id").unlink()
    done = run(tmp_path, "export", "--format", "tar", "-o", str(target))
    assert done.exit_code == 4
    assert list(target.parent.iterdir()) == [target]
    assert target.read_bytes() == before


@pytest.mark.parametrize(
    "arguments",
    [
        ("export", "--format", "ext4"),
        ("export", "--tag", "../x:1", "-o", "x"),
        ("export", "--tag", "x", "-o", "x"),
        ("export", "--format", "tar", "-o", "/nonexistent/x"),
        ("export", "../agent"),
        ("show", "other"),
        ("build", "/nonexistent.yaml"),
        ("lint", "/nonexistent.yaml"),
    ],
)
def test_bad_input_is_the_caller_s(
    image: Image, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    done = run(tmp_path, *arguments)
    assert done.exit_code == 2
    assert "Traceback" not in done.output
    assert done.stdout == ""


def test_standard_output_takes_an_archive(image: Image, tmp_path: Path) -> None:
    done = run(tmp_path, "export", "--format", "tar")
    assert done.exit_code == 0
    assert b"etc/hosts" in done.stdout_bytes


def test_remove_forgets(image: Image, tmp_path: Path) -> None:
    assert run(tmp_path, "remove", "agent").exit_code == 0
    assert not image.rootfs.exists()
    assert run(tmp_path, "remove", "agent").exit_code == 2


def test_lint_and_schema_need_no_host(tmp_path: Path) -> None:
    done = run(tmp_path, "lint", "--json")
    assert done.exit_code == 0
    assert {row["id"] for row in json.loads(done.stdout)} == {"IMG001"}
    path = tmp_path / "x.yaml"
    path.write_text("version: 1\npackages: {apt: [sudo, git, ripgrep]}\n")
    assert run(tmp_path, "lint", str(path)).exit_code == 0
    assert run(tmp_path, "lint", str(path), "--strict").exit_code == 2
    assert "packages" in json.loads(run(tmp_path, "schema").stdout)["properties"]
    assert (files("ringfence.images") / "agent.yaml").is_file()
