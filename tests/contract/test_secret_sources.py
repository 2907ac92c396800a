"""Every source of secrets, by the one contract, against the real thing where there is one."""

from __future__ import annotations

import base64
import json
import os
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from clouds import Google, administrator, credentials, moto
from openbao import ROOT, Openbao, Relay, database_users
from ringfence.config.reference import Reference, parse
from ringfence.config.secrets import AwsService, GcpService, VaultService
from ringfence.errors import CallerError, UnavailableError
from ringfence.testing.secret_source_contract import FIRST, UNFIT, SecretSourceContract, refused
from ringfence.vault.keys import VaultPaths
from ringfence.vault.seal import set_credential
from ringfence.vault.source import SecretSource
from ringfence.vault.sources.files import FileSource
from ringfence.vault.sources.openbao import VaultSource
from ringfence.vault.sources.ring import KeyringSource
from ringfence.vault.sources.sealed import SealedSource


class Place:
    """One source and its surroundings; what a source cannot suffer is skipped."""

    source: SecretSource
    reference: Reference
    hidden: tuple[str, ...] = ()

    def put(self, value: str) -> None:
        raise NotImplementedError

    @contextmanager
    def away(self) -> Iterator[None]:
        pytest.skip("it is on this host: there is no way to it that could be cut")
        yield

    @contextmanager
    def barred(self) -> Iterator[None]:
        pytest.skip("it has nobody who says no")
        yield


class SealedPlace(Place):
    def __init__(self, state: Path) -> None:
        self.state = state
        self.source, self.reference = SealedSource(state), parse("sealed://gh")

    def put(self, value: str) -> None:
        try:
            set_credential(VaultPaths(self.state), "gh", value)
        except CallerError:
            pytest.skip("`vault set` refuses it before")

    @contextmanager
    def barred(self) -> Iterator[None]:
        store = VaultPaths(self.state).store
        store.chmod(0o644)  # read by others: it is not a vault any more
        yield
        store.chmod(0o600)


class TestSealed(SecretSourceContract):
    @pytest.fixture
    def place(self, tmp_path: Path) -> SealedPlace:
        return SealedPlace(tmp_path / "state")


class FilePlace(Place):
    """As the kubelet mounts a secret: each version a directory, and a link that is swapped."""

    def __init__(self, directory: Path, scheme: str) -> None:
        self.directory, self.count = directory, 0
        directory.mkdir(mode=0o700)
        self.path = directory / "token"
        self.path.symlink_to("..data/token")
        self.source = FileSource(str(directory))
        written = "credential://token" if scheme == "credential" else f"file://{self.path}"
        self.reference = parse(written)

    def put(self, value: str) -> None:
        self.count += 1
        version = self.directory / f"..v{self.count}"
        version.mkdir()
        (version / "token").write_text(value + "\n")
        (version / "token").chmod(0o440)
        link = self.directory / "..data_tmp"
        link.symlink_to(version.name)
        link.rename(self.directory / "..data")
        before = self.directory / f"..v{self.count - 1}"
        if before.exists():
            (before / "token").unlink()
            before.rmdir()

    @contextmanager
    def barred(self) -> Iterator[None]:
        path = self.path.resolve()
        path.chmod(0o444)
        yield
        path.chmod(0o440)


class TestFile(SecretSourceContract):
    @pytest.fixture(params=["file", "credential"])
    def place(self, tmp_path: Path, request: pytest.FixtureRequest) -> FilePlace:
        return FilePlace(tmp_path / "mount", request.param)

    def test_a_swap_under_way_is_never_seen(self, tmp_path: Path) -> None:
        """Each answer is whole, of one version, while the link goes round under the reader."""
        place = FilePlace(tmp_path / "swapped", "file")
        place.put("value-0-0123456789")
        done = threading.Event()

        def swap() -> None:
            for number in range(1, 150):
                place.put(f"value-{number}-0123456789")
            done.set()

        thread = threading.Thread(target=swap)
        thread.start()
        seen = []
        while not done.is_set():
            seen.append(place.source.resolve(place.reference).value)
        thread.join()
        assert all(value.startswith(b"value-") and value.endswith(b"-0123456789") for value in seen)
        assert place.source.resolve(place.reference).value == b"value-149-0123456789"

    @pytest.mark.parametrize("kind", ["fifo", "directory", "huge"])
    def test_what_is_no_file_of_a_secret_holds_nobody(self, tmp_path: Path, kind: str) -> None:
        path = tmp_path / "x"
        if kind == "fifo":
            os.mkfifo(path, 0o600)
        elif kind == "directory":
            path.mkdir(0o700)
        else:
            path.write_bytes(b"a" * 100_000)
            path.chmod(0o600)
        with pytest.raises(UnavailableError) as caught:
            FileSource().resolve(parse(f"file://{path}"))
        assert caught.value.code == "secret-unfit"


