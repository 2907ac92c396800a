"""Digest, store, export and settling, on small trees."""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import subprocess
import tarfile
import time
from pathlib import Path

import pytest

from ringfence.errors import CallerError, UnavailableError
from ringfence.images import archive, disk, layout, store, tree, whole
from ringfence.images.build import Watcher, collect
from ringfence.images.contents import cyclonedx
from ringfence.images.image import Image
from ringfence.images.process import find_tool
from ringfence.images.whole import differences

FACTS = {
    "architecture": "amd64",
    "suite": "bookworm",
    "distribution": "debian",
    "definition": {"source": "debian"},
    "packages": {"apt": {"git": "1:2.39"}, "pip": {"mcp": "1.0"}, "npm": {"@s/x": "1.0.0"}},
}


def plant(root: Path) -> Path:
    """A small tree, as a base leaves it."""
    for folder in ("etc", "usr/bin", "var/log", "home/agent", "tmp", "usr/lib/python3/__pycache__"):
        (root / folder).mkdir(parents=True)
    (root / "etc/passwd").write_text("root:*:0:0:root:/root:/bin/bash\n")
    (root / "etc/shadow").write_text("root:*:20000:0:99999:7:::\n")
    (root / "etc/machine-id").write_text("0123456789abcdef\n")
    (root / "usr/bin/su").write_bytes(b"\x7fELF")
    (root / "usr/bin/su").chmod(0o4755)
    (root / "usr/bin/sh").symlink_to("dash")
    (root / "var/log/dpkg.log").write_text("today\n")
    (root / "usr/lib/python3/__pycache__/x.pyc").write_bytes(b"time")
    (root / 'usr/lib/naïve "name"').write_text("x")
    (root / "usr/lib" / ("long-" * 40)).write_text("y")
    (root / "home/agent/.profile").write_text("# agent\n")
    return root


def kept(state: Path, name: str = "agent") -> Image:
    """An image of the small tree, kept as a build keeps one."""
    images = store.ImageStore(state)
    building = images.root / "building-x"
    root = plant(building / "rootfs")
    layout.drop_compiled(root)
    layout.settle(root, claude=None)
    manifest = tree.render(tree.scan(root))
    (building / "tree").write_bytes(manifest)
    (building / "image.json").write_text(json.dumps(FACTS))
    image = images.keep(building, tree.digest_of(manifest))
    images.set_name(name, image.digest)
    return image


@pytest.fixture
def image(tmp_path: Path) -> Image:
    return kept(tmp_path)


def entry(image: Image, path: str) -> tree.Entry:
    entries = {each.path: each for each in tree.parse(image.entries_file.read_bytes())}
    return entries[path]


def test_two_trees_of_the_same_files_have_one_digest(tmp_path: Path) -> None:
    one, two = kept(tmp_path / "1"), kept(tmp_path / "2")
    assert one.digest == two.digest
    assert one.entries_file.read_bytes() == two.entries_file.read_bytes()


def change_byte(root: Path) -> None:
    (root / "usr/bin/su").write_bytes(b"\x7fELG")


def change_mode(root: Path) -> None:
    (root / "usr/bin/su").chmod(0o700)


def change_link(root: Path) -> None:
    (root / "usr/bin/sh").unlink()
    (root / "usr/bin/sh").symlink_to("bash")


def change_kind(root: Path) -> None:
    (root / "usr/bin/sh").unlink()
    (root / "usr/bin/sh").write_text("dash")


def add(root: Path) -> None:
    (root / "usr/bin/more").write_text("")


def take(root: Path) -> None:
    (root / "usr/bin/su").unlink()


@pytest.mark.parametrize("change", [change_byte, change_mode, change_link, change_kind, add, take])
def test_any_change_is_another_digest_and_is_named(image: Image, change: object) -> None:
    assert differences(image) == []
    change(image.rootfs)  # type: ignore[operator]
    assert tree.digest_of(tree.render(tree.scan(image.rootfs))) != image.digest
    (found,) = differences(image)
    assert found.startswith("/usr/bin/")


@pytest.mark.parametrize("change", [change_byte, change_mode, change_link, change_kind, add, take])
def test_a_changed_image_is_not_given_out(image: Image, change: object, tmp_path: Path) -> None:
    assert store.require(tmp_path).digest == image.digest
    change(image.rootfs)  # type: ignore[operator]
    with pytest.raises(UnavailableError, match="/usr/bin/") as caught:
        store.require(tmp_path)
    assert caught.value.code == "image-damaged"


