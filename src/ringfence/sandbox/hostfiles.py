"""Which changed files would run on the host later (requirement F). PURE.

A patch from inside is a letter from a stranger. Most of it is read before it is used; these files
are used without being read: by git, by an editor that opens the folder, by a shell that enters
it, by CI. `held` ones are applied only when they are named.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
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
    # whoever enters a bare repository, which needs no name, obeys its configuration
    # (safe.bareRepository is "all" unless set)
    (r"(.*/)?(HEAD|[^/]+\.git/.*)", "git takes the folder for a repository, and obeys its config"),
    (
        r"(.*/)?(\.(hg|bzr|svn|jj|sl|fossil-settings)|_darcs)(/.*)?|(.*/)?(_fossil_|\.fslckout|\.p4config)",
        "version control runs hooks of it",
    ),
    (r"(.*/)?codeowners", "it says who has to look at a change"),
    (
        r"(.*/)?(\.(envrc|autoenv)(\..*)?|\.(direnv|devbox|flox)/.*)",
        "a shell that enters the folder runs it",
    ),
    (
        r"(.*/)?(\.(mise|rtx)(\..*)?|mise(\..*)?|\.config/mise(/.*)?)\.toml",
        "a shell that enters obeys it",
    ),
    (
        r"(.*/)?\.(vscode(-server)?|vs|idea|run|devcontainer|fleet|zed|theia|nova|vim|nvim|helix)/.*",
        "an editor runs tasks of it",
    ),
    (
        r"(.*/)?(\.dir-locals(-2)?\.el|\.ycm_extra_conf\.py|\.lazy\.lua|\.neoconf\.json|\.kakrc|\.clangd"
        r"|\.(local\.vimrc|vimrc\.local)|\.project|\.externaltoolbuilders/.*|nbproject/.*)"
        r"|.*\.sublime-(project|build)",
        "an editor runs it",
    ),
    # an editor that opens a folder asks the interpreter of its environment what it is
    (r"(.*/)?(bin|scripts)/(python|activate)[^/]*", "an editor or a shell runs it, or reads it"),
    (
        r"(.*/)?(\.gitpod\.ya?ml|\.replit|\.(codesandbox|idx|ona)/.*)",
        "a workspace in the cloud runs it when it opens",
    ),
    (r"(.*/)?\.devcontainer\.json", "an editor builds and starts it"),
    (r".*\.code-workspace", "an editor runs tasks of it"),
    (
        r"(.*/)?\.(claude|cursor|codex|gemini|aider.*|windsurf|roo|cline|continue|kiro|amazonq|junie"
        r"|opencode|augment|trae|goose|agents?|crush|qwen|claude-plugin|openhands|factory|amp|devin)(/.*)?",
        "an agent takes orders of it",
    ),
    (
        r"(.*/)?(\.(cursor|windsurf|cline|roo)rules.*|\.goosehints|opencode\.jsonc?|\.crush\.json"
        r"|\.rules|\.roomodes"
        r"|\.github/(copilot-instructions\.md|(instructions|prompts|agents|chatmodes|hooks|skills)/.*))",
        "an agent takes orders of it",
    ),
    (r"(.*/)?\.(mcp|claude)\.json", "an agent starts the servers it names"),
    (
        r"(.*/)?(claude|agents?|gemini|qwen|crush|warp)(\.local|\.override)?\.md",
        "an agent takes orders of it",
    ),
    (
        r"(.*/)?(\.(github|gitea|forgejo)/(workflows|actions)/.*|action\.ya?ml)",
        "CI runs it with its own secrets",
    ),
    (
        r"(.*/)?(\.(circleci|buildkite|woodpecker|tekton|gitlab|builds|azuredevops|azure-pipelines"
        r"|pipelines|harness)|\.?zuul\.d)/.*",
        "CI runs it with its own secrets",
    ),
    (
        r"(.*/)?(\.gitlab-ci.*\.ya?ml|\.travis\.yml|jenkinsfile.*|azure-pipelines.*\.ya?ml"
        r"|bitbucket-pipelines\.yml|\.drone\.(ya?ml|jsonnet|star)|\.?appveyor\.ya?ml|\.woodpecker\.ya?ml"
        r"|\.cirrus\.(ya?ml|star)|\.semaphore/.*|\.teamcity/.*|cloudbuild.*\.(ya?ml|json)"
        r"|buildspec.*\.ya?ml|\.build\.yml|\.?zuul\.ya?ml|\.?readthedocs\.ya?ml"
        r"|(codemagic|bitrise|wercker|screwdriver)\.ya?ml)",
        "CI runs it with its own secrets",
    ),
    (r"(.*/)?(\.husky|\.githooks)/.*", "git hooks"),
    (
        r"(.*/)?(\.pre-commit-(config|hooks)\.ya?ml|\.?lefthook(-local)?\.(ya?ml|toml|json)|\.lefthook/.*"
        r"|\.?(simple-git-hooks|huskyrc|lintstagedrc|lint-staged|commitlint(rc)?|overcommit)(\..*)?)",
        "git hooks",
    ),
    (
        r"(.*/)?(\.(bashrc|bash_profile|bash_login|bash_logout|bash_aliases|profile|zshrc|zshenv"
        r"|zprofile|zlogin|zlogout|kshrc|cshrc|tcshrc|login|inputrc|vimrc|gvimrc|exrc|nvimrc|lvimrc"
        r"|emacs|tmux\.conf|screenrc|xprofile|xinitrc|gitconfig|hgrc)|_g?vimrc|_exrc|\.nvim\.lua|\.emacs\.d/.*)",
        "a shell or an editor reads it at start",
    ),
    (
        r"(.*/)?(\.(gdbinit|lldbinit|rprofile|renviron|irbrc|pryrc|ghci|octaverc|pythonrc(\.py)?"
        r"|pythonstartup|iex\.exs|julia/config/.*|config/(fish|systemd|autostart|git|nvim|direnv)/.*"
        r"|pdbrc|ocamlinit|byebugrc|rdbgrc)|ipython_config\.py|jupyter_.*config\.(py|json))",
        "a program reads it when it starts in the folder",
    ),
    (
        r".*\.(desktop|lnk|url|scf|webloc|command)|(.*/)?(autorun\.inf|desktop\.ini)",
        "a desktop or the system starts what it names",
    ),
    (
        r"(.*/)?(\.(npmrc|yarnrc(\.ya?ml)?|pypirc|netrc|curlrc|wgetrc|pnpmfile\.(cjs|mjs)|gemrc|condarc"
        r"|bundle/.*|pnp\.(c?js|loader\.mjs)|yarn/(releases|plugins|sdks)/.*|pip/.*|cargo/config(\.toml)?"
        r"|mvn/.*|bazelrc|sbtopts|jvmopts)|pip\.conf|uv\.toml|bunfig\.toml|pnpm-workspace\.yaml)",
        "a package manager obeys it",
    ),
    (r"(.*/)?\.ssh/.*", "ssh obeys it"),
    (r"(.*/)?(\.htaccess|\.user\.ini)", "a web server obeys it"),
)

_ADVICE: tuple[tuple[str, str], ...] = (
    (
        r"(.*/)?(gnu|bsd)?makefile(\..*)?|.*\.(mk|mak|make|just|cmake|gyp|gypi|bzl|bazel|sbt|cabal|nimble"
        r"|csproj|fsproj|vbproj|vcxproj|pbxproj|xcscheme|sln|props|targets|gradle(\.kts)?|gemspec|podspec|rockspec)"
        r"|(.*/)?(\.?justfile|taskfile\.ya?ml)",
        "a build runs it",
    ),
    (
        r"(.*/)?(conftest|setup|noxfile|fabfile|tasks|manage|dodo|sitecustomize|usercustomize"
        r"|gunicorn\.conf|build|hatch_build|pavement|waf)\.py",
        "Python runs it without being asked",
    ),
    (
        r"(.*/)?(pyproject\.toml|setup\.cfg|\.?(tox|pytest|mypy)\.ini|(dev-)?requirements.*\.(txt|in)"
        r"|constraints.*\.txt|pipfile(\.lock)?|poetry\.(lock|toml)|uv\.lock|environment\.ya?ml"
        r"|\.(pylintrc|coveragerc|flake8))",
        "tools run what it names",
    ),
    (r".*\.(pth|egg-link)|(.*/)?pyvenv\.cfg", "Python runs it at every start"),
    (
        r"(.*/)?(conf\.py|mkdocs\.ya?ml|_config\.ya?ml|\.?pytest\.toml|\.luacheckrc|\.rubocop.*\.ya?ml"
        r"|\.simplecov|\.(formatter|credo)\.exs|phpunit\.xml.*|phpstan.*\.neon.*|rector\.php"
        r"|\.php-cs-fixer.*\.php|renovate\.json5?|netlify\.toml|serverless\.ya?ml|cdk\.json|dagger\.json)",
        "a tool runs what it says",
    ),
    (r"(.*/)?(node_modules|\.terraform)/.*", "a tool runs programs that it finds there"),
    # a shell of Windows looks in the folder that it is in before it looks on the PATH
    (r".*\.(exe|com|bat|cmd|ps1|vbs|dll)", "Windows may run it in the place of a program"),
    (
        r"(.*/)?(package\.json|(package-lock|npm-shrinkwrap|deno)\.jsonc?|deno\.lock|yarn\.lock"
        r"|pnpm-lock\.yaml|bun\.lockb?|\.(eslint|prettier|babel|mocha|stylelint|nyc)rc"
        r"|\.?(eslint|prettier|babel|jest|vite|vitest|webpack|rollup|postcss|next|nuxt|astro|svelte|"
        r"remix|playwright|cypress|karma|mocha|stylelint|esbuild|rspack|tsup|turbo|nx|"
        r"tailwind|metro|gulpfile|gruntfile).*\.(js|cjs|mjs|ts|cts|mts|json)|[^/]+\.config\."
        r"(js|cjs|mjs|ts|cts|mts))",
        "node runs it",
    ),
    (
        r".*\.dockerfile|(.*/)?(dockerfile.*|(docker-)?compose[^/]*\.ya?ml|containerfile.*|earthfile"
        r"|tiltfile|skaffold\.ya?ml|docker-bake\..*|devspace\.ya?ml)",
        "a container build runs it",
    ),
    (
        r".*\.nix|(.*/)?(pom\.xml|(gradlew|mvnw)(\.(bat|cmd))?|gradle\.properties|gradle/.*|build\.rs"
        r"|cargo\.toml|cmakelists\.txt|cmakepresets\.json|configure(\.ac)?|meson\.build|rakefile|gemfile"
        r"|guardfile|podfile|brewfile|dangerfile|fastfile|package\.swift|build\.zig(\.zon)?"
        r"|sconstruct|sconscript|wscript|snakefile|magefile\.go|build|workspace|mix\.exs|rebar\.config"
        r"|setup\.hs|dune-project|composer\.json|project/[^/]*\.scala|go\.work|build\.(sc|mill)|project\.clj|(deps|bb)\.edn"
        r"|stack\.yaml|tools/bazel|\.bazeliskrc|devbox\.json)",
        "a build runs it",
    ),
    (
        r".*\.(tf|tfvars|hcl)|(.*/)?(vagrantfile|procfile(\..*)?|\.tool-versions|\.sdkmanrc|\.(node|python|ruby|java|go)-version"
        r"|\.nvmrc|rust-toolchain(\.toml)?|global\.json|\.env(\..*)?|\.flaskenv|\.rspec|ansible\.cfg"
        r"|\.terraformrc|jenkins[^/]*\.groovy|\.goreleaser.*)",
        "a tool runs what it names",
    ),
)


def _compiled(table: Iterable[tuple[str, str]]) -> tuple[tuple[re.Pattern[str], str], ...]:
    # case-insensitive file systems would read .GIT as .git (CVE-2014-9390)
    return tuple((re.compile(rf"(?s:{text})\Z", re.IGNORECASE), why) for text, why in table)


_HELD_COMPILED, _ADVICE_COMPILED = _compiled(_HELD), _compiled(_ADVICE)

_IGNORABLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f"
    "\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"
    "\U000e0000-\U000e0fff]"
)
"""Characters that some file systems leave out of names: .g\u200cit is .git on HFS+ (CVE-2014-9390),
and all of Unicode's Default_Ignorable_Code_Point are on ext4, f2fs and tmpfs with casefold."""