class RingPlace(Place):
    """Through the real package, with a backend that keeps in memory: a desktop's needs a person."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        keyring = pytest.importorskip("keyring")
        from keyring.backend import KeyringBackend
        from keyring.errors import KeyringLocked

        kept: dict[tuple[str, str], str] = {}
        self.locked = False
        place = self

        class Memory(KeyringBackend):
            priority = 9  # type: ignore[assignment]

            def get_password(self, service: str, username: str) -> str | None:
                if place.locked:
                    raise KeyringLocked("locked")
                return kept.get((service, username))

            def set_password(self, service: str, username: str, password: str) -> None:
                kept[service, username] = password

        # the product takes none of root's: it would be whoever's session root was made in
        monkeypatch.setattr("ringfence.vault.keys.os", types.SimpleNamespace(geteuid=lambda: 1000))
        before = keyring.get_keyring()
        keyring.set_keyring(Memory())
        self.restore = lambda: keyring.set_keyring(before)
        self.source, self.reference = KeyringSource(), parse("keyring://ci/github")

    def put(self, value: str) -> None:
        import keyring

        keyring.set_password("ci", "github", value)

    @contextmanager
    def away(self) -> Iterator[None]:
        self.locked = True
        yield
        self.locked = False


class TestKeyring(SecretSourceContract):
    @pytest.fixture
    def place(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[RingPlace]:
        place = RingPlace(monkeypatch)
        yield place
        place.restore()


def private(path: Path, text: str) -> None:
    path.touch(0o600)
    path.write_text(text)


READ = 'path "secret/data/contract/*" { capabilities = ["read"] }'


class BaoPlace(Place):
    """A KV of version 2, read with one of three ways to log in, through a relay that can be cut."""

    def __init__(self, server: Openbao, directory: Path, auth: str) -> None:
        self.server, self.relay = server, Relay(server.port)
        self.name = f"contract/{directory.name}-{auth}"
        self.secret_file = directory / "secret"
        self.secret_file.touch(0o600)
        server.policy("contract", READ)
        fields: dict[str, Any] = {"auth": auth}
        self.renew: Callable[[], str]
        if auth == "token":
            fields["token_file"] = self.secret_file
            self.renew = lambda: server.token("contract", ttl="1h")
        elif auth == "approle":
            role = enabled(server, "approle")
            server.call(
                "POST", f"{role}/role/ci", {"token_policies": ["contract"], "token_ttl": "1h"}
            )
            fields["role_id"] = server.call("GET", f"{role}/role/ci/role-id")["data"]["role_id"]
            fields["secret_id_file"] = self.secret_file
            self.renew = lambda: str(
                server.call("POST", f"{role}/role/ci/secret-id", {})["data"]["secret_id"]
            )
        else:
            self.reviews: Any = ThreadingHTTPServer(("127.0.0.1", 0), Reviews)
            threading.Thread(target=self.reviews.serve_forever, args=(0.05,), daemon=True).start()
            host = f"http://127.0.0.1:{self.reviews.server_port}"
            role = enabled(server, "kubernetes")
            server.call(
                "POST",
                f"{role}/config",
                {
                    "kubernetes_host": host,
                    "disable_local_ca_jwt": True,
                    "kubernetes_ca_cert": server.ca_file.read_text(),
                    "token_reviewer_jwt": jwt(),
                },
            )
            bound = {
                "bound_service_account_names": ["ringfence"],
                "bound_service_account_namespaces": ["ci"],
            }
            server.call("POST", f"{role}/role/ci", {**bound, "token_policies": ["contract"]})
            fields |= {"role": "ci", "jwt_file": self.secret_file}
            self.renew = jwt
        self.secret = self.renew()
        self.secret_file.write_text(self.secret + "\n")
        service = VaultService.model_validate(
            {"address": f"https://127.0.0.1:{self.relay.port}", "ca_file": server.ca_file, **fields}
        )
        self.auth, self.source = auth, VaultSource(service, 60.0)
        self.reference = parse(f"vault://secret/{self.name}#token")
        self.hidden = (self.secret,)

    def put(self, value: str) -> None:
        self.server.put(self.name, token=value, other="nobody asked")

    @contextmanager
    def away(self) -> Iterator[None]:
        with self.relay.cut():
            yield

    @contextmanager
    def barred(self) -> Iterator[None]:
        """The policy gives nothing any more."""
        self.server.policy("contract", 'path "secret/data/nothing" { capabilities = ["read"] }')
        yield
        self.server.policy("contract", READ)

    def close(self) -> None:
        self.source.close()
        self.relay.close()
        if self.auth == "kubernetes":
            self.reviews.shutdown()
            self.reviews.server_close()


def jwt() -> str:
    """A service account's token, as far as it is read before the cluster is asked about it."""
    account = {"name": "ringfence", "uid": "u-1"}
    claims = {
        "iss": "https://kubernetes.default.svc",
        "aud": ["vault"],
        "exp": int(time.time()) + 3600,
        "iat": int(time.time()),
        "sub": "system:serviceaccount:ci:ringfence",
        "kubernetes.io": {"namespace": "ci", "serviceaccount": account},
    }
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

    def part(raw: bytes) -> str:
        return base64.urlsafe_b64encode(raw).decode().rstrip("=")

    text = ".".join(part(json.dumps(one).encode()) for one in ({"alg": "ES256"}, claims))
    key = ec.generate_private_key(ec.SECP256R1())
    r, s = decode_dss_signature(key.sign(text.encode(), ec.ECDSA(hashes.SHA256())))
    return f"{text}.{part(r.to_bytes(32, 'big') + s.to_bytes(32, 'big'))}"


