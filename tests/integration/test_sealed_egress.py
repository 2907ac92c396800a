"""A tenant's credential from the store to an upstream, through a real egress process: the worker
carries what it cannot open, and each sandbox has its own and no other's.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import ssl
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ringfence.channel.link import EgressLink
from ringfence.channel.messages import CloseSandbox, Configure, OpenSandbox, SealedCredential
from ringfence.channel.spawn import EgressProcess
from ringfence.errors import UnavailableError
from ringfence.policy.codec import egress_to_json
from ringfence.policy.compiled import EgressRules, HostRule
from ringfence.record.client import RecorderClient, RecorderProcess
from ringfence.testing.upstream import Upstream, UpstreamSettings
from ringfence.vault.keys import VaultPaths, public_key
from ringfence.vault.tenants import Bound, key_id, seal_bound
from ringfence.worker.sealed import Sealed

HOST, OTHER = "mcp.rig-test.com", "other.rig-test.com"
CANARY = "cnry-tenant-0123456789-abcdef"
RULES = EgressRules(hosts=(HostRule(host=HOST), HostRule(host=OTHER)))


@dataclass
class Place:
    state: Path
    link: EgressLink
    upstream: Upstream
    notices: list[Any]

    def credential(self, value: str = CANARY, **more: Any) -> SealedCredential:
        """As the store has it, for tenant `acme`."""
        fields: dict[str, Any] = {
            "vault_id": "vlt_1",
            "credential_id": "vcrd_1",
            "host": HOST,
            **more,
        }
        tenant = fields.pop("tenant", "acme")
        public = public_key(VaultPaths(self.state))
        sealed = seal_bound(public, value, Bound(tenant=tenant, **fields))
        return SealedCredential(key_id=key_id(public), sealed=sealed, **fields)

    async def open(self, name: str, sealed: Sealed | None, **more: Any) -> Path:
        rules, credentials, _ = sealed.bound(RULES) if sealed else (RULES, [], ())
        path = self.state / f"{name}.sock"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            path.chmod(0o666)
            listener.listen()
            fields = {
                "rules": egress_to_json(rules),
                "tenant": sealed.tenant if sealed else "",
                "credentials": credentials,
                **more,
            }
            await self.link.request(
                OpenSandbox,
                descriptors=[listener.fileno()],
                sandbox_id=name,
                run_id="run_1",
                session_id="sesn_1",
                **fields,
            )
        return path

    async def get(self, path: Path, host: str, target: str = "/x") -> bytes:
        """As a client inside does it."""
        return await asyncio.to_thread(self._get, path, host, target)

    def _get(self, path: Path, host: str, target: str) -> bytes:
        context = ssl.create_default_context(cafile=str(self.state / "ca" / "ca.pem"))
        with socket.socket(socket.AF_UNIX) as plain:
            plain.settimeout(60)
            plain.connect(str(path))
            plain.sendall(f"CONNECT {host}:443 HTTP/1.1\r\nhost: {host}:443\r\n\r\n".encode())
            answer = b""
            while not answer.endswith(b"\r\n\r\n"):
                if not (data := plain.recv(1)):
                    return answer
                answer += data
            if b" 200 " not in answer:
                return answer + plain.recv(65_536)
            with context.wrap_socket(plain, server_hostname=host) as secure:
                head = f"GET {target} HTTP/1.1\r\nhost: {host}\r\nauthorization: Bearer mine\r\n"
                secure.sendall(head.encode() + b"connection: close\r\n\r\n")
                return b"".join(iter(lambda: secure.recv(65_536), b""))

    def sent(self) -> list[str]:
        return [
            value
            for seen in self.upstream.seen
            for name, value in seen.headers
            if name.lower() == "authorization"
        ]


@asynccontextmanager
async def place(*, opens: bool = True) -> AsyncIterator[Place]:
    state = Path(tempfile.mkdtemp(prefix="rfse"))
    state.chmod(0o755)
    async with AsyncExitStack() as stack:
        stack.callback(shutil.rmtree, state, ignore_errors=True)
        upstream = stack.enter_context(Upstream(UpstreamSettings(hosts=[HOST, OTHER])))
        paths = VaultPaths(state)
        public_key(paths)
        recorder = RecorderProcess.start(state / "audit")
        stack.push_async_callback(asyncio.to_thread, recorder.close)
        egress = EgressProcess.start()
        stack.push_async_callback(asyncio.to_thread, egress.close)
        worker = RecorderClient(recorder.sockets["worker"])
        stack.push_async_callback(worker.close)
        notices: list[Any] = []
        link = EgressLink(egress.connection, notices.append)
        stack.push_async_callback(link.close)
        await worker.ready()
        await link.request(
            Configure,
            descriptors=[recorder.sockets["egress"].fileno()],
            providers={},
            key_path=str(paths.key),
            opens_tenants=opens,
            ca_dir=str(state / "ca"),
            upstream_overrides={
                f"{host}:443": f"127.0.0.1:{upstream.port}" for host in (HOST, OTHER)
            },
            upstream_ca=str(upstream.ca_file),
            drop_to_uid=1_999_999 if os.geteuid() == 0 else None,
        )
        recorder.sockets["egress"].close()
        yield Place(state=state, link=link, upstream=upstream, notices=notices)


def everything(state: Path) -> bytes:
    """All files of the state directory, the audit log among them."""
    return b"".join(path.read_bytes() for path in state.rglob("*") if path.is_file())


async def test_it_is_set_on_its_host_and_seen_nowhere_else() -> None:
    async with place() as at:
        one = at.credential()
        path = await at.open("sb_1", Sealed(tenant="acme", credentials=(one,)))
        answer = await at.get(path, HOST, "/echo")
        assert b" 200 " in answer
        # what the client brought is overwritten, and an upstream that echoes is redacted
        assert at.sent() == [f"Bearer {CANARY}"]
        assert CANARY.encode() not in answer
        await at.get(path, OTHER)
        assert at.sent()[1:] == ["Bearer mine"]
        # of another sandbox, of the same tenant or not, it is not
        bare = await at.open("sb_2", None)
        await at.get(bare, HOST)
        assert at.sent()[2:] == ["Bearer mine"]
        detail = await at.link.request(CloseSandbox, sandbox_id="sb_1")
        kept = everything(at.state)
        assert b"vcrd_1" in kept
        assert CANARY.encode() not in kept
        for shown in (repr(at.notices), repr(detail), repr(one), one.sealed):
            assert CANARY not in shown


@pytest.mark.parametrize(
    ("tenant", "change"),
    [
        ("rival", {}),
        ("acme", {"vault_id": "vlt_2"}),
        ("acme", {"credential_id": "vcrd_2"}),
        ("acme", {"host": OTHER}),
        ("acme", {"expires_at": 1 << 60}),
        ("acme", {"key_id": "0" * 16}),
        ("", {}),
    ],
)
async def test_what_was_moved_opens_no_sandbox(tenant: str, change: dict[str, Any]) -> None:
    async with place() as at:
        one = at.credential().model_copy(update=change)
        with pytest.raises(UnavailableError) as caught:
            await at.open("sb_1", Sealed(tenant=tenant, credentials=(one,)))
        assert caught.value.code == "vault-refused"
        assert CANARY not in caught.value.render()
        # the process lives on, and the allowed twin opens
        path = await at.open("sb_2", Sealed(tenant="acme", credentials=(at.credential(),)))
        await at.get(path, HOST)
        assert at.sent() == [f"Bearer {CANARY}"]


async def test_rules_that_name_another_host_do_not_lead_it_there() -> None:
    """A worker that is not itself any more writes the rules; the seal names the host."""
    from dataclasses import replace

    from ringfence.policy.compiled import CredentialRule

    async with place() as at:
        one = at.credential()
        rules = replace(
            RULES,
            hosts=(HostRule(host=HOST), HostRule(host=OTHER, credential="vcrd_1")),
            credentials=(CredentialRule(name="vcrd_1", hosts=(OTHER, HOST)),),
        )
        path = await at.open(
            "sb_1",
            Sealed(tenant="acme", credentials=(one,)),
            rules=egress_to_json(rules),
        )
        answer = await at.get(path, OTHER)
        assert b"credential-not-for-host" in answer
        assert at.upstream.seen == []


async def test_past_its_expiry_it_goes_nowhere() -> None:
    async with place() as at:
        over = at.credential(expires_at=int((time.time() - 1) * 1e6))
        path = await at.open("sb_1", Sealed(tenant="acme", credentials=(over,)))
        assert b"credential-expired" in await at.get(path, HOST)
        assert at.upstream.seen == []
        good = at.credential(expires_at=int((time.time() + 600) * 1e6))
        path = await at.open("sb_2", Sealed(tenant="acme", credentials=(good,)))
        await at.get(path, HOST)
        assert at.sent() == [f"Bearer {CANARY}"]


async def test_a_process_that_was_not_told_opens_nothing() -> None:
    async with place(opens=False) as at:
        with pytest.raises(UnavailableError) as caught:
            await at.open("sb_1", Sealed(tenant="acme", credentials=(at.credential(),)))
        assert caught.value.code == "vault-refused"
        assert b" 200 " in await at.get(await at.open("sb_2", None), HOST)
