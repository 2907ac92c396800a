"""The vault: sealed by anyone, opened by egress, shown by nobody."""

from __future__ import annotations

import copy
import json
import threading
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from ringfence.egress.credentials import CredentialError, Credentials, Secret
from ringfence.errors import CallerError, UnavailableError
from ringfence.policy.compiled import CredentialRule
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


def test_a_secret_shows_its_redacted_twin_only() -> None:
    secret = Secret(CANARY)
    credentials = Credentials({"a": secret})
    shown = f"{secret} {secret!r} {secret:>40} {credentials} {[secret]} { ({'a': secret}) }"
    assert CANARY not in shown
    assert CANARY not in repr(credentials.for_model("a", "x-api-key"))
    for breaking in (copy.copy, copy.deepcopy):
        with pytest.raises(TypeError):
            breaking(secret)


def test_a_credential_goes_to_its_hosts_only() -> None:
    credentials = Credentials({"gh": Secret(CANARY)})
    rule = CredentialRule(name="gh", hosts=("api.github.com",), header="Authorization")
    injection = credentials.for_host(rule, "api.github.com")
    assert injection.headers == ((b"authorization", f"Bearer {CANARY}".encode()),)
    with pytest.raises(CredentialError):
        credentials.for_host(rule, "evil.example")
    with pytest.raises(CredentialError):
        credentials.for_model("missing", "x-api-key")
