"""The vault: sealed by anyone, opened by egress, shown by nobody."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from ringfence.channel.spawn import egress_environment
from ringfence.egress.credentials import CredentialError, Credentials, Secret
from ringfence.errors import CallerError, UnavailableError
from ringfence.policy.compiled import CredentialRule
from ringfence.store import files
from ringfence.vault.box import BoxError, seal, unseal
from ringfence.vault.keys import VaultPaths
from ringfence.vault.open import open_vault
from ringfence.vault.seal import set_credential
from ringfence.vault.store import VaultFile

CANARY = "sk-CANARY-vault-0123456789"


@given(st.binary(max_size=100), st.binary(max_size=30))
def test_what_is_sealed_opens_with_its_key_and_context(value: bytes, context: bytes) -> None:
    private, other = X25519PrivateKey.generate(), X25519PrivateKey.generate()
    sealed = seal(private.public_key().public_bytes_raw(), value, context)
    assert unseal(private, sealed, context) == value
    for key, about in ((other, context), (private, context + b"x")):
        with pytest.raises(BoxError):
            unseal(key, sealed, about)


@given(st.text(max_size=200))
def test_garbage_does_not_open(text: str) -> None:
    with pytest.raises(BoxError):
        unseal(X25519PrivateKey.generate(), text, b"")


def test_set_open_remove(tmp_path: Path) -> None:
    paths = VaultPaths(tmp_path)
    entry = set_credential(paths, "anthropic", CANARY, ("api.anthropic.com",))
    assert CANARY not in repr(entry) + paths.store.read_text() + json.dumps(str(entry))
    vault = open_vault(paths.store, paths.key)
    assert vault.get("anthropic").reveal() == CANARY
    assert CANARY not in f"{vault} {vault.get('anthropic')!r} {vault.get('anthropic')}"
    VaultFile(paths.store).remove("anthropic")
    with pytest.raises(UnavailableError, match="holds no"):
        open_vault(paths.store, paths.key).get("anthropic")
    with pytest.raises(CallerError):
        VaultFile(paths.store).remove("anthropic")


@pytest.mark.parametrize("field", ["sealed", "hosts", "name"])
def test_a_changed_entry_is_refused(tmp_path: Path, field: str) -> None:
    paths = VaultPaths(tmp_path)
    set_credential(paths, "anthropic", CANARY, ("api.anthropic.com",))
    value = json.loads(paths.store.read_text())
    if field == "name":
        value["entries"] = {"other": value["entries"]["anthropic"]}
    elif field == "hosts":
        value["entries"]["anthropic"]["hosts"] = ["evil.example"]
    else:
        value["entries"]["anthropic"]["sealed"] = (
            value["entries"]["anthropic"]["sealed"][:-8] + "AAAAAAA="
        )
    paths.store.write_text(json.dumps(value))
    with pytest.raises(UnavailableError) as caught:
        open_vault(paths.store, paths.key)
    assert caught.value.code == "vault-refused"


@pytest.mark.parametrize("which", ["store", "key"])
def test_files_that_others_can_read_are_refused(tmp_path: Path, which: str) -> None:
    paths = VaultPaths(tmp_path)
    set_credential(paths, "anthropic", CANARY)
    getattr(paths, which).chmod(0o644)
    with pytest.raises(UnavailableError):
        open_vault(paths.store, paths.key)
    getattr(paths, which).chmod(0o600)
    assert open_vault(paths.store, paths.key).names() == ("anthropic",)


@pytest.mark.parametrize("name", ["sk-ant-api03-REAL", "A", "", "../x", "a b"])
def test_names_that_look_like_values_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(CallerError):
        set_credential(VaultPaths(tmp_path), name, CANARY)


@pytest.mark.parametrize("value", ["", "short", "has space in it", "line\nbreak-123", "x" * 9000])
def test_values_that_no_header_carries_are_refused(tmp_path: Path, value: str) -> None:
    with pytest.raises(CallerError) as caught:
        set_credential(VaultPaths(tmp_path), "a", value)
    assert not value or value not in str(caught.value)


def test_writers_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    paths = VaultPaths(tmp_path)
    set_credential(paths, "first", CANARY)
    threads = [
        threading.Thread(target=set_credential, args=(paths, f"name-{n}", CANARY))
        for n in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(VaultFile(paths.store).entries()) == 13


async def test_a_secret_shows_its_redacted_twin_only() -> None:
    secret = Secret(CANARY)
    credentials = Credentials({"a": secret})
    shown = f"{secret} {secret!r} {secret:>40} {credentials} {[secret]} { ({'a': secret}) }"
    assert CANARY not in shown
    assert CANARY not in repr(await credentials.for_model("a", "x-api-key", "api.anthropic.com"))
    for breaking in (copy.copy, copy.deepcopy):
        with pytest.raises(TypeError):
            breaking(secret)


async def test_a_credential_goes_to_its_hosts_only() -> None:
    credentials = Credentials({"gh": Secret(CANARY)})
    rule = CredentialRule(name="gh", hosts=("api.github.com",), header="Authorization")
    injection = await credentials.for_host(rule, "api.github.com")
    assert injection.headers == ((b"authorization", f"Bearer {CANARY}".encode()),)
    with pytest.raises(CredentialError):
        await credentials.for_host(rule, "evil.example")
    with pytest.raises(CredentialError):
        await credentials.for_model("missing", "x-api-key", "api.anthropic.com")


async def test_a_credential_stays_with_the_hosts_it_was_sealed_for(tmp_path: Path) -> None:
    """Requirement L: a policy that names another host does not get it there."""
    paths = VaultPaths(tmp_path)
    set_credential(paths, "gh", CANARY, ("api.github.com",))
    opened = open_vault(paths.store, paths.key).get("gh")
    credentials = Credentials({"gh": Secret(opened.reveal(), opened.hosts)})
    rule = CredentialRule(name="gh", hosts=("api.github.com", "*.evil.example"))
    assert (await credentials.for_host(rule, "api.github.com")).headers
    assert (await credentials.for_model("gh", "x-api-key", "api.github.com")).headers
    with pytest.raises(CredentialError, match="not-for-host"):
        await credentials.for_host(rule, "api.evil.example")
    with pytest.raises(CredentialError, match="not-for-host"):
        await credentials.for_model("gh", "x-api-key", "api.anthropic.com")


@pytest.mark.parametrize("host", ["", "*", "https://api.github.com", "10.0.0.1", "API.github.com"])
def test_hosts_are_written_as_in_a_policy(tmp_path: Path, host: str) -> None:
    with pytest.raises(CallerError) as caught:
        set_credential(VaultPaths(tmp_path), "gh", CANARY, (host,))
    assert caught.value.code == "credential-host"
    assert list(tmp_path.iterdir()) == []


def test_first_writers_at_the_same_time_make_one_pair(tmp_path: Path) -> None:
    paths = VaultPaths(tmp_path)
    gate = threading.Barrier(8)

    def write(number: int) -> None:
        gate.wait()
        set_credential(paths, f"name-{number}", CANARY)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(open_vault(paths.store, paths.key).names()) == 8


@pytest.mark.parametrize(
    ("name", "content"),
    [("public.key", b"x"), ("public.key", b"\xff"), ("store.json", b"[" * 100_000), ("store.json", b"[]"), ("key", b"")],
)  # fmt: skip
def test_damaged_files_are_one_clear_error(tmp_path: Path, name: str, content: bytes) -> None:
    paths = VaultPaths(tmp_path)
    set_credential(paths, "gh", CANARY)
    (tmp_path / "vault" / name).write_bytes(content)
    with pytest.raises(UnavailableError) as caught:
        set_credential(paths, "gh", CANARY)
        open_vault(paths.store, paths.key)
    assert caught.value.code == "vault-refused"


def test_a_directory_in_the_place_of_a_file_is_one_clear_error(tmp_path: Path) -> None:
    paths = VaultPaths(tmp_path)
    set_credential(paths, "gh", CANARY)
    paths.store.unlink()
    paths.store.symlink_to("/etc/passwd")
    with pytest.raises(UnavailableError) as caught:
        VaultFile(paths.store).entries()
    assert caught.value.code == "vault-refused"


@pytest.mark.user
def test_a_state_directory_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir(mode=0o500)
    with pytest.raises(UnavailableError) as caught:
        set_credential(VaultPaths(tmp_path / "state"), "gh", CANARY)
    assert caught.value.code == "state-refused"


def test_a_public_half_that_was_lost_is_made_again(tmp_path: Path) -> None:
    paths = VaultPaths(tmp_path)
    set_credential(paths, "gh", CANARY)
    paths.public.unlink()
    set_credential(paths, "other", CANARY)
    assert open_vault(paths.store, paths.key).names() == ("gh", "other")


def test_removing_what_is_not_there_makes_nothing(tmp_path: Path) -> None:
    with pytest.raises(CallerError):
        VaultFile(VaultPaths(tmp_path / "state").store).remove("gh")
    assert not (tmp_path / "state").exists()


def test_a_file_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.create_whole(tmp_path / "key", b"one")
    with pytest.raises(FileExistsError):
        files.create_whole(tmp_path / "key", b"two")
    monkeypatch.setattr(files.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full"):
        files.write_whole(tmp_path / "key", b"three")
    with pytest.raises(OSError, match="full"):
        files.create_whole(tmp_path / "other", b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["key"]
    assert (tmp_path / "key").read_bytes() == b"one"
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600


RING = """
import json, os
from keyring.backend import KeyringBackend
class Ring(KeyringBackend):
    priority = 9
    path = os.path.join(os.path.dirname(__file__), "ring.json")
    def get_password(self, service, name):
        try:
            return json.load(open(self.path)).get(service + name)
        except FileNotFoundError:
            return None
    def set_password(self, service, name, value):
        json.dump({service + name: value}, open(self.path, "w"))
    def delete_password(self, service, name):
        raise NotImplementedError
