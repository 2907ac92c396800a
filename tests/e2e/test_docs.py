"""The documents are true: the tutorial runs, the reference is what the code says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def _blocks(text: str) -> list[str]:
    return [m[2] for m in re.finditer(r"^(`{3,})sh\n(.*?)\n\1$", text, re.DOTALL | re.MULTILINE)]


def test_the_tutorial_runs(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "tutorial.md").read_text()
    (tmp_path / "policy.yaml").write_text(
        re.search(r"^```yaml\n# policy.yaml\n(.*?)^```", text, re.DOTALL | re.MULTILINE)[1]
    )
    port = str(20000 + os.getpid() % 20000)
    script = "\n".join(
        ["set -eu", "trap 'kill $(jobs -p) 2>/dev/null || true' EXIT", *_blocks(text)]
    )
    binaries = tmp_path / "bin"
    binaries.mkdir()
    (binaries / "ringfence").write_text(f'#!/bin/sh\nexec {sys.executable} -m ringfence "$@"\n')
    (binaries / "ringfence").chmod(0o755)
    done = subprocess.run(
        ["bash", "-c", script.replace("8787", port)],
        cwd=tmp_path,
        env={
            "PATH": f"{binaries}:/usr/bin:/bin",
            "HOME": str(tmp_path),
            "RINGFENCE_STATE_DIR": str(tmp_path / "state"),
        },
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "do-not-look" not in done.stdout + done.stderr
    assert "post-checkout" in done.stdout


def test_every_link_of_the_documents_leads_somewhere() -> None:
    for page in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_readme_names_real_commands() -> None:
    help_text = (ROOT / "docs" / "reference" / "cli.md").read_text()
    for group, command in re.findall(
        r"ringfence (\w+)(?: (\w+))?", (ROOT / "README.md").read_text()
    ):
        if group in {
            "run",
            "exec",
            "demo",
            "policy",
            "audit",
            "vault",
            "patch",
            "sessions",
            "simulator",
        }:
            assert f"## `ringfence {group}" in help_text
            if group in {"policy", "audit", "vault", "patch"} and command:
                assert f"## `ringfence {group} {command}`" in help_text, (group, command)


def test_the_reference_is_what_the_code_says() -> None:
    done = subprocess.run(
        [sys.executable, "docs/generate.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