class Reviews(BaseHTTPRequestHandler):
    """The cluster's TokenReview, which no package brings: it knows every token."""

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        user = {"username": "system:serviceaccount:ci:ringfence", "uid": "u-1"}
        user |= {"groups": ["system:serviceaccounts", "system:serviceaccounts:ci"]}
        status = {"authenticated": True, "user": user, "audiences": ["vault"]}
        kind = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview"}
        data = json.dumps({**kind, "status": status}).encode()
        self.send_response(201)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def enabled(server: Openbao, method: str) -> str:
    if f"{method}/" not in server.call("GET", "sys/auth")["data"]:
        server.call("POST", f"sys/auth/{method}", {"type": method})
    return f"auth/{method}"


class TestOpenbao(SecretSourceContract):
    @pytest.fixture
    def place(self, openbao_server: Openbao, tmp_path: Path) -> Iterator[BaoPlace]:
        place = BaoPlace(openbao_server, tmp_path, "approle")
        yield place
        place.close()

    @pytest.mark.parametrize("auth", ["token", "kubernetes"])
    def test_the_other_ways_in(self, openbao_server: Openbao, tmp_path: Path, auth: str) -> None:
        place = BaoPlace(openbao_server, tmp_path, auth)
        place.put(FIRST)
        assert place.source.resolve(place.reference).value == FIRST.encode()
        with place.barred():
            refused(place, "secret-denied")
        assert place.source.resolve(place.reference).value == FIRST.encode()
        place.close()

    def test_a_token_that_was_revoked_is_replaced(
        self, openbao_server: Openbao, tmp_path: Path
    ) -> None:
        for auth in ("token", "approle"):
            place = BaoPlace(openbao_server, tmp_path, auth)
            place.put(FIRST)
            place.source.resolve(place.reference)
            held = place.source._token.text  # type: ignore[attr-defined]
            openbao_server.call("POST", "auth/token/revoke", {"token": held})
            place.secret_file.write_text(place.renew())
            assert place.source.resolve(place.reference).value == FIRST.encode()
            place.close()

    def test_a_certificate_of_nobody_we_know_gets_no_token(
        self, openbao_server: Openbao, tmp_path: Path
    ) -> None:
        place = BaoPlace(openbao_server, tmp_path, "token")
        service = place.source._service.model_copy(update={"ca_file": None})  # type: ignore[attr-defined]
        with pytest.raises(UnavailableError, match="certificate is not trusted") as caught:
            VaultSource(service, 60.0).resolve(place.reference)
        assert caught.value.code == "secret-unreachable"
        place.close()


