"""`ringfence vault` through typer: values come from a prompt or standard input, and never back."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner, Result

from ringfence.cli import vault
from ringfence.vault.keys import VaultPaths
from ringfence.vault.open import open_vault

CANARY = "sk-CANARY-vault-cli-0123456789"


def invoke(place: Path, *arguments: str, stdin: bytes = b"") -> Result:
    state = SimpleNamespace(state_dir=place / "state")
    return CliRunner().invoke(vault.app, list(arguments), obj=state, input=stdin)


def value(place: Path, name: str) -> str:
    paths = VaultPaths(place / "state")
    return open_vault(paths.store, paths.key).get(name).reveal()


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n", b" \n\n"])
def test_a_line_end_is_no_part_of_a_value(tmp_path: Path, end: bytes) -> None:
    done = invoke(tmp_path, "set", "gh", stdin=CANARY.encode() + end)
    assert done.exit_code == 0, done.output
    assert CANARY not in done.output
    assert value(tmp_path, "gh") == CANARY


@pytest.mark.parametrize(
    "stdin",
    [b"", b"\n", b"short", f"{CANARY}\n{CANARY}\n".encode(), b"\xff" * 20, b"a" * 100_000, b"sk \x00 0123456"],
    ids=["nothing", "blank", "short", "two lines", "no text", "huge", "blanks"],
)  # fmt: skip
def test_what_is_no_value_is_refused_and_makes_nothing(tmp_path: Path, stdin: bytes) -> None:
    done = invoke(tmp_path, "set", "gh", stdin=stdin)
    assert done.exit_code == 2
    assert "credential-value" in done.output
    assert CANARY not in done.output
    assert not (tmp_path / "state").exists()


def test_a_value_on_the_command_line_is_refused_and_not_repeated(tmp_path: Path) -> None:
    for arguments in (("gh", CANARY), (CANARY,), ("gh", "--host", "a.example.com", CANARY)):
        done = invoke(tmp_path, "set", *arguments, stdin=CANARY.encode())
        assert done.exit_code == 2
        assert CANARY not in done.output
    assert not (tmp_path / "state").exists()


def test_a_prompt_that_is_left_is_no_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def left(_: str) -> str:
        raise EOFError

    monkeypatch.setattr("getpass.getpass", left)
    monkeypatch.setattr(vault, "sys", SimpleNamespace(stdin=SimpleNamespace(isatty=lambda: True)))
    done = invoke(tmp_path, "set", "gh")
    assert (done.exit_code, "credential-value" in done.output) == (2, True)


def test_lists_and_files_show_no_value(tmp_path: Path) -> None:
    invoke(tmp_path, "set", "gh", "--host", "api.github.com", stdin=CANARY.encode())
    for arguments in (("list",), ("list", "--json")):
        done = invoke(tmp_path, *arguments)
        assert "api.github.com" in done.output
        assert CANARY not in done.output
    for path in (tmp_path / "state").rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path
        assert path.is_dir() or CANARY.encode() not in path.read_bytes()
    (row,) = json.loads(invoke(tmp_path, "list", "--json").output)
    assert (row["name"], row["hosts"]) == ("gh", ["api.github.com"])
    assert invoke(tmp_path, "remove", "gh").exit_code == 0
    assert json.loads(invoke(tmp_path, "list", "--json").output) == []
    assert invoke(tmp_path, "remove", "gh").exit_code == 2