"""

USE = """
import os, sys
from pathlib import Path
from ringfence.vault.keys import VaultPaths
from ringfence.vault.seal import set_credential
set_credential(VaultPaths(Path(sys.argv[1])), "gh", sys.argv[2])
"""
OPEN = """
import os, sys
from pathlib import Path
from ringfence.vault.keys import VaultPaths
from ringfence.vault.open import open_vault
paths = VaultPaths(Path(sys.argv[1]))
print(open_vault(paths.store, paths.key).get("gh").reveal())
"""


@pytest.mark.user
def test_the_os_keyring_keeps_the_key_and_egress_finds_it(tmp_path: Path) -> None:
    """With the very environment that the egress process gets."""
    (tmp_path / ".config" / "python_keyring").mkdir(parents=True)
    (tmp_path / "ring").mkdir()
    (tmp_path / "ring" / "a_ring.py").write_text(RING)
    (tmp_path / ".config" / "python_keyring" / "keyringrc.cfg").write_text(
        f"[backend]\ndefault-keyring=a_ring.Ring\nkeyring-path={tmp_path / 'ring'}\n"
    )
    environment = {"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path / ".config")}

    def python(script: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-c", script, str(tmp_path / "state"), *arguments]
        return subprocess.run(
            argv, env=env, capture_output=True, text=True, timeout=60, check=False
        )

    done = python(USE, CANARY, **environment)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "state" / "vault" / "key").read_text() == "keyring"
    assert "ringfence-vault" in (tmp_path / "ring" / "ring.json").read_text()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "environ", {**os.environ, **environment, "ANTHROPIC_API_KEY": CANARY})
        given = egress_environment()
    assert CANARY not in given.values()
    done = python(OPEN, **given)
    assert done.stdout == CANARY + "\n", done.stderr
    done = python(OPEN)
    assert done.returncode != 0
    assert "vault-refused" in done.stderr or "OS keyring" in done.stderr
