r"""What a shell command's text says, where the text can say it. PURE.

Advice, not a boundary: `python3 -c`, base64, a script written a moment ago or a variable say
nothing about what will run, and no reader of text can know. The sandbox is what holds. Two uses,
each with the error on the safe side: an approval needs a command that is understood whole; a
denial also takes whatever could be meant.

Understood is a list of simple commands of plain words, joined by `;`, `&&`, `||`, `|`, `&` or
newlines, any number of them, with no expansion but `*` and `?`, and no redirection but those to
/dev/null and between descriptors. Everything else is not: substitutions, variables, braces,
here-documents, keywords, functions, backslashes, brackets (`a[;]` is one word to bash).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase

MAX_LENGTH = 16_384
"""Characters; a longer command is not read (its cost would grow with its square)."""

_TOKEN = re.compile(
    r"""(?P<blank>[ \t]+)
    |(?P<harmless>(?:[0-9]?|&)>{1,2}[ \t]*/dev/null(?=[ \t\n;|&]|\Z)|[12]?>&[12](?=[ \t\n;|&]|\Z))
    |(?P<separator>&&|\|\||\|&|[;&|\n])
    |(?P<word>(?:[A-Za-z0-9_./,:=+@%^*?~-]|'[^']*'|"[^"$`\\!]*")+)""",
    re.VERBOSE,
)
_PIECE = re.compile(r"""'([^']*)'|"([^"]*)"|([^'"]+)""")
_KEYWORDS = frozenset(
    {
        *("if", "then", "else", "elif", "fi", "for", "while", "until", "do", "done", "case"),
        *("esac", "in", "function", "select", "time", "coproc", "[[", "!"),
    }
)
_NESTED = re.compile(r"[\s;|&$`]")
_ASSIGNMENT = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(?:\[[^=]*\])?\+?=.*", re.DOTALL)


@dataclass(frozen=True, kw_only=True, slots=True)
class Simple:
    """One simple command.

    Attributes:
        words: program and arguments, quotes taken off; assignments in front included.
        expands: whether a word holds an unquoted `*`, `?` or `~`.
    """

    words: tuple[str, ...]
    expands: bool = False

    @property
    def assigns(self) -> bool:
        """Whether it begins with an assignment, such as `LD_PRELOAD=x ls`."""
        return bool(_ASSIGNMENT.fullmatch(self.words[0]))


def understand(command: str) -> tuple[Simple, ...] | None:
    """The simple commands of `command`; None when it is not understood whole."""
    if len(command) > MAX_LENGTH:
        return None
    commands: list[Simple] = []
    words: list[str] = []
    expands = False
    position = 0
    while position < len(command):
        match = _TOKEN.match(command, position)
        if match is None:
            return None
        position = match.end()
        if match["word"]:
            words.append(_unquote(match["word"]))
            expands = expands or _expands(match["word"])
        elif match["separator"] and words:
            commands.append(Simple(words=tuple(words), expands=expands))
            words, expands = [], False
    if words:
        commands.append(Simple(words=tuple(words), expands=expands))
    if not commands or any(simple.words[0] in _KEYWORDS for simple in commands):
        return None
    return tuple(commands)


def approves(specifiers: tuple[str, ...], command: str) -> bool:
    """Whether every simple command of `command` is covered by one of `specifiers`.

    A command that is not understood, or assigns a variable, is never covered.
    """
    commands = understand(command)
    return commands is not None and all(
        not simple.assigns and any(_covers(text, simple.words) for text in specifiers)
        for simple in commands
    )


def denies(specifier: str, command: str, *, depth: int = 3) -> bool:
    """Whether `specifier` could mean any part of `command`.

    Wrappers (`env`, `timeout 5`, `sudo`, `xargs`, …) are seen through by trying the specifier at
    each word, and `sh -c '…'` by reading quoted text as a command. What is not understood is
    denied where the program's name stands in it as a word, quotes and backslashes taken off.
    """
    commands = understand(command)
    if commands is None or depth == 0:
        return _mentions(specifier, command)
    return any(_simple_denied(specifier, simple, depth) for simple in commands)


def _simple_denied(specifier: str, simple: Simple, depth: int) -> bool:
    program, *wanted = _words(specifier)
    names = [word.rpartition("/")[2] for word in simple.words]
    named = [index for index, name in enumerate(names) if fnmatchcase(name, program)]
    if simple.expands and fnmatchcase(program, names[0]):
        named.insert(0, 0)  # `cur?` may become the program
    # what follows a later mention follows the first one too
    if named and _in_order(wanted, simple.words[named[0] + 1 :]):
        return True
    nested = (word for word in simple.words if _NESTED.search(word))
    return _covers(specifier, simple.words) or any(
        denies(specifier, word, depth=depth - 1) for word in nested
    )


def _in_order(wanted: list[str], words: tuple[str, ...]) -> bool:
    """Whether the specifier's words occur in order: `git -C x push` is a `git push` too."""
    rest = iter(words)
    return all(any(fnmatchcase(word, pattern) for word in rest) for pattern in wanted)


def _mentions(specifier: str, command: str) -> bool:
    program = _words(specifier)[0]
    if re.search(r"[*?\[]", program):
        return True
    pattern = rf"(?<![A-Za-z0-9_.-]){re.escape(program)}(?![A-Za-z0-9_-])"
    bare = re.sub(r"""\\\n|['"\\]|\$(?=['"])""", "", command)
    return bool(re.search(pattern, bare) or re.search(pattern, command))


def _words(specifier: str) -> list[str]:
    """A specifier's words, the program without its directory, a star for the rest left out."""
    words = specifier.removesuffix(":*").replace('"', "").replace("'", "").split()
    while len(words) > 1 and words[-1] == "*":
        words.pop()
    first = words[0] if words else specifier
    return [first.rpartition("/")[2] or first, *words[1:]]


def _covers(specifier: str, words: tuple[str, ...]) -> bool:
    """Whether `git status:*`, `git *` or an exact `git status` describes these words."""
    text = " ".join(words)
    for ending in (":*", " *"):
        prefix = specifier.removesuffix(ending)
        if prefix != specifier and "*" not in prefix:
            return text == prefix or text.startswith(prefix + " ")
    if "*" not in specifier:
        return text == specifier
    # only the star is special in a specifier
    return fnmatchcase(text, specifier.replace("[", "[[]").replace("?", "[?]"))


def _unquote(word: str) -> str:
    return "".join("".join(groups) for groups in _PIECE.findall(word))


def _expands(word: str) -> bool:
    bare = "".join(groups[2] for groups in _PIECE.findall(word))
    return bool(re.search(r"[*?~]", bare))