def test_a_file_is_read_again_only_when_something_happened_to_it(
    image: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.require(tmp_path)
    read: list[Image] = []
    monkeypatch.setattr(whole, "differences", lambda one: read.append(one) or [])
    assert store.require(tmp_path) == image
    assert read == []
    victim = image.rootfs / "usr/bin/su"
    content, status = victim.read_bytes(), victim.stat()
    victim.write_bytes(content)
    os.utime(victim, ns=(status.st_atime_ns, status.st_mtime_ns))  # as somebody who hides it
    store.require(tmp_path)
    assert read == [image]


@pytest.mark.parametrize("place", ["", "trees", "trees/HEX", "trees/HEX/rootfs"])
def test_a_cache_that_others_may_write_to_is_refused(
    image: Image, tmp_path: Path, place: str
) -> None:
    store.require(tmp_path)
    path = tmp_path / "images" / place.replace("HEX", image.digest.removeprefix("sha256:"))
    for mode in (0o775, 0o757):
        path.chmod(mode)
        with pytest.raises(UnavailableError, match="can be written by others"):
            store.require(tmp_path)
    path.chmod(0o755)
    store.require(tmp_path)
    away = path.rename(tmp_path / "away")
    path.symlink_to(away)
    with pytest.raises(UnavailableError, match="is not a directory"):
        store.require(tmp_path)


@pytest.mark.root
def test_a_cache_that_another_user_made_is_refused(image: Image, tmp_path: Path) -> None:
    store.require(tmp_path)
    os.chown(image.rootfs.parent, 4242, 4242)
    with pytest.raises(UnavailableError, match="belongs to another user"):
        store.require(tmp_path)
    os.chown(image.rootfs.parent, 0, 0)
    victim = image.rootfs / "usr/bin/su"
    os.chown(victim, 4242, 4242)  # who could write to it, whatever its mode is
    os.utime(victim, (tree.EPOCH, tree.EPOCH))
    with pytest.raises(UnavailableError, match="/usr/bin/su differs in owner"):
        store.require(tmp_path)


def watched() -> Watcher:
    return Watcher(step=lambda _: None, line=lambda _: None)


def test_what_has_no_name_is_collected_but_for_what_is_in_use(image: Image, tmp_path: Path) -> None:
    images = store.ImageStore(tmp_path)
    images.set_key("k", image.digest)
    assert collect(tmp_path, watched()).removed == []
    (tmp_path / "images/names/agent").unlink()
    with images.find(image.digest).held():
        gone = collect(tmp_path, watched())
        assert (gone.removed, gone.in_use) == ([], [image.digest])
        assert images.require(image.digest) == image
    assert collect(tmp_path, watched()).removed == [image.digest]
    assert not image.rootfs.parent.exists()
    assert images.by_key("k") is None
    assert not list((tmp_path / "images/keys").iterdir())


def test_an_image_that_is_gone_cannot_be_held(image: Image, tmp_path: Path) -> None:
    store.ImageStore(tmp_path).remove("agent")
    with pytest.raises(CallerError, match="no image sha256:"), image.held():
        pass


def test_a_changed_manifest_is_not_believed(image: Image, tmp_path: Path) -> None:
    lines = image.entries_file.read_bytes()
    image.entries_file.write_bytes(lines.replace(b'"usr/bin/su"', b'"usr/bin/sv"'))
    with pytest.raises(UnavailableError, match="manifest was changed"):
        store.require(tmp_path)
    with pytest.raises(UnavailableError, match="manifest was changed"):
        differences(image)


def test_a_special_file_is_no_part_of_an_image(image: Image) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        folder = os.open(image.rootfs / "tmp", os.O_PATH)
        made.bind(f"/proc/self/fd/{folder}/s")
        os.close(folder)
    with pytest.raises(UnavailableError, match="special file"):
        list(tree.scan(image.rootfs))
    assert differences(image) == ["/tmp/s is not in the manifest"]


def test_settled_trees_hold_nothing_of_the_day_or_the_host(image: Image) -> None:
    root = image.rootfs
    assert (root / "etc/machine-id").read_bytes() == b""
    assert not list((root / "var/log").iterdir())
    assert not list(root.rglob("*.pyc"))
    assert "20000" not in (root / "etc/shadow").read_text()
    assert "agent:x:1000:1000::/home/agent:/bin/bash\n" in (root / "etc/passwd").read_text()
    assert {int(path.lstat().st_mtime) for path in root.rglob("*")} == {tree.EPOCH}
    assert not [path for path in root.rglob("*") if path.lstat().st_mode & 0o6000]
    assert entry(image, "usr/bin/su").mode == 0o755
    assert entry(image, "tmp").mode == 0o1777


def test_what_settles_does_not_follow_links_out_of_the_tree(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "hosts").write_text("mine\n")
    root = plant(tmp_path / "root")
    (root / "etc/hosts").symlink_to(outside / "hosts")
    (root / "run").symlink_to(outside)
    layout.settle(root, claude=None)
    assert (outside / "hosts").read_text() == "mine\n"
    assert (outside / "hosts").stat().st_mtime > tree.EPOCH + 1
    assert "localhost" in (root / "etc/hosts").read_text()


def test_owners_are_the_same_whoever_builds(image: Image) -> None:
    assert {
        entry(image, path).uid for path in ("home/agent", "home/agent/.profile", "workspace")
    } == {1000}
    assert {entry(image, path).uid for path in ("home", "etc/passwd", "tmp")} == {0}


@pytest.mark.root
def test_root_s_tree_is_owned_as_inside_and_judged_by_it(image: Image) -> None:
    assert (image.rootfs / "home/agent").stat().st_uid == 1000
    os.chown(image.rootfs / "etc/passwd", 1000, 1000)
    assert differences(image) == ["/etc/passwd differs in owner"]


@pytest.mark.parametrize("name", ["../x", "a/b", "", "A", "-x", "x" * 64, ".x", "sha256:0"])
def test_a_name_that_could_be_a_path_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(CallerError) as caught:
        store.require(tmp_path, name)
    assert caught.value.code == "image-unknown"


def test_an_unknown_image_says_how_to_build_it(tmp_path: Path) -> None:
    with pytest.raises(CallerError) as caught:
        store.require(tmp_path, "mine")
    assert caught.value.hint == "ringfence image build --name mine"
    with pytest.raises(CallerError):
        store.require(tmp_path, "sha256:" + "0" * 64)


def test_by_digest_and_by_name(image: Image, tmp_path: Path) -> None:
    assert store.require(tmp_path, image.digest) == store.require(tmp_path, "agent") == image


def test_an_image_in_use_is_not_removed(image: Image, tmp_path: Path) -> None:
    images = store.ImageStore(tmp_path)
    with image.held(), image.held(), pytest.raises(UnavailableError) as caught:
        images.remove("agent")
    assert caught.value.code == "image-in-use"
    assert images.require("agent").digest == image.digest
    images.remove("agent")
    assert not image.rootfs.exists()
    assert images.names() == {}
    with pytest.raises(CallerError), image.held():
        pass


def test_a_tree_goes_with_its_last_name(image: Image, tmp_path: Path) -> None:
    images = store.ImageStore(tmp_path)
    images.set_name("other", image.digest)
    with pytest.raises(UnavailableError, match="is the image agent, other"):
        images.remove(image.digest)
    images.remove("agent")
    assert images.require("other").digest == image.digest
    images.remove("other")
    assert not image.rootfs.exists()
    with pytest.raises(CallerError):
        images.remove("other")


def test_a_damaged_tree_is_replaced_by_a_build_of_the_same(image: Image, tmp_path: Path) -> None:
    change_byte(image.rootfs)
    again = kept(tmp_path)
    assert again.digest == image.digest
    assert differences(again) == []


def written(form: str, image: Image) -> bytes:
    sink = io.BytesIO()
    archive.WRITERS[form](image, "localhost/x:1", sink)
    return sink.getvalue()


@pytest.mark.parametrize("form", sorted(archive.WRITERS))
def test_the_same_image_gives_the_same_bytes(form: str, tmp_path: Path) -> None:
    assert written(form, kept(tmp_path / "1")) == written(form, kept(tmp_path / "2"))


def test_the_tar_is_the_tree(image: Image) -> None:
    with tarfile.open(fileobj=io.BytesIO(written("tar", image))) as tar:
        members = {member.name: member for member in tar.getmembers()}
        content = tar.extractfile('usr/lib/naïve "name"')
        assert content is not None
        assert content.read() == b"x"
    for each in tree.parse(image.entries_file.read_bytes()):
        member = members.pop(each.path)
        assert (member.uid, member.mtime, member.size) == (each.uid, tree.EPOCH, each.size)
        assert member.mode == each.mode
    assert not members


def test_a_file_that_changed_is_not_exported(image: Image) -> None:
    (image.rootfs / "usr/bin/su").write_bytes(b"\x7fELG")
    with pytest.raises(UnavailableError, match="/usr/bin/su"):
        written("tar", image)
    (image.rootfs / "usr/bin/su").write_bytes(b"\x7f")
    with pytest.raises(UnavailableError, match="/usr/bin/su"):
        written("tar", image)


def test_the_docker_archive_names_what_it_holds(image: Image) -> None:
    with tarfile.open(fileobj=io.BytesIO(written("docker-archive", image))) as tar:
        content = {m.name: tar.extractfile(m).read() for m in tar.getmembers()}  # type: ignore[union-attr]
    (manifest,) = json.loads(content["manifest.json"])
    config = json.loads(content[manifest["Config"]])
    (layer,) = manifest["Layers"]
    assert content[layer] == written("tar", image)
    assert config["rootfs"]["diff_ids"] == ["sha256:" + layer.removesuffix(".tar")]
    assert config["config"]["User"] == "1000:1000"
    assert config["config"]["Labels"]["ringfence.image.digest"] == image.digest


def test_the_oci_layout_holds_every_blob_it_names(image: Image) -> None:
    import hashlib

    with tarfile.open(fileobj=io.BytesIO(written("oci", image))) as tar:
        content = {m.name: tar.extractfile(m).read() for m in tar.getmembers()}  # type: ignore[union-attr]
    blobs = {name: data for name, data in content.items() if name.startswith("blobs/")}
    assert all(name.endswith(hashlib.sha256(data).hexdigest()) for name, data in blobs.items())
    (named,) = json.loads(content["index.json"])["manifests"]
    manifest = json.loads(blobs["blobs/sha256/" + named["digest"][7:]])
    for part in (manifest["config"], *manifest["layers"]):
        assert len(blobs["blobs/sha256/" + part["digest"][7:]]) == part["size"]


def debugfs(disk_file: Path, command: str) -> str:
    program = find_tool("debugfs")
    assert program is not None
    done = subprocess.run(
        [program, "-R", command, disk_file], capture_output=True, text=True, check=False
    )
    return done.stdout


@pytest.mark.skipif(find_tool("mke2fs") is None, reason="needs e2fsprogs")
def test_the_ext4_disk_has_the_owners_of_the_manifest(tmp_path: Path) -> None:
    image = kept(tmp_path)
    target = tmp_path / "disk.ext4"
    disk.write_ext4(image, target)
    checker = find_tool("e2fsck")
    assert checker is not None
    assert (
        subprocess.run([checker, "-fn", target], capture_output=True, check=False).returncode == 0
    )
    assert "Group:     0" in debugfs(target, "stat /etc/passwd")
    assert "User:  1000   Group:  1000" in debugfs(target, "stat /home/agent/.profile")
    assert debugfs(target, "cat /home/agent/.profile") == "# agent\n"


@pytest.mark.skipif(find_tool("mksquashfs") is None, reason="needs squashfs-tools")
def test_the_squashfs_disk_is_the_tar_and_the_same_every_time(tmp_path: Path) -> None:
    image = kept(tmp_path)
    disk.write_squashfs(image, tmp_path / "1")
    time.sleep(1.1)  # times in it are whole seconds
    disk.write_squashfs(image, tmp_path / "2")
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    listed = subprocess.run(
        [shutil.which("unsquashfs") or "unsquashfs", "-lln", tmp_path / "1"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "1000/1000" in next(line for line in listed.splitlines() if line.endswith(".profile"))
    assert "0/0" in next(line for line in listed.splitlines() if line.endswith("etc/passwd"))


@pytest.mark.skipif(find_tool("mksquashfs") is None, reason="needs squashfs-tools")
def test_a_disk_that_cannot_be_written_says_what_the_program_said(tmp_path: Path) -> None:
    image = kept(tmp_path)
    with pytest.raises(UnavailableError, match="mksquashfs ended with") as caught:
        disk.write_squashfs(image, tmp_path / "no" / "such" / "place")
    assert caught.value.code == "image-build-failed"


def test_the_bill_of_materials_names_every_package() -> None:
    bill = cyclonedx("sha256:0", dict(FACTS))
    assert [each["purl"] for each in bill["components"]] == [
        "pkg:deb/debian/git@1%3A2.39",
        "pkg:pypi/mcp@1.0",
        "pkg:npm/%40s/x@1.0.0",
    ]
    assert bill == cyclonedx("sha256:0", dict(FACTS))
