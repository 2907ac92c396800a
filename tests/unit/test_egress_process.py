"""What the egress process must have ready before it gives up its rights."""

from __future__ import annotations

import errno
import subprocess
import sys

from ringfence.egress import process

SCRIPT = """
import ssl, sys
from ringfence.egress import process
if "preload" in sys.argv:
    process.preload()
sys.meta_path.clear()  # from here on nothing can be imported, as under a uid that may not read
sys.path_importer_cache.clear()
context = ssl.create_default_context()
context.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_hostname="api.anthropic.com")
"""


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=30,
    )


def test_a_handshake_needs_no_import_after_preload() -> None:
    assert _run("preload").returncode == 0


def test_without_it_the_handshake_fails() -> None:
    done = _run()
    assert done.returncode != 0
    assert "idna" in done.stderr


def test_a_fault_of_the_system_is_named_and_a_defect_is_not_told() -> None:
    full = process._unforeseen(OSError(errno.ENOSPC, "x", "/a/secret/path"))
    assert full.message == "egress: no space left on device"
    assert "disk" in full.hint
    assert process._unforeseen(ValueError("sk-value")).message == "ValueError in egress"
    assert process._unforeseen(OSError("sk-value")).message == "OSError in egress"