PASSWORD = parse("vault-lease://database/creds/ci#password")
ISSUED = "sys/leases/lookup/database/creds/ci"


class Dynamic:
    """Users of a real PostgreSQL, handed out by OpenBao to a token of ours; `skipped` moves the
    source's own clock on, and the server's is not.
    """

    def __init__(self, server: Openbao, postgres_server: Any, directory: Path) -> None:
        self.server, self.relay, self.skipped = server, Relay(server.port), 0.0
        self.token_file = directory / "token"
        database_users(server, postgres_server)
        self.service = VaultService.model_validate(
            {
                "address": f"https://127.0.0.1:{self.relay.port}",
                "ca_file": server.ca_file,
                "token_file": self.token_file,
            }
        )
        self.source = VaultSource(self.service, 60.0, lambda: time.monotonic() + self.skipped)

    def give(self, ttl: str) -> str:
        """A token, in the file that the settings name."""
        token = self.server.token("dynamic", ttl=ttl)
        private(self.token_file, token)
        return token

    def issued(self) -> list[str]:
        """Leases that the server holds good."""
        try:
            return list(self.server.call("LIST", ISSUED)["data"]["keys"])
        except AssertionError as error:
            assert "404" in str(error), error
            return []

    def close(self) -> None:
        self.source.close()
        self.relay.close()


@pytest.fixture
def dynamic(openbao_server: Openbao, postgres_server: Any, tmp_path: Path) -> Iterator[Dynamic]:
    one = Dynamic(openbao_server, postgres_server, tmp_path)
    yield one
    one.close()
    assert one.issued() == []  # whatever was handed out was given back


def test_a_lease_lives_on_past_the_time_of_its_token(dynamic: Dynamic) -> None:
    """Of an hour, to a token of eight seconds: nothing but the lease is asked for."""
    token = dynamic.give(ttl="8s")
    first, end = dynamic.source.resolve(PASSWORD), time.monotonic() + 11
    assert first.lease_seconds is not None
    assert first.lease_seconds <= 8  # it is revoked with the token
    while time.monotonic() < end:
        time.sleep(0.5)
        assert dynamic.source.resolve(PASSWORD).version == first.version
    assert len(dynamic.issued()) == 1
    assert dynamic.server.call("GET", "auth/token/lookup-self", token=token)["data"]["ttl"] > 0


def test_a_lease_of_a_token_that_was_revoked_is_not_used(dynamic: Dynamic) -> None:
    old = dynamic.give(ttl="30m")
    first = dynamic.source.resolve(PASSWORD)
    dynamic.server.call("POST", "auth/token/revoke", {"token": old})
    dynamic.give(ttl="30m")
    dynamic.skipped += 1000  # half of the token is over, and not of the lease
    second = dynamic.source.resolve(PASSWORD)
    assert second.version != first.version
    assert second.value != first.value
    assert len(dynamic.issued()) == 1


@pytest.mark.parametrize("doubted", [True, False])
def test_a_token_that_was_revoked_in_its_first_half_is_noticed(
    dynamic: Dynamic, doubted: bool
) -> None:
    """At once when an upstream refuses what it had, else within a minute."""
    old = dynamic.give(ttl="30m")
    first = dynamic.source.resolve(PASSWORD)
    dynamic.server.call("POST", "auth/token/revoke", {"token": old})
    dynamic.give(ttl="30m")
    assert dynamic.source.resolve(PASSWORD).version == first.version  # nothing has told yet
    dynamic.skipped += 0 if doubted else 61
    second = dynamic.source.resolve(PASSWORD, doubted=doubted)
    assert second.version != first.version
    assert len(dynamic.issued()) == 1


