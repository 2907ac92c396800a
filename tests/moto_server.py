"""moto's server on loopback, and what it handed out: its state lies in this process."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def moto_server() -> Iterator[int]:
    """Its port."""
    pytest.importorskip("moto.server")
    pytest.importorskip("botocore")
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    saved = dict(os.environ)  # it sets credentials of its own
    application = DomainDispatcherApplication(create_backend_app)
    server = make_server("127.0.0.1", 0, application, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        os.environ.clear()
        os.environ.update(saved)


def assumed() -> dict[str, tuple[str, str | None]]:
    """Secret and session token of each role that STS gave, by access key."""
    from moto.sts.models import sts_backends

    return {
        role.access_key_id: (role.secret_access_key, role.session_token)
        for account in list(sts_backends.values())
        for backend in list(account.values())
        for role in backend.assumed_roles
    }
