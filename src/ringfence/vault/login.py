"""The port of logins: what a cloud's provider of models is asked with, had anew before it ends.

Logins run in the keeper, as sources do. What they give is a JSON object: of AWS `key`, `secret` and
`token`, of Google `token` and, where it is known, `project`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ringfence.config.providers import AwsLogin, GoogleLogin
from ringfence.vault.source import Resolved


@dataclass(frozen=True, kw_only=True, slots=True)
class LoginOrder:
    """One login of the settings. value: reads the credential that it names, from wherever the
    settings place it. Raises UnavailableError as a source does.
    """

    kind: str
    login: AwsLogin | GoogleLogin
    region: str
    timeout: float
    value: Callable[[], bytes]


class Login(Protocol):
    """One of them, made."""

    def resolve(self) -> Resolved:
        """What to ask the provider with now. Raises UnavailableError as a source does."""

    def close(self) -> None:
        """Raises nothing."""


LoginFactory = Callable[[LoginOrder], Login]


def order(told: Mapping[str, Any], timeout: float, value: Callable[[], bytes]) -> LoginOrder:
    """As `Configure.logins` has it."""
    kind = str(told["kind"])
    shape: type[AwsLogin | GoogleLogin] = AwsLogin if kind == "aws" else GoogleLogin
    login = shape.model_validate(told["login"])
    return LoginOrder(
        kind=kind, login=login, region=str(told["region"]), timeout=timeout, value=value
    )


def bases(logins: Mapping[str, Any]) -> frozenset[str]:
    """Credentials that the logins of `Configure.logins` begin with. They are for the keeper alone:
    each lasts longer than all that is made of it, and egress parses what hostile programs send.
    """
    found = (one["login"].get("credential") for one in logins.values())
    return frozenset(str(name) for name in found if name)


def packed(fields: Mapping[str, str]) -> bytes:
    """As it goes to egress: printable ASCII without spaces, like every value."""
    return json.dumps(dict(fields), separators=(",", ":")).encode()
