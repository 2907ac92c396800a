"""Vaults through the official client: what is sealed is never seen again, on both databases."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import anthropic
import pytest
from anthropic import Anthropic
from sqlalchemy import update

from gateway_rig import Rig, caller
from ringfence.channel.messages import SealedCredential
from ringfence.control import vaults
from ringfence.errors import CallerError, UnavailableError
from ringfence.store import vaults as rows
from ringfence.store.tables import METADATA, VAULT_CREDENTIALS
from ringfence.vault.keys import VaultPaths
from ringfence.vault.open import TenantOpener
from ringfence.vault.tenants import Bound

CANARY = "cnry-0123456789-vault+/=abcdef"
URL = "https://mcp.example.com/github"


@pytest.fixture(scope="module")
def rig(place: Any) -> Rig:
    return Rig(place=place)


@pytest.fixture(scope="module")
def base(rig: Rig) -> Iterator[str]:
    with rig.serving() as url:
        yield url


def own_name(request: pytest.FixtureRequest) -> str:
    return hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:16]


@pytest.fixture
def tenant(rig: Rig, request: pytest.FixtureRequest) -> str:
    return rig.key(own_name(request)).row.tenant_id


@pytest.fixture
def client(rig: Rig, base: str, request: pytest.FixtureRequest) -> Iterator[Anthropic]:
    key = rig.key(own_name(request)).text
    with Anthropic(base_url=base, api_key=key, max_retries=0) as made:
        yield made


def bearer(token: str = CANARY, url: str = URL) -> Any:
    return {"type": "static_bearer", "token": token, "mcp_server_url": url}


def act(rig: Rig, work: Any) -> Any:
    async def whole() -> Any:
        database = rig.place.open()
        try:
            async with database.writing() as connection:
                return await work(connection)
        finally:
            await database.close()

    return asyncio.run(whole())


def sealed(rig: Rig, tenant: str, vault: str) -> list[SealedCredential]:
    return list(act(rig, lambda tx: vaults.for_session(tx, tenant, [vault])))


def opened(rig: Rig, tenant: str, one: SealedCredential) -> str:
    """As the egress process does it."""
    bound = Bound(
        tenant=tenant,
        vault_id=one.vault_id,
        credential_id=one.credential_id,
        host=one.host,
        expires_at=one.expires_at,
    )
    return TenantOpener(VaultPaths(rig.state).key).open(one.sealed, bound, one.key_id).reveal()


def test_a_vault_is_created_changed_listed_archived_and_deleted(client: Anthropic) -> None:
    made = client.beta.vaults.create(display_name="Team", metadata={"a": "1", "b": "2"})
    assert (made.type, made.display_name, made.archived_at) == ("vault", "Team", None)
    changed = client.beta.vaults.update(made.id, display_name="T", metadata={"a": None, "c": "3"})
    assert (changed.display_name, changed.metadata) == ("T", {"b": "2", "c": "3"})
    assert client.beta.vaults.retrieve(made.id) == changed
    assert client.beta.vaults.update(made.id) == changed
    others = [client.beta.vaults.create(display_name=f"{n}").id for n in range(3)]
    assert [one.id for one in client.beta.vaults.list(limit=2)] == [*others[::-1], made.id]
    assert client.beta.vaults.archive(made.id).archived_at is not None
    assert made.id not in [one.id for one in client.beta.vaults.list()]
    assert made.id in [one.id for one in client.beta.vaults.list(include_archived=True)]
    with pytest.raises(anthropic.BadRequestError) as caught:
        client.beta.vaults.update(made.id, display_name="x")
    assert caught.value.error_code == "vault_archived"
    gone = client.beta.vaults.delete(made.id)
    assert (gone.id, gone.type) == (made.id, "vault_deleted")
    with pytest.raises(anthropic.NotFoundError) as missing:
        client.beta.vaults.retrieve(made.id)
    assert missing.value.error_code == "vault_not_found"


def test_a_credential_is_sealed_renewed_archived_and_deleted(
    rig: Rig, client: Anthropic, tenant: str
) -> None:
    vault = client.beta.vaults.create(display_name="v").id
    api = client.beta.vaults.credentials
    made = api.create(vault, auth=bearer(), display_name="gh", metadata={"a": "1"})
    assert (made.type, made.vault_id, made.display_name) == ("vault_credential", vault, "gh")
    assert made.auth.type == "static_bearer"
    assert made.auth.mcp_server_url == URL
    assert api.retrieve(made.id, vault_id=vault) == made
    assert [one.id for one in api.list(vault)] == [made.id]
    (one,) = sealed(rig, tenant, vault)
    assert one.host == "mcp.example.com"
    assert opened(rig, tenant, one) == CANARY

    other = CANARY[::-1]
    changed = api.update(
        made.id,
        vault_id=vault,
        auth={"type": "static_bearer", "token": other},
        metadata={"a": None, "b": "2"},
    )
    assert changed.metadata == {"b": "2"}
    assert changed.updated_at > made.updated_at
    (renewed,) = sealed(rig, tenant, vault)
    assert opened(rig, tenant, renewed) == other
    # a name alone leaves the value as it is
    assert api.update(made.id, vault_id=vault, display_name="n").display_name == "n"
    assert sealed(rig, tenant, vault) == [renewed]

    assert api.archive(made.id, vault_id=vault).archived_at is not None
    assert sealed(rig, tenant, vault) == []
    row = act(rig, lambda tx: rows.get_credential(tx, tenant, vault, made.id))
    assert row.sealed is None
    with pytest.raises(anthropic.BadRequestError) as caught:
        api.update(made.id, vault_id=vault, display_name="x")
    assert caught.value.error_code == "credential_archived"
    assert api.delete(made.id, vault_id=vault).type == "vault_credential_deleted"
    with pytest.raises(anthropic.NotFoundError) as missing:
        api.retrieve(made.id, vault_id=vault)
    assert missing.value.error_code == "credential_not_found"


def test_an_access_token_is_good_until_it_expires(rig: Rig, client: Anthropic, tenant: str) -> None:
    vault = client.beta.vaults.create(display_name="v").id
    api = client.beta.vaults.credentials
    end = datetime.now(UTC) + timedelta(hours=1)
    auth: Any = {"type": "mcp_oauth", "access_token": CANARY, "mcp_server_url": URL}
    made = api.create(vault, auth={**auth, "expires_at": end})
    assert made.auth.type == "mcp_oauth"
    assert made.auth.expires_at == end
    assert made.auth.refresh is None
    (one,) = sealed(rig, tenant, vault)
    assert one.expires_at == int(end.timestamp() * 1_000_000)
    # the expiry is sealed with the value, so that it is changed with it alone
    with pytest.raises(anthropic.BadRequestError, match="access_token"):
        api.update(made.id, vault_id=vault, auth={"type": "mcp_oauth", "expires_at": end})
    with pytest.raises(UnavailableError):
        opened(rig, tenant, one.model_copy(update={"expires_at": None}))
    for wrong in (
        {**auth, "expires_at": datetime.now(UTC) - timedelta(seconds=1)},
        {**auth, "refresh": {"client_id": "c", "refresh_token": CANARY, "token_endpoint": URL,
                             "token_endpoint_auth": {"type": "none"}}},
        {"type": "environment_variable", "secret_name": "A", "secret_value": CANARY,
         "networking": {"type": "unrestricted"}},
        {"type": "static_bearer", "token": "x", "mcp_server_url": URL},
        {"type": "static_bearer", "token": CANARY + "\r\nx: y", "mcp_server_url": URL},
        bearer(url="http://mcp.example.com/"),
        bearer(url="https://user@mcp.example.com/"),
        bearer(url="https://mcp.example.com:8443/"),
        bearer(url="https://*.example.com/"),
        bearer(url="https://10.0.0.1/"),
        bearer(url="https://MCP.example.com/"),
    ):  # fmt: skip
        with pytest.raises(anthropic.BadRequestError) as caught:
            api.create(vault, auth=wrong)  # type: ignore[arg-type]
        assert CANARY not in str(caught.value)
        assert CANARY not in json.dumps(caught.value.body)
    with pytest.raises(anthropic.BadRequestError, match="type of a credential"):
        api.update(made.id, vault_id=vault, auth={"type": "static_bearer", "token": CANARY})
    assert sealed(rig, tenant, vault) == [one]


def test_what_is_not_held_is_refused_by_name(client: Anthropic) -> None:
    vault = client.beta.vaults.create(display_name="v").id
    with pytest.raises(anthropic.BadRequestError, match="`environment_variable` is not supported"):
        client.beta.vaults.credentials.create(
            vault,
            auth={
                "type": "environment_variable",
                "secret_name": "A",
                "secret_value": CANARY,
                "networking": {"type": "unrestricted"},
            },
        )
    made = client.beta.vaults.credentials.create(vault, auth=bearer())
    with pytest.raises(anthropic.NotFoundError, match="mcp_oauth_validate is not supported"):
        client.beta.vaults.credentials.mcp_oauth_validate(made.id, vault_id=vault)


def test_one_host_has_one_credential(client: Anthropic) -> None:
    vault = client.beta.vaults.create(display_name="v").id
    api = client.beta.vaults.credentials
    first = api.create(vault, auth=bearer())
    with pytest.raises(anthropic.ConflictError) as caught:
        api.create(vault, auth=bearer(url="https://mcp.example.com/other"))
    assert caught.value.error_code == "credential_conflict"
    assert api.create(vault, auth=bearer(url="https://other.example.com/")).id
    api.archive(first.id, vault_id=vault)
    assert api.create(vault, auth=bearer()).id


def test_an_archived_vault_gives_nothing_to_a_session(
    rig: Rig, client: Anthropic, tenant: str
) -> None:
    vault = client.beta.vaults.create(display_name="v").id
    client.beta.vaults.credentials.create(vault, auth=bearer())
    assert len(sealed(rig, tenant, vault)) == 1
    client.beta.vaults.archive(vault)
    with pytest.raises(CallerError) as caught:
        sealed(rig, tenant, vault)
    assert caught.value.code == "vault-archived"
    (row,) = act(rig, lambda tx: _every(tx, tenant))
    assert row.sealed is None
    assert row.archived_at is not None
    with pytest.raises(anthropic.BadRequestError):
        client.beta.vaults.credentials.create(vault, auth=bearer())


async def _every(tx: Any, tenant: str) -> Any:
    query = VAULT_CREDENTIALS.select().where(VAULT_CREDENTIALS.c.tenant_id == tenant)
    return list(await tx.execute(query))


def test_a_session_never_gets_a_vault_of_another_tenant(
    rig: Rig, client: Anthropic, tenant: str
) -> None:
    vault = client.beta.vaults.create(display_name="v").id
    client.beta.vaults.credentials.create(vault, auth=bearer())
    with pytest.raises(CallerError) as caught:
        sealed(rig, rig.key("rival").row.tenant_id, vault)
    assert caught.value.code == "vault-not-found"


@pytest.mark.parametrize("field", ["tenant", "vault_id", "credential_id", "host", "expires_at"])
def test_a_row_that_was_moved_or_edited_does_not_open(
    rig: Rig, client: Anthropic, tenant: str, field: str
) -> None:
    """Whoever can write to the database gets no value that way."""
    vault = client.beta.vaults.create(display_name="v").id
    client.beta.vaults.credentials.create(vault, auth=bearer())
    (one,) = sealed(rig, tenant, vault)
    assert opened(rig, tenant, one) == CANARY
    changes = {
        "vault_id": "vlt_other",
        "credential_id": "vcrd_other",
        "host": "evil.example.org",
        "expires_at": 1 << 60,
    }
    moved = one if field == "tenant" else one.model_copy(update={field: changes[field]})
    with pytest.raises(UnavailableError) as caught:
        opened(rig, rig.key("rival").row.tenant_id if field == "tenant" else tenant, moved)
    assert caught.value.code == "vault-refused"


def test_a_gateway_with_another_key_seals_nothing(rig: Rig, client: Anthropic) -> None:
    """What it sealed, no egress process of the deployment could open."""
    vault = client.beta.vaults.create(display_name="v").id
    made = client.beta.vaults.credentials.create(vault, auth=bearer())
    paths = VaultPaths(rig.state)
    kept = paths.public.read_bytes()
    paths.public.write_bytes(b"A" * 43 + b"=\n")
    try:
        with pytest.raises(anthropic.InternalServerError) as caught:
            client.beta.vaults.credentials.update(
                made.id, vault_id=vault, auth={"type": "static_bearer", "token": CANARY}
            )
        assert (caught.value.status_code, caught.value.error_code) == (503, "vault_refused")
        # what needs no key goes on
        assert client.beta.vaults.credentials.retrieve(made.id, vault_id=vault) == made
    finally:
        paths.public.write_bytes(kept)
    assert client.beta.vaults.credentials.update(
        made.id, vault_id=vault, auth={"type": "static_bearer", "token": CANARY}
    ).id


def test_a_key_that_is_changed_asks_for_every_value_again(
    rig: Rig, client: Anthropic, tenant: str
) -> None:
    vault = client.beta.vaults.create(display_name="v").id
    api = client.beta.vaults.credentials
    made = api.create(vault, auth=bearer())
    paths = VaultPaths(rig.state)
    old = {path: path.read_bytes() for path in (paths.key, paths.public)}
    for path in old:
        path.unlink()
    try:
        with pytest.raises(anthropic.InternalServerError):
            api.create(vault, auth=bearer(url="https://new.example.com/"))
        sealing = vaults.sealer(paths)
        assert act(rig, lambda tx: vaults.adopt(tx, sealing)) >= 1
        (one,) = sealed(rig, tenant, vault)
        with pytest.raises(UnavailableError) as caught:
            opened(rig, tenant, one)
        assert "another key" in caught.value.message
        auth: Any = {"type": "static_bearer", "token": CANARY[::-1]}
        api.update(made.id, vault_id=vault, auth=auth)
        (renewed,) = sealed(rig, tenant, vault)
        assert opened(rig, tenant, renewed) == CANARY[::-1]
    finally:
        for path, content in old.items():
            path.write_bytes(content)
        act(rig, lambda tx: vaults.adopt(tx, vaults.sealer(paths)))


def test_a_value_is_in_no_answer_no_log_and_no_dump(
    rig: Rig, base: str, client: Anthropic, request: pytest.FixtureRequest,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    vault = client.beta.vaults.create(display_name="v").id
    answers = []
    with caller(base, rig.key(own_name(request)).text, **{"Idempotency-Key": "once"}) as plain:
        target = f"/v1/vaults/{vault}/credentials"
        first = plain.post(target, json={"auth": bearer()})
        again = plain.post(target, json={"auth": bearer()})
        assert first.status_code == again.status_code == 200
        assert first.json() == again.json()
        other = plain.post(target, json={"auth": bearer(token=CANARY + "x")})
        assert other.status_code == 422
        identity = first.json()["id"]
        answers += [first, again, other]
    with caller(base, rig.key(own_name(request)).text) as plain:
        answers += [
            plain.get(f"{target}/{identity}"),
            plain.get(target),
            plain.get(f"/v1/vaults/{vault}"),
            # the value where it does not belong
            plain.post(target, json={"auth": {**bearer(), "tokn": CANARY}}),
            plain.post(target, json={"auth": {**bearer(), "token": [CANARY]}}),
            plain.post(target, json={"auth": {**bearer(), "token": CANARY + "\n"}}),
            plain.post(target, json={"auth": bearer(), "display_name": [CANARY]}),
            plain.post(target, content=b'{"auth": {"token": "' + CANARY.encode() + b'"'),
            plain.post(f"{target}/{identity}", json={"auth": bearer()}),
        ]
    logs = "".join(capfd.readouterr())
    assert target in logs
    shown = "".join(answer.text + str(answer.headers) for answer in answers)
    assert identity in shown
    digest = hashlib.sha256(json.dumps({"auth": bearer()}).encode()).hexdigest()
    for where in (shown, logs, _dump(rig)):
        assert CANARY not in where
        assert CANARY[:16] not in where
        assert digest not in where


def test_a_defect_logs_where_it_was_and_not_what_it_held(
    base: str, client: Anthropic, monkeypatch: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    """However the logger renders exceptions: the default one shows variables."""
    vault = client.beta.vaults.create(display_name="v").id

    async def broken(*_: Any) -> None:
        raise RuntimeError("a defect")

    with monkeypatch.context() as patch:
        patch.setattr(rows, "add_credential", broken)
        with pytest.raises(anthropic.InternalServerError) as caught:
            client.beta.vaults.credentials.create(vault, auth=bearer())
    assert caught.value.status_code == 500
    assert caught.value.error_code == "internal"
    logs = ""
    # the answer is sent before the line is written; what comes while `capfd` is read would be lost
    for _ in range(500):
        logs = "".join(Path(f"/proc/self/fd/{number}").read_text() for number in (1, 2))
        if "request failed" in logs and "status=500" in logs:
            break
        time.sleep(0.02)
    assert "a defect" in logs
    assert "in broken" in logs
    for secret in (CANARY, str(client.api_key)):
        assert secret not in logs + str(caught.value)
    assert client.beta.vaults.credentials.create(vault, auth=bearer()).id


def _dump(rig: Rig) -> str:
    """All rows of all tables, and the files of SQLite as they lie on the disk."""

    async def read(tx: Any) -> str:
        found = []
        for table in METADATA.sorted_tables:
            found += [repr(tuple(row)) for row in await tx.execute(table.select())]
        return "\n".join(found)

    dumped = str(act(rig, read))
    assert "static_bearer" in dumped
    if rig.place.path is not None:
        for path in rig.place.path.parent.glob("platform.sqlite*"):
            dumped += path.read_bytes().decode("latin-1")
    return dumped


def test_a_credential_that_is_replaced_by_hand_names_itself(
    rig: Rig, client: Anthropic, tenant: str
) -> None:
    """Two rows of one tenant, their values exchanged: neither opens."""
    vault = client.beta.vaults.create(display_name="v").id
    for host in ("a.example.com", "b.example.com"):
        client.beta.vaults.credentials.create(vault, auth=bearer(url=f"https://{host}/"))
    first, second = sealed(rig, tenant, vault)

    async def swap(tx: Any) -> None:
        for one, value in ((first, second.sealed), (second, first.sealed)):
            await tx.execute(
                update(VAULT_CREDENTIALS)
                .where(VAULT_CREDENTIALS.c.id == one.credential_id)
                .values(sealed=value)
            )

    act(rig, swap)
    for one in sealed(rig, tenant, vault):
        with pytest.raises(UnavailableError):
            opened(rig, tenant, one)


def test_a_vault_is_not_endless(rig: Rig, client: Anthropic, monkeypatch: Any) -> None:
    monkeypatch.setattr(vaults, "MAX_CREDENTIALS", 2)
    vault = client.beta.vaults.create(display_name="v").id
    for name in "ab":
        client.beta.vaults.credentials.create(
            vault, auth=bearer(url=f"https://{name}.example.com/")
        )
    with pytest.raises(anthropic.BadRequestError, match="at most 2"):
        client.beta.vaults.credentials.create(vault, auth=bearer())


def test_no_row_shows_a_sealed_value_by_accident(rig: Rig, client: Anthropic, tenant: str) -> None:
    vault = client.beta.vaults.create(display_name="v").id
    client.beta.vaults.credentials.create(vault, auth=bearer())
    (one,) = sealed(rig, tenant, vault)
    (row,) = act(rig, lambda tx: rows.active(tx, tenant, vault))
    assert row.sealed == one.sealed
    assert one.sealed not in repr(one) + repr(row) + repr(replace(row, host="x"))
