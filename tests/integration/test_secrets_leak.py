"""One canary of every source at once, through real processes and real stores: who has seen one."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from clouds import Google, administrator, credentials, moto
from leaks import in_files, in_memory, in_processes
from openbao import Openbao, database_users
from ringfence.vault.keys import VaultPaths
from ringfence.vault.seal import set_credential
from secrets_rig import HOST, Placed, placed

CANARIES = {
    name: f"cnry-{name}-0123456789-abcdef"
    for name in ("file", "unit", "sealed", "bao", "aws", "gcp", "ring")
}
RING = """
import keyring.backend
from keyring.errors import PasswordSetError

class Ring(keyring.backend.KeyringBackend):
    priority = 9

    def get_password(self, service, username):
        return %r if (service, username) == ("ci", "github") else None

    def set_password(self, service, username, password):
        raise PasswordSetError("it is read alone")  # the vault's own key goes into its file
"""


def private(path: Path, text: str) -> Path:
    path.touch(0o600)
    path.write_text(text)
    return path


class Stores:
    """Every place that a secret may lie in, and the settings that name them. keys: what opens
    them, which nobody else may see either.
    """

    def __init__(self, stack: ExitStack, place: Path, bao: Openbao, postgres: Any) -> None:
        self.settings: dict[str, Any] = {"credentials": {}, "max_age_seconds": 3600.0}
        self.keys: list[str] = []
        self._stack, self._place = stack, place
        self._named("file", f"file://{private(place / 'file', CANARIES['file'])}")
        (place / "systemd").mkdir()
        private(place / "systemd" / "unit", CANARIES["unit"])
        self._named("unit", "credential://unit")
        self._named("sealed", "sealed://own")
        self._openbao(bao, postgres)
        self._aws()
        self._google()
        if os.geteuid() != 0:  # a keyring is a person's
            self._keyring()

    def _named(self, name: str, source: str) -> None:
        self.settings["credentials"][name] = {"source": source}

    def _openbao(self, bao: Openbao, postgres: Any) -> None:
        database_users(bao, postgres)
        bao.put("leak/one", token=CANARIES["bao"])
        bao.policy("leak", 'path "secret/data/leak/*" { capabilities = ["read"] }')
        token = bao.token("leak", policies=["leak", "dynamic"], ttl="1h")
        self.keys.append(token)
        self.settings["vault"] = {
            "address": bao.address,
            "ca_file": str(bao.ca_file),
            "token_file": str(private(self._place / "vault-token", token)),
        }
        self._named("bao", "vault://secret/leak/one#token")
        self._named("lease", "vault-lease://database/creds/ci#password")

    def _aws(self) -> None:
        port = self._stack.enter_context(moto())
        administrator(port).create_secret(
            Name="leak", SecretString=json.dumps({"token": CANARIES["aws"]})
        )
        self.keys.append("host-secret-key-0123456789")
        text = f"[ci]\naws_access_key_id = AKIAHOST\naws_secret_access_key = {self.keys[-1]}\n"
        self.settings["aws"] = {
            "region": "eu-central-1",
            "endpoint": f"http://127.0.0.1:{port}",
            "credentials_file": str(private(self._place / "aws", text)),
            "profile": "ci",
        }
        self._named("aws", "aws-sm://leak#token")

    def _google(self) -> None:
        server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Google)
        server.daemon_threads = True
        server.secrets, server.tokens, server.barred = {"leak": [CANARIES["gcp"]]}, 0, False
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        self._stack.callback(server.server_close)
        self._stack.callback(server.shutdown)
        endpoint = f"http://127.0.0.1:{server.server_port}"
        made = credentials("key", endpoint, self._place)
        self.keys += [made["private_key"].splitlines()[3], "ya29.1"]
        self.settings["gcp"] = {
            "endpoint": endpoint,
            "credentials_file": str(private(self._place / "gcp", json.dumps(made))),
        }
        self._named("gcp", "gcp-sm://acme/leak")

    def _keyring(self) -> None:
        (self._place / "rings").mkdir()
        (self._place / "rings" / "leak_ring.py").write_text(RING % CANARIES["ring"])
        (self._place / "python_keyring").mkdir()
        (self._place / "python_keyring" / "keyringrc.cfg").write_text(
            f"[backend]\ndefault-keyring=leak_ring.Ring\nkeyring-path={self._place / 'rings'}\n"
        )
        self._named("ring", "keyring://ci/github")


@pytest.fixture
def stores(
    openbao_server: Openbao,
    postgres_server: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Stores]:
    for library in ("moto.server", "botocore", "google.auth", "keyring"):
        pytest.importorskip(library)
    import keyring

    # `vault set` of this process finds the ring, too
    before = keyring.get_keyring()
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path / "systemd"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    with ExitStack() as stack:
        stack.callback(keyring.set_keyring, before)
        keyring.core.init_backend()
        yield Stores(stack, tmp_path, openbao_server, postgres_server)


async def shown(at: Placed, names: list[str]) -> tuple[dict[str, str], list[bytes]]:
    """What the upstream was shown of each, and what came back in."""
    values, bodies = {}, []
    for name in names:
        status, reason, body = await at.get(await at.open(f"sb_{name}", name))
        assert (status, reason) == (401, ""), (name, reason)  # it takes none, and repeats each
        values[name] = at.upstream.seen[-1][1].removeprefix("Bearer ")
        bodies.append(body)
    return values, bodies


@pytest.mark.storm
async def test_no_value_of_any_source_is_seen_by_anybody_outside_egress(
    stores: Stores, capfd: pytest.CaptureFixture[str]
) -> None:
    names = sorted(stores.settings["credentials"])
    gone = {"gone": {"source": "aws-sm://gone"}, "void": {"source": "vault://secret/leak/no#x"}}
    stores.settings["credentials"] |= gone
    async with placed(stores.settings) as at:
        set_credential(VaultPaths(at.state), "own", CANARIES["sealed"], (HOST,))
        values, bodies = await shown(at, names)
        assert values.items() >= {name: CANARIES[name] for name in names if name != "lease"}.items()
        assert len(values["lease"]) >= 16  # a password that the database made
        for name in gone:
            status, reason, body = await at.get(await at.open(f"sb_{name}", name))
            assert (status, reason) == (403, "credential-absent")
            bodies.append(body)
        secrets = [*values.values(), *stores.keys]
        processes = {at.egress.pid, at.keeper, at.starter}
        assert processes <= in_processes(secrets)
        for pid in processes:
            limits = Path(f"/proc/{pid}/limits").read_text()
            line = next(one for one in limits.splitlines() if one.startswith("Max core file size"))
            assert line.split()[4:6] == ["0", "0"], line
        if os.geteuid() == 0:
            # whoever looks finds them where they must be, and nowhere else
            assert in_memory(at.egress.pid, secrets) == set(values.values())
            assert in_memory(at.starter, secrets) == set()
            found = in_memory(at.keeper, secrets)
            assert found is not None
            assert found & set(stores.keys)
        before = cores()
        os.kill(at.keeper, signal.SIGSEGV)
        bodies.append((await at.get(at.state / "sb_file.sock"))[2])
        assert cores() == before
        seen = b"".join(bodies) + repr(at.notices).encode()
        assert seen.count(b"[redacted]") >= len(names)
        assert not [one for one in secrets if one.encode() in seen]
        assert in_files(at.state, secrets) == []
    assert in_files(at.state, secrets) == []
    said = capfd.readouterr()
    assert not [one for one in secrets if one in said.out + said.err]


def cores() -> set[str]:
    """Names of core files where the kernel would put them: the keeper's directory is /."""
    pattern = Path("/proc/sys/kernel/core_pattern").read_text().strip()
    place = Path(pattern).parent if pattern.startswith("/") else Path("/")
    return {one.name for one in place.glob("*core*")}
