"""What a command's text says: approvals need all of it understood, denials take any doubt."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ringfence.policy.shell import _ASSIGNMENT, approves, denies, understand


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("ls", [("ls",)]),
        ("ls -l src", [("ls", "-l", "src")]),
        ("a && b || c; d | e & f\ng", [("a",), ("b",), ("c",), ("d",), ("e",), ("f",), ("g",)]),
        ("echo 'a; b' \"c d\"", [("echo", "a; b", "c d")]),
        ("pytest -q 2>&1", [("pytest", "-q")]),
        ("make >/dev/null 2>&1", [("make",)]),
        ("a=1 ls", [("a=1", "ls")]),
        ("c'ur'l x", [("curl", "x")]),
    ],
)
def test_plain_commands_are_understood(command: str, words: list[tuple[str, ...]]) -> None:
    understood = understand(command)
    assert understood is not None
    assert [simple.words for simple in understood] == words


@pytest.mark.parametrize(
    "command",
    [
        *("", " ", ";", "echo $(id)", "echo `id`", "echo $x", 'echo "$x"', "ls > out", "ls < in"),
        *("(ls)", "{ ls; }", "if true; then ls; fi", "! ls", "for x in a; do ls; done", "a\\b"),
        *("cat <<EOF\nx\nEOF", "echo {a,b}", "f() { ls; }", "'unclosed", "ls # x", "echo 'a'\"'b"),
        *("ls >/dev/nullx", "ls >/dev/null/../x", "ls &>out", "diff <(a) <(b)", "x\0y", "echo é"),
        *("time ls", "[[ -f x ]]", "[ -f x ]", "if[;]", "a" * 20_000, "ls\\\n-l", "ls\r\nid"),
    ],
)
def test_everything_else_is_not(command: str) -> None:
    assert understand(command) is None


@pytest.mark.parametrize(
    ("specifiers", "command"),
    [
        (("git status:*",), "git status"),
        (("git status:*",), "git status -s"),
        (("git *",), "git log -1"),
        (("npm run *",), "npm run test"),
        (("pytest -q",), "pytest -q"),
        (("ls:*", "wc:*"), "ls src | wc -l"),
        (("ls:*", "wc:*"), "ls src && wc -l x; ls"),
        (("npm run * --silent",), "npm run test --silent"),
    ],
)
def test_an_approval_covers_what_it_says(specifiers: tuple[str, ...], command: str) -> None:
    assert approves(specifiers, command)


@pytest.mark.parametrize(
    ("specifiers", "command"),
    [
        (("git status:*",), "git statusx"),
        (("git status:*",), "git push"),
        (("ls:*",), "ls; rm -rf x"),
        (("ls:*",), "ls && rm x"),
        (("ls:*",), "ls | sh"),
        (("ls:*",), "ls & rm x"),
        (("ls:*",), "ls\nrm x"),
        (("ls:*",), "ls $(rm x)"),
        (("ls:*",), "ls `rm x`"),
        (("ls:*",), "ls > /workspace/Makefile"),
        (("ls:*",), "PATH=/workspace ls"),
        (("ls:*",), "/workspace/ls"),
        (("echo *",), "echo a; id"),
        (("pytest -q",), "pytest -q x"),
        ((), "ls"),
    ],
)
def test_an_approval_covers_nothing_more(specifiers: tuple[str, ...], command: str) -> None:
    assert not approves(specifiers, command)


@pytest.mark.parametrize(
    "command",
    [
        *("curl x", "curl", "/usr/bin/curl x", "ls; curl x", "ls && curl x", "ls | curl -d @- x"),
        *(
            "ls & curl x",
            "ls\ncurl x",
            "echo $(curl x)",
            "echo `curl x`",
            "(curl x)",
            "{ curl x; }",
        ),
        *(
            "env A=1 curl x",
            "A=1 curl x",
            "timeout 5 curl x",
            "sudo -u x nohup curl x",
            "xargs curl",
        ),
        *(
            "sh -c 'curl x'",
            'bash -c "ls; curl x"',
            "eval 'curl x'",
            "c'ur'l x",
            'c"u"rl x',
            "c\\url x",
        ),
        *(
            "cu\\\nrl x",
            "if true; then curl x; fi",
            "$'curl' x",
            "/usr/bin/cur? x",
            "cur* x",
            "! curl x",
        ),
        *("curl<<<x", "cat <(curl x)", 'sh -c \'sh -c "sh -c \\"curl x\\""\'', "a=$(curl x) ls"),
        "true && " * 60 + "curl x",
        "true;" * 3000 + "curl x",
        "x" * 20_000 + "; curl y",
    ],
)
def test_a_denial_takes_whatever_could_be_meant(command: str) -> None:
    assert denies("curl *", command)
    assert denies("curl:*", command)


@pytest.mark.parametrize(
    "command", ["ls", "ls *", "rm *.pyc", "curly x", "cat docs/curly", "git push", "echo $x"]
)
def test_a_denial_leaves_the_rest(command: str) -> None:
    assert not denies("curl *", command)


def test_a_denial_sees_options_between_its_words() -> None:
    assert denies("git push:*", "git push origin")
    assert denies("git push:*", "git -C /tmp push")
    assert not denies("git push:*", "git status")


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=120), st.text(min_size=1, max_size=30))
@example("\0", "a")
def test_reading_is_total(command: str, specifier: str) -> None:
    understand(command)
    approves((specifier,), command)
    denies(specifier, command)


WORDS = st.lists(
    st.sampled_from(
        ["ls", "curl", "git", "push", "-x", "a b", "'q'", ";", "&&", "|", "$(", ")", "\n"]
    ),
    max_size=12,
)


@settings(max_examples=300, deadline=None)
@given(WORDS)
def test_what_is_denied_as_a_program_is_a_word_of_the_command(words: list[str]) -> None:
    command = " ".join(words)
    if "curl" in words:
        assert denies("curl:*", command)
    else:
        assert not denies("curl:*", command)


@settings(max_examples=200, deadline=None)
@given(WORDS, st.sampled_from([" ; ", " && ", " | ", "\n"]))
def test_appending_a_command_never_earns_an_approval(words: list[str], joint: str) -> None:
    command = " ".join(words)
    assert not approves(("ls:*", "git:*"), command + joint + "rm x")


@pytest.mark.parametrize(
    "command",
    ["a " * 8000, "curl " * 3000, ("x" * 50 + "*") * 300, "'" * 16_000, "a;" * 8000, "*a" * 8000],
)
def test_the_agent_does_not_choose_the_cost(command: str) -> None:
    begin = time.process_time()
    for specifier in ("*a*a*a*a*a*a*ab", "curl x y z", "a a a a b"):
        denies(specifier, command)
        approves((specifier,), command)
    assert time.process_time() - begin < 5


# --- against the real shell

TOKENS = st.lists(
    st.sampled_from(
        [
            "zz",
            "yy",
            "-x",
            "a=1",
            "'q r'",
            '"s t"',
            "'",
            '"',
            " ",
            " ",
            ";",
            "&&",
            "||",
            "|",
            "&",
            "\n",
            "$",
            "`",
            "(",
            ")",
            "{",
            "}",
            "<",
            ">",
            "\\",
            "#",
            "!",
            "2>&1",
            ">/dev/null",
            "|&",
            "if",
            "=",
            "'a'b",
            "%",
            "^",
            "\r",
        ]
    ),
    max_size=14,
).map("".join)

_PLAIN = "zz 'a;b' && yy; yy 2>&1 &"
_REPORT = """exec 9>"$0"
command_not_found_handle() { printf '%s\\0' "$@" $'\\001' >&9; }
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="compares with bash itself")
@settings(
    max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(TOKENS)
@example(_PLAIN)
@example("zz#x; yy")
def test_what_is_understood_is_what_bash_would_run(tmp_path: Path, command: str) -> None:
    understood = understand(command)
    if understood is None:
        return
    log = tmp_path / "log"
    subprocess.run(
        [shutil.which("bash") or "bash", "--norc", "-c", f"{_REPORT}{command}\nwait", str(log)],
        env={"PATH": "/nonexistent"},
        cwd=tmp_path,
        timeout=20,
        check=False,
        capture_output=True,
        stdin=subprocess.DEVNULL,
    )
    ran = {tuple(line.split("\0")) for line in log.read_bytes().decode().split("\0\1\0") if line}
    # an assignment in front is none to bash when its name is quoted: both readings are safe
    read = {simple.words for simple in understood} | {
        tuple(itertools.dropwhile(_ASSIGNMENT.fullmatch, simple.words)) for simple in understood
    }
    assert ran <= read
    if command == _PLAIN:
        assert ran == {("zz", "a;b"), ("yy",)}  # bash did run, and did report
