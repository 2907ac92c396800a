"""Logins in the keeper: what is too long, away, or asked twice fails alone."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from ringfence.config.providers import AwsLogin, GoogleLogin
from ringfence.config.secrets import SecretSettings
from ringfence.egress.keeping import _Line
from ringfence.errors import UnavailableError
from ringfence.vault import keeper
from ringfence.vault.login import LoginOrder, packed
from ringfence.vault.source import Resolved


class Gives:
    def __init__(self, size: int) -> None:
        self._size = size

    def resolve(self) -> Resolved:
        return Resolved(value=packed({"token": "t" * self._size}), version="1", lease_seconds=60)

    def close(self) -> None:
        pass


def answers(connection: socket.socket, *, checked: bool) -> None:
    """A keeper's loop; `checked` False sends what an older one would have."""
    made = keeper.Keeper(SecretSettings(), lambda _: None, tells=True)  # type: ignore[arg-type,return-value]
    made.logs_in("provider/long", lambda: Gives(9000))
    made.logs_in("provider/short", lambda: Gives(900))
    while (asked := keeper.receive(connection)) is not None:

        def reply(told: dict[str, Any], value: bytes, number: int) -> None:
            if not checked and "error" in told:
                told, value = {"version": "1", "lease_seconds": None, "hosts": []}, b"v" * 9000
            words = json.dumps({"id": number, **told}).encode()
            connection.sendall(keeper.ANSWER.pack(len(words), len(value)) + words + value)

        made.submit(asked["name"], partial(reply, number=asked["id"]))
    made.close()


@pytest.mark.parametrize("checked", [True, False])
async def test_a_value_that_is_too_long_fails_alone(checked: bool) -> None:
    ours, theirs = socket.socketpair()
    thread = threading.Thread(target=answers, args=(theirs,), kwargs={"checked": checked})
    thread.start()
    line = _Line(ours)
    try:
        async with asyncio.timeout(20):
            with pytest.raises(UnavailableError) as caught:
                await line.ask("provider/long", doubted=False)
            assert caught.value.code == "secret-unfit"
            given = await line.ask("provider/short", doubted=False)
            assert len(given.value) > 900
            assert not line.gone
    finally:
        await line.close()
        thread.join(20)
        theirs.close()


