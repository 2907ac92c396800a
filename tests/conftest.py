"""What every test needs: a scrubbed environment, and the marks that say who may run it."""

from __future__ import annotations

import os
import signal

import pytest
from hypothesis import HealthCheck, settings

pytest.register_assert_rewrite("ringfence.testing")

# a shell has Ctrl-C ignored by what it starts in the background (POSIX, `&`), and what the tests
# start would inherit that
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# no example database: the checkout may belong to another user than the one who runs the tests
# a machine under load draws inputs slowly (the first draw builds a table of all characters): that
# says nothing about the code
settings.register_profile(
    "ringfence",
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("ringfence")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    is_root = os.geteuid() == 0
    for item in items:
        if item.get_closest_marker("root") and not is_root:
            item.add_marker(pytest.mark.skip(reason="needs euid 0"))
        if item.get_closest_marker("user") and is_root:
            item.add_marker(pytest.mark.skip(reason="needs an ordinary user"))


@pytest.fixture(autouse=True)
def _scrubbed_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A developer's own key or settings must neither reach a test nor decide its outcome."""
    for name in list(os.environ):
        if name.startswith(("RINGFENCE_", "ANTHROPIC_", "CLAUDE_", "AWS_", "OTEL_")):
            monkeypatch.delenv(name)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
