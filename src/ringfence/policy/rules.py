"""Tool rules as text: `Bash`, `Bash(git status:*)`, `Edit(/workspace/docs/**)`. PURE.

A grant names a tool and nothing else. A rule of `deny` or `preapproved` may carry a specifier
that narrows it to some inputs; the grammar is the Agent SDK's, with its traps taken out: a
specifier that means "everything" is refused, and an absolute path is absolute.
"""

from __future__ import annotations

import difflib
import re
import string
from dataclasses import dataclass
from functools import lru_cache

from ringfence.policy.hosts import host_problem
from ringfence.policy.paths import normal
from ringfence.policy.tools import EDIT_TOOLS, KNOWN, Tool, canonical_tool, mcp_parts

_RULE = re.compile(r"(?P<name>[^()\s]+)(?:\((?P<specifier>.*)\))?", re.DOTALL)
_MAX_STARS = 8  # a glob becomes a regular expression; its cost grows with each star
SHELL_TOOLS = frozenset({"Bash", "PowerShell", "Monitor"})
"""Tools whose input is a shell command, under `command`."""
_PATH_TOOLS = frozenset({"Read", "Glob", "Grep", "LS", "NotebookRead"}) | EDIT_TOOLS


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """One parsed rule.

    Attributes:
        tool: canonical name of the tool, or `mcp__server__tool`.
        specifier: what narrows it; None for the whole tool. A path is kept as `//` and the
            absolute glob, which is the form that the SDK takes for absolute too.
    """

    tool: str
    specifier: str | None = None

    @property
    def text(self) -> str:
        """Canonical spelling."""
        return self.tool if self.specifier is None else f"{self.tool}({self.specifier})"


def grant_problem(text: str) -> str | None:
    """Why `text` cannot be granted, and what to write instead; None when it can."""
    if "*" in text:
        return "no wildcards in a grant, they would grant tools yet to come; name each tool"
    if "(" in text:
        name = text.partition("(")[0]
        return f"a grant names a tool; write {name} here and {text} under preapproved or deny"
    problem = _name_problem(text)
    tool = KNOWN.get(canonical_tool(text))
    if problem is None and tool is not None and tool.dangerous:
        return f"never granted: {tool.dangerous}"
    return problem


def rule_problem(text: str) -> str | None:
    """Why `text` is not a rule, and what to write instead; None when it is one."""
    match = _RULE.fullmatch(text)
    if match is None:
        return "write Tool or Tool(specifier)"
    name, specifier = match["name"], match["specifier"]
    if "*" in name:
        return "no wildcards in a tool's name: name each tool (what is not granted is denied)"
    problem = _name_problem(name)
    if problem or specifier is None:
        return problem
    return _specifier_problem(canonical_tool(name), specifier)


@lru_cache(maxsize=4096)
def parse_rule(text: str) -> Rule:
    """The rule that `text` says.

    Raises:
        ValueError: what `rule_problem` says.
    """
    problem = rule_problem(text)
    if problem:
        raise ValueError(problem)
    match = _RULE.fullmatch(text)
    assert match is not None  # noqa: S101  rule_problem has just matched it
    tool, specifier = canonical_tool(match["name"]), match["specifier"]
    if specifier is not None and tool in _PATH_TOOLS:
        specifier = "/" + _absolute_glob(specifier)
    return Rule(tool=tool, specifier=specifier)


def _name_problem(name: str) -> str | None:
    if canonical_tool(name) in KNOWN or mcp_parts(name):
        return None
    if name.startswith("mcp__"):
        return "write mcp__server__tool; a whole server would grant tools that it adds later"
    near = difflib.get_close_matches(name, KNOWN, n=1, cutoff=0.6)
    return "no tool of this name" + (f"; did you mean {near[0]}?" if near else "")


def _specifier_problem(tool: str, specifier: str) -> str | None:  # noqa: PLR0911  a ladder of refusals
    if _names_nothing(tool, specifier):
        return f"it narrows nothing; write {tool} to mean all of it"
    if not specifier.isprintable():
        return "holds a character that cannot be seen"
    if specifier.count("*") > _MAX_STARS or len(specifier) > 512:
        return f"at most {_MAX_STARS} stars and 512 characters"
    if tool in SHELL_TOOLS:
        return _command_problem(specifier)
    if tool in _PATH_TOOLS:
        return _place_problem(specifier)
    if tool == "WebFetch":
        kind, _, host = specifier.partition(":")
        if kind != "domain":
            return "write WebFetch(domain:host)"
        return host_problem(host)
    return f"{tool} takes no specifier; write {tool}"


def _names_nothing(tool: str, specifier: str) -> bool:
    """Whether it is made of wildcards and of what stands between them."""
    text = specifier
    if tool in _PATH_TOOLS and specifier.strip(_WILD):
        text = _absolute_glob(specifier)
    return not text.strip(_WILD)


_WILD = "*?:/.;'\"" + string.whitespace + "\u00a0"


def _command_problem(specifier: str) -> str | None:
    if specifier != specifier.strip():
        return "write it without blanks at the ends"
    if not specifier.isascii():
        # U+FF0A looks like a star, and a deny that holds it matches nothing
        return "holds letters that may look like others; write it in ASCII"
    return None


def _place_problem(specifier: str) -> str | None:
    if "/" not in specifier:
        # gitignore, and with it the Agent SDK, finds a bare name at any depth
        return f"at which depth? Write ./{specifier}, or **/{specifier} for all of them"
    if any(character in specifier for character in "{}") or specifier.startswith("!"):
        return "braces and ! are not read in a path; write one rule for each"
    return None


def approval_problem(text: str) -> str | None:
    """Why a rule cannot stand under `preapproved`; None when it can. A deny may be as wide as it
    likes, and an approval names its program.
    """
    rule = parse_rule(text)
    if rule.tool not in SHELL_TOOLS or rule.specifier is None:
        return None
    program = rule.specifier.removesuffix(":*").split()[0]
    if any(character in program for character in "*?["):
        return f"the wildcard in {program} approves programs yet to come; write their names"
    return None


def _absolute_glob(specifier: str) -> str:
    if specifier.startswith("//"):
        specifier = specifier[1:]
    return normal(specifier)


def tool_facts(name: str) -> Tool:
    """What a tool can do; an MCP tool is taken to do everything, an unknown one likewise."""
    known = KNOWN.get(canonical_tool(name))
    return known or Tool(name=name, runs_programs=True, network=True, writes=True)