def test_who_has_gone_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a login is asked for once at a time: a service that hangs is not asked by all."""
    monkeypatch.setattr(keeper, "patience", lambda _: 0.2)
    made = keeper.Keeper(SecretSettings(), lambda _: None, tells=True)  # type: ignore[arg-type,return-value]
    gate, asked, told = threading.Event(), [], []

    class Hangs(Gives):
        def resolve(self) -> Resolved:
            asked.append(1)
            gate.wait(20)
            return super().resolve()

    made.logs_in("provider/x", lambda: Hangs(9))
    over = threading.Semaphore(0)

    def reply(words: dict[str, Any], _: bytes) -> None:
        told.append(words.get("error", {}).get("code", "given"))
        over.release()

    for _ in range(4):
        made.submit("provider/x", reply)
    threading.Event().wait(0.4)
    gate.set()
    assert all(over.acquire(timeout=20) for _ in range(4))
    assert told == ["given", *["secret-unreachable"] * 3]
    assert len(asked) == 1
    made.submit("provider/x", reply)
    assert over.acquire(timeout=20)
    assert told[-1] == "given"
    made.close()


class Metadata(BaseHTTPRequestHandler):
    def do_PUT(self) -> None:
        self.send_response(200)
        self.send_header("content-length", "3")
        self.end_headers()
        self.wfile.write(b"tok")

    def do_GET(self) -> None:
        self.send_response(self.server.says)  # type: ignore[attr-defined]
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def metadata() -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def order(login: AwsLogin | GoogleLogin, value: bytes = b"") -> LoginOrder:
    kind = "aws" if isinstance(login, AwsLogin) else "google"
    return LoginOrder(kind=kind, login=login, region="us-east-1", timeout=3.0, value=lambda: value)


@pytest.mark.parametrize(
    ("status", "code"),
    [(503, "secret-unreachable"), (500, "secret-unreachable"), (404, "secret-denied")],
)
def test_a_host_without_a_role_is_told_from_a_service_that_is_away(
    metadata: Any, status: int, code: str
) -> None:
    pytest.importorskip("botocore")
    from ringfence.vault.sources.aws_role import BedrockLogin

    metadata.says = status
    where = f"http://127.0.0.1:{metadata.server_port}/"
    with pytest.raises(UnavailableError) as caught:
        BedrockLogin(order(AwsLogin(host=True)), where).resolve()
    assert caught.value.code == code


def test_a_web_identity_has_the_time_limits_of_the_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = pytest.importorskip("botocore.httpsession")
    from ringfence.vault.sources.aws_role import BedrockLogin

    timeouts: list[Any] = []
    real = session.URLLib3Session.__init__

    def init(self: Any, *args: Any, **more: Any) -> None:
        timeouts.append(more.get("timeout"))
        real(self, *args, **more)

    monkeypatch.setattr(session.URLLib3Session, "__init__", init)
    token = tmp_path / "token"
    token.write_text("of-the-cluster")
    login = AwsLogin(
        web_identity_token_file=token,
        role_arn="arn:aws:iam::123456789012:role/x",
        sts_endpoint="https://127.0.0.1:9",
    )
    with pytest.raises(UnavailableError) as caught:
        BedrockLogin(order(login)).resolve()
    assert caught.value.code == "secret-unreachable"
    assert (3.0, 3.0) in timeouts
    assert (60, 60) not in timeouts


@pytest.mark.parametrize(("mode", "code"), [(0o644, "secret-denied"), (0o600, "")])
def test_a_file_of_credentials_that_all_can_read_is_none(
    tmp_path: Path, mode: int, code: str
) -> None:
    pytest.importorskip("botocore")
    pytest.importorskip("google.auth")
    from ringfence.vault.sources.aws_role import BedrockLogin
    from ringfence.vault.sources.google_token import VertexLogin

    keys = tmp_path / "keys"
    keys.write_text("[default]\naws_access_key_id = AKIAX\naws_secret_access_key = s3cret-012\n")
    keys.chmod(mode)
    aws = BedrockLogin(order(AwsLogin(credentials_file=keys)))
    if not code:
        assert json.loads(aws.resolve().value)["key"] == "AKIAX"
        return
    with pytest.raises(UnavailableError) as caught:
        aws.resolve()
    assert caught.value.code == code
    with pytest.raises(UnavailableError) as caught:
        VertexLogin(order(GoogleLogin(credentials_file=keys))).resolve()
    assert "read or written by others" in caught.value.message


def test_what_a_login_begins_with_stays_with_the_keeper(tmp_path: Path) -> None:
    from ringfence.channel.messages import Configure
    from ringfence.egress.process import _secrets
    from ringfence.vault.keys import VaultPaths
    from ringfence.vault.seal import set_credential

    paths = VaultPaths(tmp_path / "state")
    for name in ("aws-keys", "gh"):
        set_credential(paths, name, f"value-of-{name}-0123456789")
    login = AwsLogin(credential="aws-keys").model_dump(mode="json")
    logins = {"provider/b": {"kind": "aws", "login": login, "region": "us-east-1"}}

    def held(**more: Any) -> set[str]:
        places = {"vault_path": str(paths.store), "key_path": str(paths.key)}
        return set(_secrets(Configure.model_validate({"id": 1, "providers": {}, **places, **more})))

    assert held() == {"aws-keys", "gh"}
    assert held(logins=logins) == {"gh"}


@pytest.mark.parametrize(("tells", "code"), [(True, "credential-missing"), (False, "given")])
def test_the_keeper_tells_nobody_what_a_login_begins_with(tells: bool, code: str) -> None:
    settings = SecretSettings.model_validate(
        {"credentials": {"aws-keys": {"source": "file:///run/secrets/aws"}}}
    )

    class Source(Gives):
        def resolve(self, *_: Any, **__: Any) -> Resolved:  # type: ignore[override]
            return super().resolve()

    made = keeper.Keeper(
        settings,
        lambda _: Source(9),  # type: ignore[arg-type,return-value]
        tells=tells,
        withheld=frozenset({"aws-keys"}),
    )
    told: list[tuple[str, bytes]] = []
    over = threading.Event()

    def reply(words: dict[str, Any], value: bytes) -> None:
        told.append((words.get("error", {}).get("code", "given"), value))
        over.set()

    made.submit("aws-keys", reply)
    assert over.wait(20)
    assert told == [(code, b"")]
    assert json.loads(made.named("aws-keys")) == {"token": "t" * 9}  # the login itself has it
    made.close()