MAX_LOOKED = 50_000
"""Changes that a worker looks at: an agent may make as many as its disk has inodes, and there are
other runs.
"""

_MAX_PATH, _MAX_FOLDERS = 1024, 64
"""Characters, and folders. Each pattern tries each folder of a path, and some read on from there to
its end; no repository has such a path, and an agent may make a hundred thousand of them.
"""

_UNREAD = "not looked at, the run changed so many files: it may be one that runs later"
_TOO_LONG = "its path is too long to be looked at: it may be one that runs later"
_BACKSLASH = "Windows takes the backslash for a folder's end: it may lead anywhere there"
_REPOSITORY = "git takes the folder for a repository, and obeys its config and hooks"

_SHORT = re.compile(r"(?:^|/)[^/.]{1,7}~[0-9]{1,6}(?:\.[^/]{0,3})?(?=/|\Z)")
_IS_SHORT = "Windows may take it for the short name of another: .claude is CLAUDE~1 there"


def host_files(changes: Changes, *, most: int | None = None) -> tuple[HostFile, ...]:
    """The files among the changes that run later, held ones first, each with its reason.

    `most`: so many changes are looked at; None is all. The others are held without a look, after
    those that were found: what nobody looked at must not pass for harmless.
    """
    repositories = frozenset(changes.repositories)
    looked = changes.items[:most]
    found = [file for change in looked if (file := classify(change, repositories)) is not None]
    unread = changes.items[len(looked) :]
    return (
        *sorted((file for file in found if file.held), key=lambda file: file.path),
        *(HostFile(path=change.path, why=_UNREAD, held=True) for change in unread),
        *sorted((file for file in found if not file.held), key=lambda file: file.path),
    )


