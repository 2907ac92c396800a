"""Pages of the documentation as a reader follows them: their command blocks, played in order.

A block with `<!-- not run: REASON -->` in the line above it is shown and not played.
"""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from harness import Box

ROOT = Path(__file__).parents[2]
HOW_TO = ROOT / "docs" / "how-to"
_BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<why>[^>\n]+) -->\n)?(?P<fence>`{3,})(?P<language>\w+)\n(?P<text>.*?)\n(?P=fence)$",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """why: it is not played, if it is not."""

    page: Path
    language: str
    text: str
    why: str = ""


def blocks(page: Path, *languages: str) -> list[Block]:
    """In the order of the page."""
    found = (match.groupdict() for match in _BLOCK.finditer(page.read_text()))
    return [
        Block(page, one["language"], one["text"], one["why"] or "")
        for one in found
        if one["language"] in languages
    ]


def played(page: Path, language: str) -> list[Block]:
    return [block for block in blocks(page, language) if not block.why]


def write_files(page: Path, place: Path) -> None:
    """The YAML blocks that begin with the name of a file, the first of each name."""
    for block in blocks(page, "yaml"):
        name = re.match(r"# ([\w-]+\.yaml)\b", block.text)
        if name and not (place / name[1]).exists():
            (place / name[1]).write_text(block.text + "\n")


@dataclass
class Console:
    """A terminal in which `$ ` lines are typed, and what comes is compared with the lines below.

    `…` in a page stands for anything: within a line, and alone on one for any lines. `pip` is not
    run: what it would install is there. A command that serves goes on until the console closes.
    """

    box: Box
    swaps: dict[str, str] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    port: int = 0
    _serving: list[subprocess.Popen[str]] = field(default_factory=list)
    _number: int = 0

    def play(self, block: Block) -> str:
        """All its commands; what they said on standard output."""
        said = []
        for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
            command, _, expected = part.partition("\n")
            for old, new in self.swaps.items():
                command, expected = command.replace(old, new), expected.replace(old, new)
            if command.startswith("pip "):
                continue
            if command.startswith("export "):
                name, _, value = command.split("#")[0][7:].strip().partition("=")
                self.settings.setdefault(name, value)
                continue
            said.append(self._typed(command, expected))
        return "".join(said)

    def _typed(self, command: str, expected: str) -> str:
        serves = re.match(r"ringfence (up|serve) ", command) is not None
        self._number += 1
        out, err = (self.box.place / f"console-{self._number}.{one}" for one in ("out", "err"))
        with out.open("w") as to, err.open("w") as errors:
            process = subprocess.Popen(
                ["bash", "-c", f"{'exec ' if serves else ''}{command}"],
                cwd=self.box.place,
                env=self.box.environment | self.settings,
                stdin=subprocess.DEVNULL,
                stdout=to,
                stderr=errors,
                text=True,
            )
        if serves:
            self._serving.append(process)
            _until(lambda: fits(expected, out.read_text()) or process.poll() is not None)
        else:
            code = process.wait(240)
            assert code == 0, f"{command}: {code}\n{out.read_text()}{err.read_text()}"
        text = out.read_text()
        # a terminal shows both, and what is said first is the id that the rest is about
        shown = (text, err.read_text() + text)
        assert any(fits(expected, one) for one in shown), (
            f"{command}\n{text}\nbut the page says\n{expected}"
        )
        return text

    def close(self) -> None:
        """Ends what serves, as Ctrl-C does."""
        for process in self._serving:
            process.terminate()
        codes = [process.wait(120) for process in self._serving]
        self._serving.clear()
        assert not any(codes), codes


@contextmanager
def console(box: Box) -> Iterator[Console]:
    """On a free port in place of 8470, and with the policy of the box in place of `--preset ci`:
    what an ordinary user's host cannot enforce has to be accepted by name.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    policy = box.policy({"preset": "ci"})
    made = Console(box, {"--preset ci": f"--policy {policy}", "8470": str(port)}, port=port)
    made.settings["RINGFENCE_GATEWAY__PORT"] = str(port)
    made.settings["PATH"] = f"{_program(box.place)}:{box.environment['PATH']}"
    made.settings["RINGFENCE_URL"] = f"http://127.0.0.1:{port}"
    try:
        yield made
    finally:
        made.close()


def _program(place: Path) -> Path:
    """A directory with the command, as it is installed."""
    folder = place / "bin"
    folder.mkdir()
    (folder / "ringfence").write_text(f'#!/bin/sh\nexec {sys.executable} -m ringfence "$@"\n')
    (folder / "ringfence").chmod(0o755)
    return folder


def fits(expected: str, said: str) -> bool:
    """Whether what was said is what a page shows; a page that shows nothing says nothing of it."""
    lines = [line.rstrip() for line in expected.splitlines() if line.strip()]
    if not lines:
        return True
    pattern = "".join(r"(?:.*\n)*?" if line == "…" else _line(line) + r"\s*\n" for line in lines)
    return re.fullmatch(pattern, said if said.endswith("\n") else f"{said}\n") is not None


def _line(line: str) -> str:
    """Columns may be wider than a page shows them."""
    words = [".*".join(map(re.escape, word.split("…"))) for word in line.split()]
    return r"\s*" + r"\s+".join(words)


def _until(condition: object, seconds: float = 120) -> None:
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
