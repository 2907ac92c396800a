"""Files that run later: of many changes, of long paths, and in repositories of any name."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from ringfence.cli.patch import apply_run
from ringfence.errors import CallerError
from ringfence.sandbox.hostfiles import MAX_LOOKED, classify, host_files
from ringfence.sandbox.overlay import read_changes
from ringfence.sandbox.protocol import Change, ChangeKind, Changes
from ringfence.sandbox.saved import load_changes, save_changes
from ringfence.worker.reviewed import reviewed


def added(path: str) -> Change:
    kind = ChangeKind.ADDED
    return Change(path=path, kind=kind, mode=0o100644, old_mode=0, before=None, after=b"x\n")


def test_what_is_beyond_the_bound_is_held_without_a_look() -> None:
    items = tuple(map(added, ("Makefile", "a.txt", ".envrc", "b.txt", "setup.py")))
    found = host_files(Changes(items=items), most=3)
    assert [(file.path, file.held) for file in found] == [
        (".envrc", True),
        ("b.txt", True),
        ("setup.py", True),
        ("Makefile", False),
    ]
    assert "not looked at" in found[1].why
    # the twins: one that is looked at, and all of them
    assert [file.path for file in host_files(Changes(items=items), most=5)] == [
        ".envrc",
        "Makefile",
        "setup.py",
    ]
    assert host_files(Changes(items=items)) == host_files(Changes(items=items), most=5)


def test_many_changes_hide_no_file() -> None:
    """An agent puts what it wants to hide where nobody looks any more."""
    few = tuple(added(f"{number}.txt") for number in range(3))
    assert reviewed(Changes(items=few)).host_files == ()
    assert list(reviewed(Changes(items=few)).notices) == []
    over = 7
    many = tuple(added(f"a/{number}") for number in range(MAX_LOOKED + over - 1))
    found = reviewed(Changes(items=(*many, added("z/.envrc"))))
    assert found.host_files == tuple(
        sorted((*(one.path for one in many[MAX_LOOKED:]), "z/.envrc"), key=found.host_files.index)
    )
    assert len(found.host_files) == over
    (notice,) = found.notices
    assert f"the last {over} are not in its patch and were not looked at" in notice.text
    # and the patch says itself that it is not whole
    assert found.patch.count(b"diff --git") == MAX_LOOKED
    assert found.left_out[0].startswith(f"the last {over} changed files: ")
    whole = reviewed(Changes(items=many[:MAX_LOOKED]))
    assert whole.patch.count(b"diff --git") == MAX_LOOKED
    assert whole.left_out == ()


@pytest.mark.parametrize(
    "path",
    [
        *(f".g{one}it/config" for one in "\u00ad\u034f\u180b\u3164\ufe0f\uffa0\U000e0100"),
        *(
            ".gitcon\ufb01g",
            "Jenkins\ufb01le",
            ".\u017f\u017fh/config",
            ".bash_pro\ufb01le",
            ".E\u00adnvrc",
        ),
    ],
)
def test_what_a_file_system_with_casefold_reads_otherwise_hides_nothing(path: str) -> None:
    """ext4, f2fs and tmpfs compare names decomposed, folded whole, and without what is ignorable."""
    found = classify(added(path))
    assert found is not None
    assert found.held


@pytest.mark.parametrize(
    "path", ["r\u00e9sum\u00e9.txt", "\u4f60.md", "na\u00efve/\ufb01le.py", "\U0001f600.md"]
)
def test_names_in_other_letters_are_names(path: str) -> None:
    assert classify(added(path)) is None


HELD = """
    CODEOWNERS docs/CODEOWNERS action.yml a/action.yaml .github/hooks/x.json .github/skills/x/SKILL.md
    .gitlab/ci/x.yml .build.yml .builds/x.yml .zuul.yaml zuul.d/x.yaml .readthedocs.yaml codemagic.yaml bitrise.yml
    wercker.yml .azuredevops/x.yml .pipelines/x.yml .harness/x.yaml .pdbrc sub/.pdbrc .ocamlinit .byebugrc
    ipython_config.py jupyter_server_config.json .ycm_extra_conf.py .clangd .gitpod.yml .replit .codesandbox/tasks.json
    .idx/dev.nix .project .externalToolBuilders/x.launch nbproject/project.xml .venv/bin/python a/venv/bin/python3.12
    .venv/Scripts/activate.bat .claude-plugin/plugin.json .openhands/setup.sh .rules .roomodes WARP.md .htaccess
    .user.ini .autoenv.zsh .devbox/x .flox/env/manifest.toml .direnv/bin/x .local.vimrc .lazy.lua .neoconf.json .kakrc
    _FOSSIL_ .fslckout .p4config .config/git/config .config/nvim/init.lua .config/direnv/direnvrc