def test_a_lease_that_is_refused_is_replaced_once_in_five_minutes(dynamic: Dynamic) -> None:
    """Whoever can have a 401 must not fill a database with users."""
    dynamic.give(ttl="8h")
    versions = [dynamic.source.resolve(PASSWORD).version]
    versions += [dynamic.source.resolve(PASSWORD, doubted=True).version for _ in range(5)]
    assert len(set(versions)) == 2
    assert len(dynamic.issued()) == 2
    dynamic.skipped += 301
    assert dynamic.source.resolve(PASSWORD, doubted=True).version not in versions


@pytest.mark.parametrize("auth", ["token", "approle"])
def test_a_token_that_may_not_look_itself_up_keeps_its_leases(
    dynamic: Dynamic, tmp_path: Path, auth: str
) -> None:
    """Its server says 403 to it whether it is too old or may not: another token shows which."""
    server = dynamic.server
    if auth == "token":
        own = server.token("dynamic", ttl="1h", no_default_policy=True)
        private(dynamic.token_file, own)
    else:
        role = enabled(server, "approle")
        narrow = {"token_policies": ["dynamic"], "token_no_default_policy": True}
        server.call("POST", f"{role}/role/narrow", {**narrow, "token_ttl": "1h"})
        name = server.call("GET", f"{role}/role/narrow/role-id")["data"]["role_id"]
        given = server.call("POST", f"{role}/role/narrow/secret-id", {})["data"]["secret_id"]
        private(tmp_path / "secret-id", given)
        fields = {"auth": auth, "role_id": name, "secret_id_file": tmp_path / "secret-id"}
        service = dynamic.service.model_copy(update=fields)
        dynamic.source.close()
        dynamic.source = VaultSource(service, 60.0, lambda: time.monotonic() + dynamic.skipped)
    first = dynamic.source.resolve(PASSWORD)
    for _ in range(2):
        with pytest.raises(UnavailableError) as caught:
            dynamic.source.resolve(parse("vault://secret/not/for/us#token"))
        assert caught.value.code == "secret-denied"
        assert dynamic.source.resolve(PASSWORD).version == first.version
    assert len(dynamic.issued()) == 1
    held = dynamic.source._token  # type: ignore[attr-defined]
    assert held is not None
    server.call("POST", "auth/token/revoke", {"token": held.text})
    if auth == "token":
        with pytest.raises(UnavailableError, match="has ended") as caught:
            dynamic.source.resolve(PASSWORD, doubted=True)
        assert str(dynamic.token_file) in caught.value.hint
        private(dynamic.token_file, server.token("dynamic", ttl="1h", no_default_policy=True))
    assert dynamic.source.resolve(PASSWORD, doubted=True).version != first.version
    assert len(dynamic.issued()) == 1


def test_a_reference_that_is_denied_costs_nobody_elses_lease(dynamic: Dynamic) -> None:
    dynamic.give(ttl="8h")
    first = dynamic.source.resolve(PASSWORD)
    for _ in range(2):
        with pytest.raises(UnavailableError) as caught:
            dynamic.source.resolve(parse("vault://secret/not/for/us#token"))
        assert caught.value.code == "secret-denied"
        assert dynamic.source.resolve(PASSWORD).version == first.version
    assert len(dynamic.issued()) == 1


def test_leases_of_a_token_that_was_replaced_are_given_back(dynamic: Dynamic) -> None:
    """As near the last renewal of a login's: the old token and what it has are still good."""
    old = dynamic.give(ttl="1h")
    first = dynamic.source.resolve(PASSWORD)
    source: Any = dynamic.source
    source._forget(source._token)
    dynamic.give(ttl="1h")
    assert dynamic.source.resolve(PASSWORD).version != first.version
    assert len(dynamic.issued()) == 2
    dynamic.close()
    assert dynamic.issued() == []
    assert dynamic.server.call("GET", "auth/token/lookup-self", token=old)  # not ours to revoke


