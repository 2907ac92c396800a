"""Errors: four families, registered codes, exit status by family."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import ringfence
from ringfence.errors import (
    CODES,
    TIMEOUTS,
    AgentError,
    CallerError,
    DeniedError,
    RingfenceError,
    UnavailableError,
    words,
)

SOURCES = sorted(Path(ringfence.__file__).parent.rglob("*.py"))


def test_the_root_cannot_be_raised() -> None:
    with pytest.raises(TypeError):
        RingfenceError("usage", "x")


def test_an_unregistered_code_is_a_defect() -> None:
    with pytest.raises(LookupError):
        CallerError("no-such-code", "x")


@pytest.mark.parametrize(
    ("family", "status"),
    [(CallerError, 2), (DeniedError, 3), (UnavailableError, 4), (AgentError, 5)],
)
def test_exit_status_by_family(family: type[RingfenceError], status: int) -> None:
    assert family("usage", "x").status == status


def test_a_timeout_ends_as_timeout_does() -> None:
    assert {AgentError(code, "x").status for code in TIMEOUTS} == {124}


def _raised_codes() -> dict[str, str]:
    """Code to file, of every literal first argument of a family's constructor."""
    found = {}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in {"CallerError", "DeniedError", "UnavailableError", "AgentError"}
                and node.args
                and isinstance(node.args[0], ast.Constant)
            ):
                found[str(node.args[0].value)] = path.name
    return found


def test_every_raised_code_is_registered() -> None:
    assert {code for code in _raised_codes() if code not in CODES} == set()


def test_every_registered_code_is_used() -> None:
    text = "\n".join(path.read_text() for path in SOURCES if path.name != "errors.py")
    assert {code for code in CODES if f'"{code}"' not in text} == set()


def test_codes_are_kebab_case_and_explained() -> None:
    for code, sentence in CODES.items():
        assert re.fullmatch(r"[a-z]+(-[a-z0-9]+)*", code)
        assert sentence.endswith(".")


def test_a_fault_of_the_system_is_told_in_words() -> None:
    assert words(OSError(13, "Permission denied", "/x")) == "permission denied (/x)"
    assert words(OSError(28, "No space left on device")) == "no space left on device"
    assert words(ValueError("odd")) == "odd"