"""
ADVICE = """
    conf.py docs/conf.py mkdocs.yml .luacheckrc .rubocop.yml pytest.toml phpunit.xml.dist renovate.json netlify.toml
    node_modules/.bin/tsc .terraform/providers/x git.exe make.bat a/x.ps1 tools/bazel devbox.json project.clj stack.yaml
    x.xcodeproj/project.pbxproj
"""
PLAIN = """
    transaction.yml reaction.yaml docs/codeowners.md bin/tool scripts/deploy.sh env/scripts/x.sh src/python.py
    my.project rules rules.md builds/x.yml pipelines/x.yml gitlab/x.yml harness/x.py zuul/x configure.py my_conf.py x.exe.txt
    replit.md bin/pythonista/x ona/x
"""


@pytest.mark.parametrize("path", HELD.split())
def test_what_runs_by_itself_is_held(path: str) -> None:
    found = classify(added(path))
    assert found is not None
    assert found.held


@pytest.mark.parametrize("path", ADVICE.split())
def test_what_a_person_starts_is_named(path: str) -> None:
    found = classify(added(path))
    assert found is not None
    assert not found.held


@pytest.mark.parametrize("path", PLAIN.split())
def test_what_is_called_nearly_so_is_neither(path: str) -> None:
    assert classify(added(path)) is None


def test_a_path_too_long_to_be_looked_at_is_held() -> None:
    long, deep = "a" * 1024, "a/" * 64 + "b"
    assert classify(added(long)) is None
    assert classify(added(deep)) is None
    for path in (long + "d", "a/" + deep):
        found = classify(added(path))
        assert found is not None
        assert found.held
        assert "too long" in found.why


@pytest.mark.parametrize(
    "path", [".git\\config", "a/b\\.vscode\\tasks.json", "..\\x", "a\\", "C:\\x", "plain\\name"]
)
def test_a_name_that_is_a_path_on_windows_is_held(path: str) -> None:
    found = classify(added(path))
    assert found is not None
    assert found.held
    assert "backslash" in found.why
    assert classify(added("plain-name")) is None


@pytest.mark.parametrize(
    "path",
    [".git .:x/config", "git~1::$INDEX_ALLOCATION/config", "git~1 .:x/config", "a/.envrc .:s"],
)
def test_what_ntfs_drops_before_a_stream_hides_nothing(path: str) -> None:
    found = classify(added(path))
    assert found is not None
    assert found.held
    harmless = path.replace("git~1", "gat").replace("git", "gat").replace("envrc", "envoy")
    assert classify(added(harmless)) is None


@pytest.mark.parametrize(
    ("path", "harmless"),
    [
        ("CLAUDE~1/settings.json", "CLAUDE/settings.json"),
        ("a/vscode~2/tasks.json", "a/vscode~/tasks.json"),
        ("GI3A5F~1/x", "GI3A5F-1/x"),
        ("CONFTE~1.PY", "notes.txt.~1~"),
        ("envrc~1 .:s", "a-long-name~1"),
    ],
)
def test_a_short_name_of_windows_is_held(path: str, harmless: str) -> None:
    found = classify(added(path))
    assert found is not None
    assert found.held
    assert "short name" in found.why
    assert classify(added(harmless)) is None


@pytest.fixture
def sides(tmp_path: Path) -> tuple[Path, Path]:
    lower, upper = tmp_path / "lower", tmp_path / "upper"
    lower.mkdir()
    upper.mkdir()
    return lower, upper


def changes_of(lower: Path, upper: Path) -> Changes:
    fds = [os.open(path, os.O_RDONLY | os.O_DIRECTORY) for path in (lower, upper)]
    try:
        return read_changes(*fds, begun_ns=time.time_ns())
    finally:
        for descriptor in fds:
            os.close(descriptor)


def write(root: Path, *paths: str) -> None:
    for path in paths:
        place = root / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("[core]\n\tfsmonitor = touch /tmp/ran\n")


@pytest.mark.parametrize("place", ["store/", "deep/in/store/", "st\nore\udcff/", ""])
def test_a_bare_repository_is_held_as_git_s_own_folder_is(
    sides: tuple[Path, Path], place: str
) -> None:
    """It needs no name; what the agent did not add to it is seen in the workspace alone."""
    lower, upper = sides
    subprocess.run(["git", "init", "-q", "--bare", str(lower / place)], check=True)
    inside = ("config", "config.worktree", "commondir", "hooks/post-receive", "info/attributes")
    write(upper, *(place + name for name in inside))
    changes = changes_of(lower, upper)
    assert changes.repositories == (place.rstrip("/"),)
    found = {file.path: file for file in host_files(changes)}
    assert sorted(found) == sorted(place + name for name in inside)
    assert all(file.held for file in found.values())
    # the twin: the same files where no repository is
    (lower / place / "HEAD").unlink()
    plain = changes_of(lower, upper)
    assert plain.repositories == ()
    assert host_files(plain) == ()


def test_beside_a_repository_nothing_is_held(sides: tuple[Path, Path]) -> None:
    lower, upper = sides
    subprocess.run(["git", "init", "-q", "--bare", str(lower / "store")], check=True)
    write(lower, "dir/HEAD/x")
    write(upper, "stores/config", "other/store/config", "config", "dir/config", "store/config")
    changes = changes_of(lower, upper)
    assert changes.repositories == ("store",)
    assert [file.path for file in host_files(changes)] == ["store/config"]


def test_a_link_is_no_way_to_a_repository(sides: tuple[Path, Path], tmp_path: Path) -> None:
    """The look into the workspace leaves it through no link, and one in place of HEAD counts."""
    lower, upper = sides
    write(tmp_path, "outside/HEAD")
    (lower / "to").symlink_to(tmp_path / "outside")
    (lower / "linked").mkdir()
    (lower / "linked/HEAD").symlink_to("refs/heads/main")
    write(upper, "to/config", "linked/config")
    assert changes_of(lower, upper).repositories == ("linked",)


def test_apply_holds_what_lies_in_a_repository_and_writes_it_when_named(
    sides: tuple[Path, Path], tmp_path: Path
) -> None:
    lower, upper = sides
    subprocess.run(["git", "init", "-q", "--bare", str(lower / "store")], check=True)
    write(upper, "store/hooks/post-receive", "plain/hooks/post-receive")
    run = "run_" + "0" * 26
    directory = tmp_path / "state" / "runs" / run
    directory.mkdir(parents=True)
    changes = changes_of(lower, upper)
    save_changes(directory / "changes.bin", changes, str(lower))
    assert load_changes(directory / "changes.bin") == (changes, str(lower))
    applied = apply_run(tmp_path / "state", run, include=())
    assert applied["held"] == ("store/hooks/post-receive",)
    assert applied["written"] == ("plain/hooks/post-receive",)
    assert not (lower / "store/hooks/post-receive").exists()
    (lower / "plain/hooks/post-receive").unlink()
    with pytest.raises(CallerError, match="did not change"):
        apply_run(tmp_path / "state", run, include=("store/hooks/other",))
    again = apply_run(tmp_path / "state", run, include=("store/hooks/post-receive",))
    assert again["held"] == ()
    assert (lower / "store/hooks/post-receive").exists()


def test_apply_looks_for_repositories_in_the_workspace_as_it_is(
    sides: tuple[Path, Path], tmp_path: Path
) -> None:
    """A run of an earlier version saved none; and one may have come since."""
    lower, upper = sides
    subprocess.run(["git", "init", "-q", "--bare", str(lower / "store")], check=True)
    write(upper, "store/hooks/post-receive", "later/config", "plain/config")
    run = "run_" + "0" * 26
    directory = tmp_path / "state" / "runs" / run
    directory.mkdir(parents=True)
    file = directory / "changes.bin"
    save_changes(file, changes_of(lower, upper), str(lower))
    first, *rest = file.read_text().splitlines()
    head = json.loads(first)
    assert head.pop("repositories")
    file.write_text("\n".join([json.dumps(head), *rest]))
    assert load_changes(file)[0].repositories == ()
    write(lower, "later/HEAD")
    applied = apply_run(tmp_path / "state", run, include=())
    assert applied["held"] == ("later/config", "store/hooks/post-receive")
    assert applied["written"] == ("plain/config",)