def test_a_dynamic_secret_is_renewed_replaced_and_revoked(dynamic: Dynamic, tmp_path: Path) -> None:
    server, source, relay = dynamic.server, dynamic.source, dynamic.relay
    dynamic.give(ttl="8h")
    password, user = PASSWORD, parse("vault-lease://database/creds/ci#username")
    first = source.resolve(password)
    assert first.lease_seconds is not None
    assert 3500 < first.lease_seconds <= 3600
    # fields of one lease belong together
    assert source.resolve(user).version == first.version
    dynamic.skipped += 1900
    with relay.cut(), pytest.raises(UnavailableError) as caught:
        source.resolve(password)
    assert caught.value.code == "secret-unreachable"
    renewed = source.resolve(password)
    assert (renewed.value, renewed.version) == (first.value, first.version)
    assert renewed.lease_seconds is not None
    assert renewed.lease_seconds > 3500
    assert len(dynamic.issued()) == 1
    server.call("PUT", "sys/leases/revoke-prefix/database/creds/ci", {"sync": True})
    dynamic.skipped += 1900
    second = source.resolve(password)
    assert second.version != first.version
    assert second.value != first.value
    dynamic.close()
    assert dynamic.issued() == []
    with pytest.raises(UnavailableError, match="without a lease"):
        root = {"address": server.address, "token_file": tmp_path / "root"}
        refused = VaultSource(dynamic.service.model_copy(update=root), 60.0)
        private(tmp_path / "root", ROOT)
        server.put("plain", token=FIRST)
        refused.resolve(parse("vault-lease://secret/data/plain#token"))


class AwsPlace(Place):
    """moto's server, reached through a relay, as a role that is assumed."""

    def __init__(self, port: int, directory: Path, role: str) -> None:
        from ringfence.vault.sources.aws import AwsSource

        self.relay, self.name = Relay(port), f"contract-{directory.name}-{role}"
        self.port = port
        self.hidden = ("host-secret-key-0123456789",)
        keys = directory / "credentials"
        keys.write_text(
            f"[ci]\naws_access_key_id = AKIAHOST\naws_secret_access_key = {self.hidden[0]}\n"
        )
        (directory / "web").write_text("web-identity-token")
        endpoint = f"http://127.0.0.1:{self.relay.port}"
        fields: dict[str, Any] = {"region": "eu-central-1", "endpoint": endpoint}
        if role:
            fields |= {
                "role_arn": "arn:aws:iam::123456789012:role/reader",
                "sts_endpoint": endpoint,
            }
        if role == "web":
            fields["web_identity_token_file"] = directory / "web"
        else:
            fields |= {"credentials_file": keys, "profile": "ci"}
        self.source = AwsSource(AwsService.model_validate(fields), 60.0)
        self.reference = parse(f"aws-sm://{self.name}#token")
        self.made = False

    def put(self, value: str) -> None:
        client, text = administrator(self.port), json.dumps({"token": value})
        if self.made:
            client.put_secret_value(SecretId=self.name, SecretString=text)
        else:
            client.create_secret(Name=self.name, SecretString=text)
        self.made = True

    @contextmanager
    def away(self) -> Iterator[None]:
        with self.relay.cut():
            yield

    def close(self) -> None:
        self.source.close()
        self.relay.close()


@pytest.fixture(scope="module")
def moto_port() -> Iterator[int]:
    pytest.importorskip("moto.server")
    pytest.importorskip("botocore")
    with moto() as port:
        yield port


