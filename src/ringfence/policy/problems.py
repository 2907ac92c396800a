"""Why a policy does not load: every reason at once, each with its place. PURE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, NoReturn

from ringfence.errors import CallerError

_SHOWN = 80  # characters of an offending value that an error repeats
_LISTED = 20  # problems that the one-line message repeats; `problems` holds all


class Place(NamedTuple):
    """Line and column in a policy's text, both counted from 1."""

    line: int
    column: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One reason why a policy does not load.

    Attributes:
        path: dotted path of the line, such as `network.allowed_hosts[0]`; empty for text that is
            not YAML.
        message: what is wrong and what to write instead, on one line.
        value: the offending value in printable ASCII, shortened; empty when there is none.
        place: where it stands; None for a mapping, and for what stands nowhere.
        source: name of the file; empty when there is none.
    """

    path: str = ""
    message: str
    value: str = ""
    place: Place | None = None
    source: str = ""

    def render(self) -> str:
        """One line: `source:line:column: path: value: message`."""
        where = [self.source] if self.source else []
        where += [str(number) for number in self.place or ()]
        head = f"{':'.join(where)}: " if where else ""
        shown = f" {self.value}:" if self.value else ""
        return f"{head}{self.path}:{shown} {self.message}" if self.path else head + self.message

    def to_json(self) -> dict[str, object]:
        """Shape of a problem in JSON output; `line` and `column` are null without a place."""
        line, column = self.place or (None, None)
        return {
            "path": self.path,
            "value": self.value,
            "message": self.message,
            "file": self.source,
            "line": line,
            "column": column,
        }


class PolicyInvalidError(CallerError):
    """`policy-invalid`, with every problem and not only the first."""

    def __init__(self, problems: tuple[Problem, ...]) -> None:
        self.problems = problems
        lines = "; ".join(problem.render() for problem in problems[:_LISTED])
        if len(problems) > _LISTED:
            lines += f"; and {len(problems) - _LISTED} more"
        count = f"{len(problems)} problems: " if len(problems) > 1 else ""
        super().__init__(
            "policy-invalid",
            f"{count}{lines}",
            hint="`ringfence policy schema` prints every key; `ringfence policy lint FILE` checks",
        )

    def located(self, places: Mapping[str, Place], source: str) -> PolicyInvalidError:
        """The same problems, each with the place of its line in the file `source`.

        A line that does not stand there (a key that is missing) has the place of the nearest
        section around it.
        """
        return PolicyInvalidError(
            tuple(
                replace(
                    problem,
                    source=source,
                    place=problem.place or place_of(problem.path, places),
                )
                for problem in self.problems
            )
        )


def place_of(path: str, places: Mapping[str, Place]) -> Place | None:
    """Where the line of a dotted path stands, or the nearest section around it; else None."""
    while path and path not in places:
        path = path[: max(path.rfind("."), path.rfind("["), 0)]
    return places.get(path)


def refuse(path: str, message: str, value: object = "") -> NoReturn:
    """Raise PolicyInvalidError for one problem."""
    raise PolicyInvalidError((Problem(path=path, message=message, value=show(value)),))


def show(value: object) -> str:
    """A value as an error repeats it: printable ASCII, one line, shortened."""
    if value == "":
        return ""
    try:
        text = ascii(value)
    except RecursionError:
        return "(nested too deeply)"
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def dotted(location: Sequence[int | str]) -> str:
    """`("network", "allowed_hosts", 0)` as `network.allowed_hosts[0]`."""
    text = ""
    for part in location:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part != "[key]":
            name = part if part.isidentifier() or part.replace("-", "").isalnum() else ascii(part)
            text += f".{name}" if text else name
    return text
