"""What of an image a sandbox is shown, of trees that a hostile package could have made."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ringfence.errors import CallerError, UnavailableError
from ringfence.images import layout, store, tree
from ringfence.policy.compiled import SandboxProfile
from ringfence.sandbox.imageroot import digest_of, hold
from ringfence.sandbox.profile import (
    HostFacts,
    ImageRoot,
    Tools,
    prepare_plan,
    programs,
    shown_paths,
    system_covers,
)
from ringfence.sandbox.staging import StagedBackend

Change = Callable[[Path], object]


def keep(state: Path, change: Change = lambda root: None) -> store.ImageStore:
    """An image of a few files, named `mine`."""
    images = store.ImageStore(state)
    root = images.root / "building-x" / "rootfs"
    for folder in ("usr/bin", "etc/ssl/certs", "opt/tool", "opt/ringfence/bin", "var/lib", "srv"):
        (root / folder).mkdir(parents=True)
    (root / "bin").symlink_to("usr/bin")
    (root / "usr/bin/git").write_text("")
    (root / "etc/ssl/certs/ca-certificates.crt").write_text("of the image")
    change(root)
    layout.settle(root, claude=None)
    manifest = tree.render(tree.scan(root))
    (root.parent / "tree").write_bytes(manifest)
    (root.parent / "image.json").write_text("{}")
    images.set_name("mine", images.keep(root.parent, tree.digest_of(manifest)).digest)
    return images


def test_what_is_shown_is_of_the_image(tmp_path: Path) -> None:
    images = keep(tmp_path)
    held = hold(tmp_path, "mine")
    assert held.digest == images.find("mine").digest == digest_of(tmp_path, "mine")
    # /opt/ringfence is ours, whatever an image has there: a claude of another hash would be trusted
    assert set(held.root.directories) == {"usr", "var", "srv", "opt/tool"}
    assert held.root.links == {"bin": "usr/bin"}
    assert held.trust_store == "of the image"
    held.release()


def test_what_is_held_is_not_removed(tmp_path: Path) -> None:
    images = keep(tmp_path)
    held = hold(tmp_path, "mine")
    with pytest.raises(UnavailableError, match="is used by a sandbox"):
        images.remove("mine")
    held.release()
    held.release()
    images.remove("mine")
    with pytest.raises(CallerError, match="there is no image mine"):
        hold(tmp_path, "mine")


def _usr_is_a_link(root: Path) -> None:
    (root / "usr").rename(root / "elsewhere")
    (root / "usr").symlink_to("/root")


def _usr_is_absent(root: Path) -> None:
    (root / "elsewhere").mkdir()
    (root / "usr/bin/git").rename(root / "elsewhere/git")
    (root / "usr/bin").rmdir()
    (root / "usr").rmdir()


@pytest.mark.parametrize("change", [_usr_is_a_link, _usr_is_absent])
def test_a_root_without_its_directories_is_unfit(tmp_path: Path, change: Change) -> None:
    keep(tmp_path, change)
    with pytest.raises(UnavailableError, match="has no directory /usr") as caught:
        hold(tmp_path, "mine")
    assert caught.value.code == "image-unfit"
    store.ImageStore(tmp_path).remove("mine")  # and nobody holds it


def test_no_link_of_an_image_is_followed_on_the_host(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    canary.write_text("canary")

    def change(root: Path) -> None:
        (root / "etc/ssl/certs/ca-certificates.crt").unlink()
        (root / "etc/ssl/certs/ca-certificates.crt").symlink_to(canary)
        (root / "opt/out").symlink_to("/root")
        (root / "media").symlink_to("/root")

    keep(tmp_path, change)
    held = hold(tmp_path, "mine")
    assert held.trust_store == ""
    assert not {"opt/out", "media"} & set(held.root.directories)
    held.release()


def test_what_is_blocked_is_found_through_links_of_the_image_alone(tmp_path: Path) -> None:
    def change(root: Path) -> None:
        (root / "usr/bin/way-out").symlink_to("/../../usr/bin/git")
        (root / "etc/shadow").write_text("")

    keep(tmp_path, change)
    blocked = ["/bin/git", "/usr/bin/way-out", "/usr/absent", "/var", "/etc", "/opt/tool", "/home"]
    held = hold(tmp_path, "mine", blocked=blocked)
    assert held.root.covered == {"/usr/bin/git": False}
    assert set(held.root.directories) == {"usr", "srv"}
    held.release()
    held = hold(tmp_path, "mine", blocked=["/etc/shadow", "/etc/ssl"])
    # root's file is shut to every sandbox that root starts; an ordinary user's sandbox owns it
    shadow = {} if os.geteuid() == 0 else {"/etc/shadow": False}
    assert held.root.covered == {**shadow, "/etc/ssl": True}
    held.release()


def test_a_file_that_a_technology_needs_is_asked_for(tmp_path: Path) -> None:
    keep(tmp_path)
    hold(tmp_path, "mine", needed=["bin/git"]).release()
    for path in ("usr/bin/perl", "usr/bin"):
        with pytest.raises(UnavailableError, match=f"has no /{path}") as caught:
            hold(tmp_path, "mine", needed=[path])
        assert caught.value.code == "image-unfit"


def test_a_damaged_image_is_not_held(tmp_path: Path) -> None:
    images = keep(tmp_path)
    (images.find("mine").rootfs / "usr/bin/git").write_text("other")
    with pytest.raises(UnavailableError) as caught:
        hold(tmp_path, "mine")
    assert caught.value.code == "image-damaged"


FACTS = HostFacts(
    as_root=True,
    uid=2_000_000,
    tools=Tools(executable="tools/bwrap"),
    existing={"/usr/share/x": True, "/opt/tool/y": True, "/opt/hosts": True, "/data": True},
    image=ImageRoot(path="/i", directories=("usr", "opt/tool"), covered={"/usr/bin/git": False}),
)


def test_a_path_of_the_system_is_the_image_s_and_never_the_host_s() -> None:
    rules = SandboxProfile(readable=("/usr/share/x", "/opt/tool/y", "/opt/hosts", "/data"))
    assert shown_paths(rules, FACTS) == (("/opt/hosts", False), ("/data", False))
    on_the_host = replace(FACTS, image=None)
    assert ("/usr/share/x", False) in shown_paths(rules, on_the_host)
    with pytest.raises(CallerError, match="an image stands there"):
        shown_paths(SandboxProfile(writable=("/opt/tool/y",)), FACTS)


def test_every_mount_of_the_system_is_below_the_image() -> None:
    assert programs(FACTS) == (("/mnt/image/usr", "/usr"), ("/mnt/image/opt/tool", "/opt/tool"))
    assert system_covers(SandboxProfile(), FACTS) == (("/usr/bin/git", False),)
    plan = prepare_plan(SandboxProfile(), replace(FACTS, existing={"/etc/localtime": False}))
    assert [one["path"] for one in plan["sources"]] == ["", "/i"]
    assert plan["overlays"][-1] == {
        "lower": "own/etc", "over": "image/etc", "target": "etc", "writable": False,
    }  # fmt: skip
    assert {"own/etc/hosts", "own/etc/resolv.conf", "own/etc/passwd"} <= plan["files"].keys()
    assert not any(path.startswith("etc/") for path in plan["files"])


class HostOnly(StagedBackend):
    name = "host-only"

    def check(self) -> None:
        pass


class FromImages(HostOnly):
    from_images = True


def test_who_cannot_start_from_an_image_refuses_one(tmp_path: Path) -> None:
    rules = SandboxProfile(image="mine")
    with pytest.raises(UnavailableError, match="host-only cannot start from an image") as caught:
        HostOnly(state_dir=tmp_path).probe(rules)
    assert caught.value.code == "isolation-unavailable"
    HostOnly(state_dir=tmp_path).probe(SandboxProfile())
    FromImages(state_dir=tmp_path).probe(rules)


def test_the_manifest_is_read_by_its_upper_levels_alone(tmp_path: Path) -> None:
    """A name may hold what ends a name in the manifest's own form."""

    def change(root: Path) -> None:
        (root / 'usr/bin/",x').mkdir()
        (root / 'opt/",y').mkdir()

    keep(tmp_path, change)
    held = hold(tmp_path, "mine")
    assert set(held.root.directories) == {"usr", "var", "srv", "opt/tool", 'opt/",y'}
    held.release()