class TestAws(SecretSourceContract):
    @pytest.fixture
    def place(self, moto_port: int, tmp_path: Path) -> Iterator[AwsPlace]:
        place = AwsPlace(moto_port, tmp_path, "web")
        yield place
        place.close()

    # each place loads botocore's models anew, most of its time: of what is alike, one in the usual
    # run

    @pytest.mark.parametrize(
        "value", [UNFIT[0], *(pytest.param(one, marks=pytest.mark.storm) for one in UNFIT[1:])]
    )
    def test_what_no_header_carries_is_no_value(self, place: AwsPlace, value: str) -> None:
        super().test_what_no_header_carries_is_no_value(place, value)

    @pytest.mark.storm
    def test_another_value_has_another_version(self, place: AwsPlace) -> None:
        super().test_another_value_has_another_version(place)

    @pytest.mark.storm
    def test_one_that_says_no_is_denied(self, place: AwsPlace) -> None:
        super().test_one_that_says_no_is_denied(place)

    @pytest.mark.storm
    def test_many_may_ask_at_once(self, place: AwsPlace) -> None:
        super().test_many_may_ask_at_once(place)

    @pytest.mark.parametrize("role", ["", "assumed"])
    def test_the_other_ways_in(self, moto_port: int, tmp_path: Path, role: str) -> None:
        place = AwsPlace(moto_port, tmp_path, role)
        refused(place, "secret-absent")
        place.put(FIRST)
        assert place.source.resolve(place.reference).value == FIRST.encode()
        place.close()

    def test_a_host_without_credentials_is_denied(self, tmp_path: Path) -> None:
        pytest.importorskip("botocore")
        from ringfence.vault.sources.aws import AwsSource

        (tmp_path / "empty").touch()
        fields = {"region": "eu-central-1", "profile": "ci", "credentials_file": tmp_path / "empty"}
        source = AwsSource(AwsService.model_validate(fields), 60.0)
        with pytest.raises(UnavailableError) as caught:
            source.resolve(parse("aws-sm://x"))
        assert caught.value.code == "secret-denied"


class GcpPlace(Place):
    def __init__(self, directory: Path, kind: str) -> None:
        from ringfence.vault.sources.gcp import GcpSource

        self.server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Google)
        self.server.daemon_threads = True
        self.server.secrets, self.server.tokens, self.server.barred = {}, 0, False
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        self.relay = Relay(self.server.server_port)
        endpoint = f"http://127.0.0.1:{self.relay.port}"
        file = directory / "credentials.json"
        file.write_text(json.dumps(credentials(kind, endpoint, directory)))
        service = GcpService.model_validate({"endpoint": endpoint, "credentials_file": file})
        self.source: SecretSource = GcpSource(service, 60.0)
        self.reference = parse("gcp-sm://acme/github")

    def put(self, value: str) -> None:
        self.server.secrets.setdefault("github", []).append(value)

    @contextmanager
    def away(self) -> Iterator[None]:
        with self.relay.cut():
            yield

    @contextmanager
    def barred(self) -> Iterator[None]:
        self.server.barred = True
        yield
        self.server.barred = False

    def close(self) -> None:
        self.source.close()
        self.relay.close()
        self.server.shutdown()
        self.server.server_close()


class TestGcp(SecretSourceContract):
    @pytest.fixture
    def place(self, tmp_path: Path) -> Iterator[GcpPlace]:
        pytest.importorskip("google.auth")
        place = GcpPlace(tmp_path, "federated")
        yield place
        place.close()

    def test_a_service_account_has_a_key(self, tmp_path: Path) -> None:
        pytest.importorskip("google.auth")
        place = GcpPlace(tmp_path, "key")
        place.put(FIRST)
        assert place.source.resolve(place.reference).value == FIRST.encode()
        assert place.source.resolve(place.reference).version == "1"
        assert place.server.tokens == 1
        place.close()

    def test_a_redirect_takes_no_token_anywhere(self, tmp_path: Path) -> None:
        pytest.importorskip("google.auth")
        place = GcpPlace(tmp_path, "key")
        try:
            with pytest.raises(UnavailableError, match="redirects") as caught:
                place.source.resolve(parse("gcp-sm://acme/redirect"))
            assert caught.value.code == "secret-unreachable"
        finally:
            place.close()


def test_the_libraries_of_clouds_are_not_imported_for_others() -> None:
    import subprocess

    code = "import sys, ringfence.keeper, ringfence.wiring, ringfence.vault.keeper\nprint([m for m in ('botocore', 'google.auth', 'keyring') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
