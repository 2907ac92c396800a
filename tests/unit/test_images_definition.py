"""What a definition may say: names, and nothing that apt, pip or npm reads as more than a name."""

from __future__ import annotations

import json
from importlib.resources import files

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringfence.errors import CallerError
from ringfence.images import definition as of
from ringfence.images.debian import sources
from ringfence.images.definition import ImageDefinition, Packages, loads
from ringfence.images.fetch import pin_of, platforms
from ringfence.images.lint import CATALOGUE, lint

GOOD = {
    "apt": ["git", "g++", "libstdc++6", "python3-pip", "git=1:2.39.5-0+deb12u2", "0ad"],
    "pip": ["anthropic", "mcp[cli]", "pydantic==2.12.0", "PyYAML", "a", "x==1.0rc1", "y==2.post1"],
    "npm": ["typescript", "@scope/name", "@scope/name@1.2.3", "left-pad@1.0.0-beta.1"],
}

BAD = {
    "apt": [
        "-y", "--option", "git-", "./a.deb", "/a.deb", "git/bookworm", "?essential", "~n", "git,rm",
        "git rm", "Git", "", "g", "git=", "git=-1", "git=1:2 x", "git*", "git\n", "gít", "git:amd64",
        "https://example.com/a.deb",
    ],
    "pip": [
        "-r", "--index-url", "./x", "/x", "x @ https://example.com/x.whl", "git+https://x", "x>=1",
        "x==1.*", "x==1+local", "x;python_version<'3'", "x y", "x\n", "", "_x", "x==", "x,y",
    ],
    "npm": [
        "-g", "--registry", "./x", "../x", "user/repo", "github:user/repo", "git+ssh://x", "x@latest",
        "x@^1.0.0", "x@>=1", "x@npm:y", "x@file:y", "https://example.com/x.tgz", "@/x", "@s/", "",
    ],
}  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), [(k, n) for k, names in GOOD.items() for n in names])
def test_a_name_is_taken(kind: str, name: str) -> None:
    loaded = loads(json.dumps({"version": 1, "packages": {kind: [name]}}))
    assert getattr(loaded.packages, kind) == [name]


@pytest.mark.parametrize(("kind", "name"), [(k, n) for k, names in BAD.items() for n in names])
def test_what_is_more_or_less_than_a_name_is_refused(kind: str, name: str) -> None:
    with pytest.raises(CallerError, match=rf"packages\.{kind}\[0\]") as caught:
        loads(json.dumps({"version": 1, "packages": {kind: [name]}}))
    assert caught.value.code == "image-invalid"
    assert "ringfence image schema" in caught.value.hint


@given(st.text(max_size=30))
def test_no_taken_name_is_an_option_a_path_or_a_list(text: str) -> None:
    for kind in ("apt", "pip", "npm"):
        try:
            Packages.model_validate({kind: [text]})
        except ValueError:
            continue
        assert text.isascii()
        assert not text.startswith(("-", ".", "/"))
        assert not set(text) & set(" ,;\n\t?*~\\'\"$`()<>|&")
        assert "://" not in text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("version: 2", "version"),
        ("{}", "version"),
        ("version: 1\nsource: registry", "source"),
        ("version: 1\nsuite: ../etc", "suite"),
        ("version: 1\nsource: host\nsuite: bookworm", "suite has no meaning"),
        ("version: 1\nsource: host\npackages: {apt: [git=1]}", "installed version"),
        ("version: 1\npackages: {apt: [git, git=1]}", "twice"),
        ("version: 1\npackages: {pip: [A_b, a-b]}", "twice"),
        ("version: 1\nrun: [curl]", "no key"),
        ("version: 1\nclaude: yes", "disagree"),
        ("version: 1\nversion: 1", "twice"),
        ("[]", "dictionary"),
        ("version: 1\npackages: {apt: git}", "packages.apt"),
    ],
)
def test_vague_or_foreign_definitions_do_not_load(text: str, words: str) -> None:
    with pytest.raises(CallerError, match=words) as caught:
        loads(text, source="mine.yaml")
    assert caught.value.code == "image-invalid"


def test_an_error_names_file_and_line() -> None:
    with pytest.raises(CallerError, match=r"mine\.yaml:3:9: packages\.apt\[0\]"):
        loads("version: 1\npackages:\n  apt: [--yes]\n", source="mine.yaml")


