"""Which changed files would run on the host later (requirement F). PURE.

A patch from inside is a letter from a stranger. Most of it is read before it is used; these files
are used without being read: by git, by an editor that opens the folder, by a shell that enters
it, by CI. `held` ones are applied only when they are named.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ringfence.sandbox.protocol import Change, Changes

_LINK, _EXECUTABLE = 0o120000, 0o100755


@dataclass(frozen=True, kw_only=True, slots=True)
class HostFile:
    """One such file: why it runs, and whether it is held back."""

    path: str
    why: str
    held: bool


_HELD: tuple[tuple[str, str], ...] = (
    (r"(.*/)?\.git(/.*)?", "git runs hooks, filters and the programs its configuration names"),
    (r"(.*/)?\.git(attributes|modules)", "git runs filters and fetches submodules"),
    (r"(.*/)?\.envrc(\..*)?", "direnv runs it when a shell enters the folder"),
    (r"(.*/)?\.(vscode|idea|devcontainer|fleet|zed)/.*", "an editor runs tasks of it"),
    (r"(.*/)?\.devcontainer\.json", "an editor builds and starts it"),
    (r".*\.code-workspace", "an editor runs tasks of it"),
    (r"(.*/)?\.(claude|cursor|codex|gemini|aider.*|windsurf)(/.*)?", "an agent takes orders of it"),
    (r"(.*/)?\.(mcp|claude)\.json", "an agent starts the servers it names"),
    (r"(.*/)?(claude|agents|gemini)(\.local)?\.md", "an agent takes orders of it"),
    (r"(.*/)?\.(github|gitea|forgejo)/(workflows|actions)/.*", "CI runs it with its own secrets"),
    (r"(.*/)?\.(circleci|buildkite|woodpecker|tekton)/.*", "CI runs it with its own secrets"),
    (
        r"(.*/)?(\.gitlab-ci.*\.ya?ml|\.travis\.yml|jenkinsfile.*|azure-pipelines.*\.ya?ml"
        r"|bitbucket-pipelines\.yml|\.drone\.ya?ml|appveyor\.ya?ml|\.woodpecker\.ya?ml)",
        "CI runs it with its own secrets",
    ),
    (r"(.*/)?(\.husky|\.githooks)/.*", "git hooks"),
    (r"(.*/)?(\.pre-commit-config\.yaml|lefthook\.ya?ml|\.lefthook/.*)", "git hooks"),
    (
        r"(.*/)?\.(bashrc|bash_profile|profile|zshrc|zshenv|zprofile|inputrc|vimrc|exrc|nvimrc)",
        "a shell or an editor reads it at start",
    ),
    (
        r"(.*/)?\.(npmrc|yarnrc(\.yml)?|pypirc|netrc|pnpmfile\.cjs|yarn/(releases|plugins)/.*)",
        "a package manager obeys it",
    ),
    (r"(.*/)?\.ssh/.*", "ssh obeys it"),
)

_ADVICE: tuple[tuple[str, str], ...] = (
    (r"(.*/)?(gnu)?makefile|.*\.mk|(.*/)?\.?justfile|(.*/)?taskfile\.ya?ml", "a build runs it"),
    (
        r"(.*/)?(conftest|setup|noxfile|fabfile|tasks|manage|sitecustomize|usercustomize)\.py",
        "Python runs it without being asked",
    ),
    (
        r"(.*/)?(pyproject\.toml|setup\.cfg|tox\.ini|pytest\.ini|hatch_build\.py)",
        "tools run what it names",
    ),
    (r".*\.pth", "Python runs it at every start"),
    (
        r"(.*/)?(package\.json|\.?(eslint|prettier|babel|jest|vite|webpack|rollup|postcss|next|"
        r"tailwind|metro|gulpfile|gruntfile).*\.(js|cjs|mjs|ts|json))",
        "node runs it",
    ),
    (
        r"(.*/)?(dockerfile.*|.*\.dockerfile|(docker-)?compose.*\.ya?ml|containerfile.*)",
        "a container build runs it",
    ),
    (
        r"(.*/)?(build\.gradle(\.kts)?|settings\.gradle(\.kts)?|pom\.xml|gradlew|mvnw|build\.rs"
        r"|\.cargo/config(\.toml)?|cmakelists\.txt|configure(\.ac)?|meson\.build|rakefile|gemfile"
        r"|.*\.gemspec|package\.swift|build\.zig|flake\.nix|shell\.nix|default\.nix)",
        "a build runs it",
    ),
    (
        r"(.*/)?(vagrantfile|procfile|\.tool-versions|\.mise\.toml|mise\.toml|\.sdkmanrc)",
        "a tool runs what it names",
    ),
)


def _compiled(table: Iterable[tuple[str, str]]) -> tuple[tuple[re.Pattern[str], str], ...]:
    # case-insensitive file systems would read .GIT as .git (CVE-2014-9390)
    return tuple((re.compile(rf"(?s:{text})\Z", re.IGNORECASE), why) for text, why in table)


_HELD_COMPILED, _ADVICE_COMPILED = _compiled(_HELD), _compiled(_ADVICE)

_IGNORABLE = re.compile("[\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff]")
"""Characters that HFS+ ignores in names: .g\u200cit is .git there (CVE-2014-9390)."""


def host_files(changes: Changes) -> tuple[HostFile, ...]:
    """The files among the changes that run later, held ones first, each with its reason."""
    found = [file for change in changes.items if (file := classify(change)) is not None]
    return tuple(sorted(found, key=lambda file: (not file.held, file.path)))


def classify(change: Change) -> HostFile | None:
    """Whether one change is such a file."""
    name = _IGNORABLE.sub("", change.path)
    # trailing dots and spaces, and 8.3 names, are dropped by NTFS
    name = re.sub(r"[ .]+(?=/|\Z)", "", name) or name
    name = re.sub(r"(?i)(^|/)git~[0-9]+(?=/|\Z)", r"\1.git", name)
    for pattern, why in _HELD_COMPILED:
        if pattern.match(name):
            return HostFile(path=change.path, why=why, held=True)
    if change.mode == _LINK:
        return HostFile(path=change.path, why="a link: what it leads to is elsewhere", held=True)
    for pattern, why in _ADVICE_COMPILED:
        if pattern.match(name):
            return HostFile(path=change.path, why=why, held=False)
    if change.mode == _EXECUTABLE and change.old_mode != _EXECUTABLE:
        return HostFile(path=change.path, why="newly executable", held=False)
    return None
