"""What the egress process must have ready before it gives up its rights."""

from __future__ import annotations

import errno
import socket
import ssl
import subprocess
import sys

import pytest

from ringfence.egress.faults import unforeseen

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


TLS = ssl.SSLCertVerificationError(1, "[SSL] sk-value is not valid for 'a.host'")
TLS.reason = "CERTIFICATE_VERIFY_FAILED"


@pytest.mark.parametrize(
    ("error", "message", "hint"),
    [
        (OSError(errno.ENOSPC, "x", "/a/sk-value"), "no space left on device", "disk"),
        (PermissionError(errno.EACCES, "sk-value"), "permission denied", "state directory"),
        (ConnectionRefusedError(errno.ECONNREFUSED, "sk-value"), "connection refused", "are up"),
        (OSError(errno.ENETUNREACH, "sk-value"), "network is unreachable", "routes"),
        (OSError(errno.EMFILE, "sk-value"), "too many open files", "ulimit -n"),
        (OSError(errno.ENOTTY, "sk-value"), "inappropriate ioctl", "log"),
        (socket.gaierror(socket.EAI_NONAME, "sk-value"), "name was not resolved", "resolv.conf"),
        (TLS, "TLS failed: certificate verify failed", "SSL_CERT_FILE"),
        (ssl.SSLError("sk-value"), "TLS failed", "certificate"),
        (TimeoutError("sk-value"), "nobody answered in time", "routes"),
    ],
)
def test_a_fault_of_the_system_is_named_with_what_to_do(
    error: Exception, message: str, hint: str
) -> None:
    told = unforeseen(error)
    assert told.message.startswith("egress: ")
    assert message in told.message
    assert hint in told.hint
    assert "sk-value" not in told.message + told.hint


@pytest.mark.parametrize("reason", ["sk-value", "SK VALUE", None, 7])
def test_a_reason_that_openssl_did_not_give_is_not_told(reason: object) -> None:
    error = ssl.SSLError(1, "x")
    error.reason = reason  # type: ignore[assignment]
    assert unforeseen(error).message == "egress: TLS failed"


def test_a_real_handshake_with_who_speaks_no_tls_is_told() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"220 no TLS here\r\n" * 20)
        with pytest.raises(ssl.SSLError) as caught:
            ssl.create_default_context().wrap_socket(ours, server_hostname="a.test")
    assert unforeseen(caught.value).message.startswith("egress: TLS failed: ")


def test_a_defect_is_not_told() -> None:
    assert unforeseen(ValueError("sk-value")).message == "ValueError in egress"
    assert unforeseen(OSError("sk-value")).message == "OSError in egress"
