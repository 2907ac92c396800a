"""A real egress process and its keeper before a simulator that speaks as clouds do."""

from __future__ import annotations

import asyncio
import base64
import functools
import http.client
import json
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self
from urllib.parse import parse_qs

from ringfence.channel.link import EgressLink
from ringfence.channel.messages import Configure, OpenSandbox
from ringfence.channel.spawn import EgressProcess
from ringfence.config import Config
from ringfence.policy.codec import egress_to_json
from ringfence.policy.compiled import EgressRules, ModelRules
from ringfence.record.client import RecorderClient, RecorderProcess
from ringfence.worker.launch import Launcher

GOOGLE = "https://oauth2.googleapis.com/token"
"""Whom an assertion is for, whichever of Google's hosts takes it."""
MODELS = {"claude-sonnet-5": "anthropic.claude-sonnet-5-20260101-v1:0"}


@dataclass(frozen=True)
class Answer:
    status: int
    reason: str
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[dict[str, Any]]:
        parts = self.body.split(b"\n\n")
        return [json.loads(part.split(b"data: ", 1)[1]) for part in parts if b"data: " in part]


class _Inside(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("model.internal", timeout=120)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(120)
        self.sock.connect(str(self._path))


@dataclass
class Served:
    """`await served.ask(sandbox)` is a model request from inside."""

    state: Path
    link: EgressLink
    egress: EgressProcess
    notices: list[Any] = field(default_factory=list)

    async def open(self, provider: str, **rules: Any) -> Path:
        name = f"sb_{len(list(self.state.glob('*.sock')))}"
        path = self.state / f"{name}.sock"
        model = ModelRules(provider=provider, tools=("Bash",), **rules)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            path.chmod(0o666)
            listener.listen()
            await self.link.request(
                OpenSandbox,
                descriptors=[listener.fileno()],
                sandbox_id=name,
                run_id="run_1",
                session_id="sesn_1",
                rules=egress_to_json(EgressRules(model=model)),
            )
        return path

    async def ask(
        self, sandbox: Path, text: str = "hi", path: str = "/v1/messages", **more: Any
    ) -> Answer:
        body = {"model": "claude-sonnet-5", "max_tokens": 99, **more}
        body["messages"] = [{"role": "user", "content": text}]
        headers = {"content-type": "application/json", "anthropic-beta": "effort-2025-11-24"}

        def once() -> Answer:
            inside = _Inside(sandbox)
            try:
                inside.request("POST", path, json.dumps(body), headers)
                answer = inside.getresponse()
                reason = answer.headers.get("x-ringfence-reason", "")
                return Answer(answer.status, reason, answer.read())
            finally:
                inside.close()

        return await asyncio.to_thread(once)

    def kept(self) -> bytes:
        """All of the audit log."""
        files = (one for one in (self.state / "audit").rglob("*") if one.is_file())
        return b"".join(one.read_bytes() for one in files)


def in_memory(pid: int, *values: str) -> set[str]:
    """Which of them a process can read in what it wrote. For root: it is not dumpable."""
    found: set[str] = set()
    place = Path(f"/proc/{pid}")
    with (place / "mem").open("rb", buffering=0) as memory:
        for line in (place / "maps").read_text().splitlines():
            where, rights = line.split()[:2]
            if not rights.startswith("rw"):
                continue
            begin, end = (int(one, 16) for one in where.split("-"))
            try:
                memory.seek(begin)
                held = memory.read(end - begin)
            except OSError:
                continue  # it went in between
            found |= {value for value in values if value.encode() in held}
    return found


@asynccontextmanager
async def served(
    providers: dict[str, Any], *, sealed: dict[str, str] | None = None, **settings: Any
) -> AsyncIterator[Served]:
    """`providers` and `settings` as the operator writes them; `sealed` is what the vault holds."""
    from ringfence.vault.keys import VaultPaths
    from ringfence.vault.seal import set_credential

    state = Path(tempfile.mkdtemp(prefix="rfprov"))
    state.chmod(0o755)
    everything = {"anthropic": {"credential": None}, **providers}
    config = Config.model_validate(
        {
            "state_dir": state,
            "providers": everything,
            "secrets": {"timeout_seconds": 30.0},
            **settings,
        }
    )
    async with AsyncExitStack() as stack:
        stack.callback(shutil.rmtree, state, ignore_errors=True)
        for name, value in (sealed or {}).items():
            set_credential(VaultPaths(state), name, value)
        made = Launcher(config=config, make_backends=SimpleNamespace)._configuration()
        recorder = RecorderProcess.start(state / "audit")
        stack.push_async_callback(asyncio.to_thread, recorder.close)
        egress = EgressProcess.start()
        stack.push_async_callback(asyncio.to_thread, egress.close, 15)
        worker = RecorderClient(recorder.sockets["worker"])
        stack.push_async_callback(worker.close)
        notices: list[Any] = []
        link = EgressLink(egress.connection, notices.append)
        stack.push_async_callback(link.close)
        await worker.ready()
        dropped = 1_999_999 if os.geteuid() == 0 else None
        await link.request(
            Configure,
            descriptors=[recorder.sockets["egress"].fileno()],
            **{**made, "drop_to_uid": dropped},
        )
        recorder.sockets["egress"].close()
        yield Served(state, link, egress, notices)


class Issuer:
    """An OAuth token endpoint: it checks the assertion's signature, or takes a subject's token."""

    def __init__(self) -> None:
        issuer = self
        self.given: list[str] = []
        self.status = 200
        self.seconds = 3600

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_POST(self) -> None:
                raw = self.rfile.read(int(self.headers["content-length"])).decode()
                form = {name: values[0] for name, values in parse_qs(raw).items()}
                answer = issuer.answer(form)
                data = json.dumps(answer).encode()
                self.send_response(issuer.status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/token"

    def answer(self, form: dict[str, str]) -> dict[str, Any]:
        if self.status != 200:
            return {"error": "invalid_grant", "error_description": "the account is gone"}
        if "assertion" in form:
            import jwt

            public = signing_key().public_key()
            claims = jwt.decode(form["assertion"], public, ["RS256"], audience=GOOGLE)
            assert claims["iss"] == "agent@acme-prod.iam.gserviceaccount.com"
        else:
            assert form["subject_token"] == "subject.of.cluster"
        self.given.append(f"ya29.given-token-{len(self.given)}-0123456789")
        return {
            "access_token": self.given[-1],
            "expires_in": self.seconds,
            "token_type": "Bearer",
            "issued_token_type": "urn:ietf:params:oauth:token-type:access_token",
        }

    def key(self) -> dict[str, str]:
        """A service account's, as the console hands it out."""
        from cryptography.hazmat.primitives import serialization

        pem, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        private = signing_key().private_bytes(pem, form, serialization.NoEncryption())
        return {
            "type": "service_account",
            "project_id": "acme-prod",
            "client_email": "agent@acme-prod.iam.gserviceaccount.com",
            "private_key": private.decode(),
            "private_key_id": "1",
            "token_uri": self.url,
        }

    def federation(self, directory: Path) -> Path:
        """The configuration of one, with the subject's token in a file."""
        (directory / "subject").write_text("subject.of.cluster")
        path = directory / "federation.json"
        about = {
            "type": "external_account",
            "audience": "//iam.googleapis.com/projects/1/locations/global/workloadIdentityPools/p/providers/q",
            "subject_token_type": "urn:ietf:params:oauth:token-type:jwt",
            "token_url": self.url,
            "credential_source": {"file": str(directory / "subject")},
        }
        path.write_text(json.dumps(about))
        return path

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


@functools.cache
def signing_key() -> Any:
    from cryptography.hazmat.primitives.asymmetric import rsa

    return rsa.generate_private_key(65537, 2048)


def in_base64(value: object) -> str:
    return base64.b64encode(json.dumps(value).encode()).decode()