def test_the_built_in_definition_has_what_the_seed_asks_for() -> None:
    built_in = loads((files("ringfence.images") / "agent.yaml").read_bytes())
    assert {"anthropic", "mcp", "pydantic"} <= set(built_in.packages.pip)
    assert {"git", "ripgrep", "ca-certificates", "python3", "python3-pip"} <= set(
        built_in.packages.apt
    )
    assert built_in.claude
    assert not [finding for finding in lint(built_in) if finding.severity == "warning"]


def test_what_other_packages_need_comes_along_once() -> None:
    packages = Packages(apt=["python3=3.11.2-1"], pip=["mcp"], npm=["typescript"])
    names = ImageDefinition(version=1, packages=packages).apt_names()
    assert names == ["nodejs", "python3-pip", "python3=3.11.2-1"]


KEY = {"suite": "bookworm", "architecture": "amd64", "claude": "0"}


def test_the_key_is_that_of_the_inputs_in_any_order() -> None:
    one = ImageDefinition(version=1, packages=Packages(apt=["git", "bash"]))
    two = ImageDefinition(version=1, packages=Packages(apt=["bash", "git"]), suite="bookworm")
    assert of.key_of(one, **KEY) == of.key_of(two, **KEY)
    more = ImageDefinition(version=1, packages=Packages(apt=["git", "bash"], pip=["mcp"]))
    others = [
        of.key_of(more, **KEY),
        of.key_of(one, **{**KEY, "claude": "1"}),
        of.key_of(one, **KEY, installed="1"),
        of.key_of(one, **{**KEY, "suite": "trixie"}),
        of.key_of(one, **{**KEY, "architecture": "arm64"}),
        of.key_of(one.model_copy(update={"source": "host"}), **KEY),
    ]
    assert len({of.key_of(one, **KEY), *others}) == 7


def test_lint_names_what_an_author_may_not_have_meant() -> None:
    packages = Packages(apt=["sudo", "openssh-server", "git=1:2"], pip=["mcp==1.0", "anthropic"])
    ids = {(each.id, each.subject) for each in lint(ImageDefinition(version=1, packages=packages))}
    assert {("IMG002", "sudo"), ("IMG003", "openssh-server"), ("IMG005", "ripgrep")} <= ids
    assert ("IMG001", "anthropic") in ids
    assert not {("IMG001", "mcp==1.0"), ("IMG001", "git=1:2"), ("IMG005", "git")} & ids
    bare = lint(ImageDefinition(version=1, claude=False))
    assert [each.id for each in bare] == ["IMG004"]
    assert {each.id for each in bare} | {id_ for id_, _ in ids} == set(CATALOGUE)


TARGETS = [
    "Debian|bookworm|bookworm|main|http://mirror.example/debian/",
    "Debian|bookworm|bookworm|contrib|http://mirror.example/debian/",
    "Debian|bookworm-updates|bookworm-updates|main|http://mirror.example/debian/",
    "Debian|bookworm-security|bookworm-security|main|http://mirror.example/debian-security/",
    "Docker|bookworm|bookworm|stable|https://third.example/debian/",
    "|bookworm|bookworm|main|https://unsigned.example/debian/",
    "Debian|sid|sid|main|http://mirror.example/debian/",
    "",
]


def test_sources_are_the_distribution_s_own_of_that_suite() -> None:
    assert sources("bookworm", TARGETS) == [
        "deb http://mirror.example/debian-security/ bookworm-security main",
        "deb http://mirror.example/debian/ bookworm contrib main",
        "deb http://mirror.example/debian/ bookworm-updates main",
    ]
    assert sources("sid", TARGETS) == ["deb http://mirror.example/debian/ sid main"]


def test_a_suite_written_as_stable_is_found_by_its_code_name() -> None:
    targets = ["Debian|stable|trixie|main|http://mirror.example/debian/"]
    assert sources("trixie", targets) == ["deb http://mirror.example/debian/ stable main"]


@pytest.mark.parametrize("targets", [[], TARGETS[2:6]])
def test_a_suite_without_a_mirror_is_refused_with_those_there_are(targets: list[str]) -> None:
    with pytest.raises(CallerError, match="no Debian mirror of bookworm"):
        sources("bookworm", targets)


def test_wheel_names_and_platforms() -> None:
    assert pin_of("typing_extensions-4.16.0-py3-none-any.whl") == "typing-extensions==4.16.0"
    tags = platforms("x86_64", 36)
    assert tags[0] == "manylinux_2_36_x86_64"
    assert {"manylinux_2_17_x86_64", "manylinux2014_x86_64", "linux_x86_64"} <= set(tags)
    assert "manylinux_2_37_x86_64" not in tags


def test_the_schema_knows_every_key() -> None:
    assert set(of.schema()["properties"]) == set(ImageDefinition.model_fields)
