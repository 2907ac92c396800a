"""Which routes of the public API are served, and what the others answer.

`public_routes.json` lists what the official client calls, its administration apart; a test reads
the installed client and finds what a new version adds.
"""

from __future__ import annotations

import json
import re
from functools import cache
from importlib import resources

from fastapi import FastAPI

from ringfence.errors import CallerError


@cache
def public_routes() -> tuple[tuple[str, str], ...]:
    """Method and path template, sorted by path."""
    text = (resources.files("ringfence.gateway") / "public_routes.json").read_text()
    pairs = (line.split(" ", 1) for line in json.loads(text))
    return tuple((method, path) for method, path in pairs)


def served(app: FastAPI) -> frozenset[tuple[str, str]]:
    """Method and path template of every documented route of an application."""
    document = app.openapi()
    return frozenset(
        (method.upper(), path)
        for path, operations in document["paths"].items()
        for method in operations
    )


def refusal(method: str, path: str) -> CallerError:
    """What a request gets that no route takes."""
    for known, template in public_routes():
        if known == method and re.fullmatch(_pattern(template), path):
            return CallerError(
                "not-supported",
                f"{method} {template} is not supported by this version of ringfence",
                hint="docs/reference/api.md lists what is",
            )
    return CallerError("route-unknown", f"there is no {method} {path[:200]}")


@cache
def _pattern(template: str) -> str:
    return re.sub(r"\\\{[a-z_]+\\\}", "[^/]+", re.escape(template))
