"""What an image is made of: package names and nothing else. PURE.

A name reaches apt, pip or npm as an argument, where a leading `-` is an option, `./x` and URLs are
other people's code, `name-` removes a package and `?pattern` takes many. So a name is what the
package system's own policy calls a name, with an exact version or none.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from ringfence.errors import CallerError
from ringfence.policy import yamldoc
from ringfence.policy.problems import PolicyInvalidError, Problem, dotted, show

RECIPE = 1
"""Counts up with every change of the builder that changes what the same definition gives."""

MAX_PACKAGES = 500

# Debian policy 5.6.1 and 5.6.12; a trailing `-` removes for apt, so a name never ends in one
_APT = re.compile(r"[a-z0-9][a-z0-9+.-]*[a-z0-9+](=[0-9][0-9A-Za-z.+~:-]*)?")
# PEP 508 names with extras; an exact PEP 440 version without a local part
_PIP = re.compile(
    r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?(?:\[[a-z0-9,_-]+\])?"
    r"(?:==[0-9]+(?:\.[0-9]+)*(?:(?:a|b|rc|\.post|\.dev)[0-9]+)*)?"
)
_NPM = re.compile(
    r"(?:@[a-z0-9][a-z0-9._-]*/)?[a-z0-9][a-z0-9._-]*"
    r"(?:@[0-9]+\.[0-9]+\.[0-9]+(?:-[0-9A-Za-z.-]+)?)?"
)


def _named(pattern: re.Pattern[str], example: str) -> Callable[[str], str]:
    def check(value: str) -> str:
        if len(value) > 128 or not pattern.fullmatch(value):
            raise ValueError(f"is no package name, such as {example}; no options, URLs or ranges")
        return value

    return check


AptName = Annotated[str, AfterValidator(_named(_APT, "git or git=1:2.39.5-0+deb12u2"))]
PipName = Annotated[str, AfterValidator(_named(_PIP, "anthropic or anthropic==0.70.0"))]
NpmName = Annotated[str, AfterValidator(_named(_NPM, "typescript or @scope/name@1.2.3"))]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Packages(_Frozen):
    """Names, each with an exact version or none; none takes what the index holds on that day."""

    apt: list[AptName] = Field(
        default_factory=list, max_length=MAX_PACKAGES, description="Debian packages."
    )
    pip: list[PipName] = Field(
        default_factory=list,
        max_length=MAX_PACKAGES,
        description="Python packages; wheels only, so that no code of theirs runs while it builds.",
    )
    npm: list[NpmName] = Field(
        default_factory=list,
        max_length=MAX_PACKAGES,
        description="Node packages, installed without their scripts; they bring nodejs along.",
    )

    @model_validator(mode="after")
    def _once(self) -> Packages:
        for kind, names in (("apt", self.apt), ("pip", self.pip), ("npm", self.npm)):
            bare = [bare_name(name) for name in names]
            twice = next((name for name in bare if bare.count(name) > 1), None)
            if twice is not None:
                raise ValueError(f"{kind} names {twice} twice; write it once")
        return self


class ImageDefinition(_Frozen):
    """An image as it is written.

    Attributes:
        source: `debian` takes packages from the mirrors that this host uses; `host` takes the
            files of packages that are installed on this host, and needs no mirror.
        suite: Debian suite; the host's own when it is not said. Not with `source: host`.
        claude: whether the claude binary stands at /opt/ringfence/bin/claude.
    """

    version: Literal[1] = Field(description="Version of this format.")
    source: Literal["debian", "host"] = Field(
        default="debian", description="The host's mirrors, or packages installed on the host."
    )
    suite: Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{1,30}$")] | None = Field(
        default=None, description="Debian suite, such as bookworm; the host's own by default."
    )
    packages: Packages = Field(default_factory=Packages, description="What is installed.")
    claude: bool = Field(default=True, description="Put the claude binary in.")

    @model_validator(mode="after")
    def _one_source(self) -> ImageDefinition:
        if self.source == "host" and self.suite is not None:
            raise ValueError("suite has no meaning with source: host; take it out")
        if self.source == "host" and any("=" in name for name in self.packages.apt):
            raise ValueError("source: host takes the installed version; take the =version out")
        return self

    def apt_names(self) -> list[str]:
        """Debian packages, with what the other kinds need to work; sorted."""
        names = {bare_name(name): name for name in self.packages.apt}
        needed = ["python3"]  # the builder's own compiler of modules is the image's Python
        needed += ["python3-pip"] if self.packages.pip else []
        needed += ["nodejs"] if self.packages.npm else []
        return sorted({**{name: name for name in needed}, **names}.values())


def bare_name(name: str) -> str:
    """The name without version and extras, in the form in which an index compares names."""
    scope, name = ("@", name[1:]) if name.startswith("@") else ("", name)
    return scope + re.split(r"[=@\[]", name, maxsplit=1)[0].lower().replace("_", "-")


def loads(text: str | bytes, *, source: str = "") -> ImageDefinition:
    """The definition that YAML or JSON `text`, known as `source`, says.

    Raises:
        CallerError: `image-invalid`, with every problem and its place.
    """
    try:
        parsed = yamldoc.parse_with_places(text)
    except PolicyInvalidError as error:
        raise _invalid(error.located({}, source).problems) from None
    try:
        return ImageDefinition.model_validate(parsed.value)
    except ValidationError as error:
        problems = (_problem(dict(item)) for item in error.errors(include_url=False))
        located = PolicyInvalidError(tuple(problems)).located(parsed.places, source)
        raise _invalid(located.problems) from None


def _problem(item: dict[str, Any]) -> Problem:
    message = str(item["msg"]).removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        message = "is no key of an image definition"
    value = item["input"] if isinstance(item["input"], str | int | bool) else None
    return Problem(
        path=dotted(item["loc"]), message=message, value="" if value is None else show(value)
    )


def _invalid(problems: tuple[Problem, ...]) -> CallerError:
    return CallerError(
        "image-invalid",
        "; ".join(problem.render() for problem in problems[:20]),
        hint="`ringfence image schema` prints what a definition may say",
    )


def schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a definition, for editors; names are checked by loading."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **ImageDefinition.model_json_schema(mode="validation"),
        "title": "ringfence image",
    }


def key_of(
    definition: ImageDefinition, *, suite: str, architecture: str, claude: str, installed: str = ""
) -> str:
    """Hex name of a build's inputs: equal inputs are built once.

    `installed` stands for the packages of the host, where they are the source. What an unpinned
    name stands for at a mirror on a given day is not among them: that is what a rebuild asks.
    """
    inputs = {
        "recipe": RECIPE,
        "source": definition.source,
        "suite": suite,
        "architecture": architecture,
        "claude": claude,
        "installed": installed,
        "apt": definition.apt_names(),
        "pip": sorted(definition.packages.pip),
        "npm": sorted(definition.packages.npm),
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
