"""Secret stores of clouds on loopback: moto's Secrets Manager, and Google's by its documents."""

from __future__ import annotations

import base64
import functools
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any


@functools.cache
def administrator(port: int) -> Any:
    """Whoever puts secrets there; made once, since it reads megabytes of models."""
    import boto3

    return boto3.client(
        "secretsmanager",
        region_name="eu-central-1",
        endpoint_url=f"http://127.0.0.1:{port}",
        aws_access_key_id="AKIAADMIN",
        aws_secret_access_key="admin",
    )


@contextmanager
def moto() -> Iterator[int]:
    """Port of a server of moto's, which keeps everything in memory."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    saved = dict(os.environ)  # it sets credentials of its own
    server = make_server(
        "127.0.0.1", 0, DomainDispatcherApplication(create_backend_app), threaded=True
    )
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()
    administrator.cache_clear()
    os.environ.clear()
    os.environ.update(saved)


class Google(BaseHTTPRequestHandler):
    """What Secret Manager and the issuer of tokens answer, as their documents say."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def _say(self, status: int, value: object) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self) -> None:
        server: Any = self.server
        body = self.rfile.read(int(self.headers["content-length"])).decode()
        assert "assertion=" in body or "subject_token=" in body
        server.tokens += 1
        answer = {"access_token": f"ya29.{server.tokens}", "expires_in": 3600}
        self._say(200, {**answer, "token_type": "Bearer", "issued_token_type": "x"})

    def do_GET(self) -> None:
        server: Any = self.server
        if server.barred or not self.headers.get("authorization", "").startswith("Bearer ya29."):
            return self._say(403, {"error": {"code": 403, "status": "PERMISSION_DENIED"}})
        versions = server.secrets.get(self.path.split("/")[5])
        if self.path.endswith("/redirect/versions/latest:access"):
            self.send_response(307)
            self.send_header("location", "http://127.0.0.1:1/steal")
            self.send_header("content-length", "0")
            return self.end_headers()
        if not versions:
            return self._say(404, {"error": {"code": 404, "status": "NOT_FOUND"}})
        name = f"projects/1/secrets/x/versions/{len(versions)}"
        data = base64.b64encode(versions[-1].encode()).decode()
        return self._say(200, {"name": name, "payload": {"data": data}})


def credentials(kind: str, endpoint: str, directory: Path) -> dict[str, Any]:
    if kind == "federated":
        (directory / "subject").write_text("a.b.c")
        return {
            "type": "external_account",
            "audience": "//iam.googleapis.com/projects/1/locations/global/workloadIdentityPools/p/providers/q",
            "subject_token_type": "urn:ietf:params:oauth:token-type:jwt",
            "token_url": f"{endpoint}/token",
            "credential_source": {"file": str(directory / "subject")},
        }
    return {
        "type": "service_account",
        "client_email": "ci@acme.iam.gserviceaccount.com",
        "private_key": private_key(),
        "private_key_id": "1",
        "token_uri": f"{endpoint}/token",
    }


@functools.cache
def private_key() -> str:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    key = rsa.generate_private_key(65537, 2048)
    pem, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    return key.private_bytes(pem, form, serialization.NoEncryption()).decode()
