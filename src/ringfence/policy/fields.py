"""What the fields of a policy may hold: names, hosts, paths, rules. PURE.

Validators for pydantic: each returns the value as it is kept, or raises ValueError with what to
write.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, StringConstraints

from ringfence.policy import headers, hosts, paths, rules
from ringfence.policy.tools import canonical_tool

Method = Literal["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]


def _sequence(value: object) -> object:
    # a set would load too, in another order at each start: another digest for the same policy
    if not isinstance(value, (list, tuple)):
        raise ValueError("write a list")  # noqa: TRY004  pydantic reads ValueError
    return value


def whole(value: object) -> object:
    """A whole number, and nothing that Python holds equal to one."""
    # Python holds True and 1.0 equal to 1, and a Literal compares
    if type(value) is not int:
        raise ValueError("write a whole number")
    return value


T = TypeVar("T")
Items = Annotated[tuple[T, ...], Field(strict=False), BeforeValidator(_sequence)]


def refuse(problem: str | None) -> None:
    """Raise ValueError with a problem, if there is one."""
    if problem:
        raise ValueError(problem)


def _host(text: str) -> str:
    refuse(hosts.host_problem(text))
    return text


def exact_host(text: str) -> str:
    """The host of a secret: no wildcard, not the model's own."""
    refuse(hosts.host_problem(text, wildcards=False))
    if text == hosts.MODEL_HOST:
        raise ValueError("the model route's credential is the operator's setting, not a secret")
    return text


def readable(path: str) -> str:
    """A path that is shown inside."""
    refuse(paths.shown_problem(path, writable=False))
    return path


def writable(path: str) -> str:
    """A path that is shown inside, writable."""
    refuse(paths.shown_problem(path, writable=True))
    return path


def blocked(path: str) -> str:
    """A path that is absent inside."""
    refuse(paths.path_problem(path))
    # programs inside run from the host's /usr: a line that cannot hold must not load
    if path in {"/", paths.WORKSPACE, *paths.PROGRAMS}:
        raise ValueError("nothing could run; name what is to be absent below it")
    return path


def glob(pattern: str) -> str:
    """A pattern of hidden files."""
    refuse(paths.glob_problem(pattern))
    return pattern


def grant(text: str) -> str:
    """A tool, by its canonical name."""
    refuse(rules.grant_problem(text))
    return canonical_tool(text)


def rule(text: str) -> str:
    """A rule of a tool, as it is written back."""
    return rules.parse_rule(text).text


def approval(text: str) -> str:
    """A rule of calls that ask a person."""
    text = rule(text)
    refuse(rules.approval_problem(text))
    return text


def _header(name: str) -> str:
    refuse(headers.grant_problem(name))
    return name


def url_path(path: str) -> str:
    """A path of a URL, or all below it."""
    stem = path.removesuffix("/**")
    if not path.startswith("/"):
        raise ValueError("write an absolute path of the host, such as /v1/items or /v1/**")
    if "*" in stem or not re.fullmatch(r"[A-Za-z0-9/._~!$&'()+,;=:@-]*", stem):
        raise ValueError(
            "write it un-encoded and without a query; the only wildcard is /** at the end"
        )
    if "//" in path or any(part in {".", ".."} for part in stem.split("/")):
        raise ValueError("write it without empty, `.` or `..` parts")
    return path


Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9](?:[a-z0-9_-]{0,62}[a-z0-9])?$")]
ServerName = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z0-9-]{1,32}(?:_[A-Za-z0-9-]{1,32}){0,3}$")
]
ModelName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:@/-]{0,127}$")]
Region = Annotated[str, StringConstraints(pattern=r"^[a-z]+(?:-[a-z0-9]+){0,4}$")]
Beta = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9.-]{0,63}$")]
Host = Annotated[str, AfterValidator(_host)]
HeaderName = Annotated[
    str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{0,63}$"), AfterValidator(_header)
]
Port = Annotated[int, Field(ge=1, le=65535)]
Positive = Annotated[float, Field(gt=0, le=1_000_000, allow_inf_nan=False)]
ImageName = Annotated[
    str, StringConstraints(pattern=r"^(?:[a-z0-9][a-z0-9._-]{0,62}|sha256:[0-9a-f]{64})$")
]
Text = Annotated[str, StringConstraints(max_length=4096, pattern=r"^[^\x00-\x08\x0a-\x1f\x7f]*$")]