def classify(change: Change, repositories: frozenset[str] = frozenset()) -> HostFile | None:
    """Whether one change is such a file; `repositories` are those of Changes."""
    if why := _unnamed(change.path, repositories):
        return HostFile(path=change.path, why=why, held=True)
    names = _names(change.path)
    if why := _by_name(names):
        return HostFile(path=change.path, why=why, held=True)
    if change.mode == _LINK:
        return HostFile(path=change.path, why="a link: what it leads to is elsewhere", held=True)
    for pattern, why in _ADVICE_COMPILED:
        if any(map(pattern.match, names)):
            return HostFile(path=change.path, why=why, held=False)
    if change.mode == _EXECUTABLE and change.old_mode != _EXECUTABLE:
        return HostFile(path=change.path, why="newly executable", held=False)
    return None


def _by_name(names: frozenset[str]) -> str:
    """Why a file of these names is held; empty when it is not."""
    for pattern, why in _HELD_COMPILED:
        if any(map(pattern.match, names)):
            return why
    # which name it is short for depends on what else lies there, so that none is looked up
    return _IS_SHORT if any("~" in name and _SHORT.search(name) for name in names) else ""


def _names(path: str) -> frozenset[str]:
    """What a path names, here and on the file systems that read it otherwise."""
    name = path
    if not path.isascii():
        # as those with casefold compare: decomposed, and a ligature is its letters
        name = unicodedata.normalize("NFD", _IGNORABLE.sub("", path)).casefold()
    # what follows a colon names a stream of the same file on NTFS (CVE-2019-1352), and elsewhere
    # is a part of the name. It goes first: what NTFS drops besides may stand before it
    return frozenset(map(_folded, (name, re.sub(r"(?<=[^/]):[^/]*(?=/|\Z)", "", name))))


def _folded(name: str) -> str:
    """As NTFS reads it: without trailing dots and spaces, and by its 8.3 name. No pattern looks for
    the end of dots: it would begin at each of them, and an agent has names of many.
    """
    name = "/".join(part.rstrip(" .") for part in name.split("/")) or name
    return re.sub(r"(?i)(^|/)git~[0-9]+(?=/|\Z)", r"\1.git", name)


def _unnamed(path: str, repositories: frozenset[str]) -> str:
    """Why it is held whatever its name says; empty when it is not."""
    if len(path) > _MAX_PATH or path.count("/") > _MAX_FOLDERS:
        return _TOO_LONG
    # whatever it would be called there: `.git\\config` is one, and `..\\x` lies outside
    if "\\" in path:
        return _BACKSLASH
    return _REPOSITORY if repositories and not repositories.isdisjoint(_above(path)) else ""


def _above(path: str) -> Iterator[str]:
    """The folders that a path lies in; the first is the workspace itself, which is empty."""
    yield ""
    for at, character in enumerate(path):
        if character == "/":
            yield path[:at]
