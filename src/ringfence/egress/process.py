"""The egress process: configured once, then it opens and closes sandboxes as the worker says."""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import ctypes
import gc
import os
import resource
import signal
import socket
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import uvloop

from ringfence.channel.link import Channel
from ringfence.channel.messages import (
    Ack,
    AddListener,
    AnyMessage,
    CloseSandbox,
    Configure,
    Message,
    ModelTurn,
    OpenSandbox,
    Refused,
    ToolDecided,
    witness_error,
)
from ringfence.config.secrets import RESERVED_CREDENTIAL, SecretSettings
from ringfence.egress.address import Resolver
from ringfence.egress.aside import Aside, fork_zygote
from ringfence.egress.credentials import Credentials, Secret
from ringfence.egress.faults import unforeseen
from ringfence.egress.keeping import KeeperLink
from ringfence.egress.lifetime import Ages
from ringfence.egress.model import RunState
from ringfence.egress.model.course import Patience
from ringfence.egress.resolving import Record, Resolving
from ringfence.egress.sandboxes import SandboxState, Shared
from ringfence.egress.server import Client
from ringfence.egress.tls import Authority, upstream_context
from ringfence.egress.turns import Turns
from ringfence.errors import RingfenceError, UnavailableError, missing_library
from ringfence.policy.call_input import CallInput
from ringfence.policy.codec import egress_from_json
from ringfence.record.client import RecorderClient
from ringfence.vault.login import bases
from ringfence.vault.open import TenantOpener, open_vault
from ringfence.vault.tenants import Bound

_SETTLE_SECONDS = 2.0
_LINGER_SECONDS = 0.004
"""The record of what went through may lie here so long, and a notice that only tells. Longer than a
request that finds a quick answer: the record of its end then goes with the next one's, and does not
occupy the disk before it. What is lost with this process is ends of what has a beginning on disk;
refusals and witnesses never lie here, nor what was asked for, where the audit log is waited for.
"""
_YOUNG = 20_000
"""Objects that may be made before cycles among them are looked for: some megabytes at most."""
_PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 4, 38


class Egress:
    """State of the process: what is shared, and the sandboxes by id."""

    def __init__(self, connection: socket.socket, zygote: socket.socket) -> None:
        self._aside = Aside(zygote)
        self._ended = asyncio.Event()
        self._shared: Shared | None = None
        self._opener: TenantOpener | None = None
        self._keeper: KeeperLink | None = None
        self._resolving: Resolving | None = None
        self._sandboxes: dict[str, SandboxState] = {}
        self._channel = Channel(connection, self._received, self._ended.set)

    async def serve(self) -> None:
        """Until the worker goes away: nothing is served for a worker that is gone."""
        await self._ended.wait()
        await _settle([task for box in self._sandboxes.values() for task in box.close()])
        if self._resolving is not None:
            self._resolving.close()
        if self._keeper is not None:
            await self._keeper.close()
        if self._shared is not None:
            await self._shared.recorder.close()
        self._aside.close()
        await self._channel.close()

    async def _received(self, message: AnyMessage, descriptors: list[int]) -> None:
        if isinstance(message, ModelTurn):
            if self._shared is not None and self._shared.turns is not None:
                self._shared.turns.told(message)
            return
        try:
            detail = await self._handle(message, descriptors)
        except RingfenceError as error:
            await self._channel.send(Refused(id=_id(message), error=error.to_json()))
        except Exception as error:  # noqa: BLE001  the worker must learn of it, without details
            await self._channel.send(Refused(id=_id(message), error=unforeseen(error).to_json()))
        else:
            await self._channel.send(Ack(id=_id(message), detail=detail))

    async def _handle(self, message: AnyMessage, descriptors: list[int]) -> dict[str, Any]:
        if isinstance(message, Configure):
            return await self._configure(message, descriptors)
        if self._shared is None:
            raise UnavailableError("egress-unavailable", "egress is not configured yet")
        if isinstance(message, OpenSandbox):
            return await self._open(self._shared, message, descriptors)
        return await self._for_sandbox(message, descriptors)

    async def _for_sandbox(self, message: AnyMessage, descriptors: list[int]) -> dict[str, Any]:
        sandbox = self._sandboxes.get(getattr(message, "sandbox_id", ""))
        if sandbox is None:
            raise UnavailableError("egress-unavailable", "no such sandbox")
        if isinstance(message, ToolDecided):
            told = CallInput(digest=message.input_sha256, place=message.input_place)
            violation = sandbox.run.tool_decided(
                message.tool_use_id,
                message.name,
                told,
                allowed=message.allowed,
                deferred=message.deferred,
            )
            if violation is not None:
                sandbox.violation(violation)
                # refused, so that the hook never answers: a yes that is taken back comes too late
                raise witness_error(violation.reason)
        elif isinstance(message, AddListener):
            await self._listen(sandbox, descriptors)
        elif isinstance(message, CloseSandbox):
            return await self._close(sandbox)
        return {}

    async def _configure(self, message: Configure, descriptors: list[int]) -> dict[str, Any]:
        """Read every secret, then give up the right to read more."""
        recorder = RecorderClient(socket.socket(fileno=descriptors[0]))
        secrets = _secrets(message)
        if message.opens_tenants and message.key_path is not None:
            self._opener = TenantOpener(Path(message.key_path))
        authority = Authority.load(Path(message.ca_dir)) if message.ca_dir else None
        context = upstream_context(message.upstream_ca)
        if message.secrets or message.logins:
            # now: it keeps the rights to files that we give up
            record, placed = _recording(recorder), message.secrets
            placed = placed or SecretSettings().model_dump(mode="json")
            self._keeper = await KeeperLink.start(
                placed,
                message.state_dir,
                logins=message.logins,
                ended=lambda status: record("keeper.ended", how=_how(status)),
            )
            kinds = {name: f"{one['kind']}-login" for name, one in message.logins.items()}
            self._resolving = _resolving(
                self._keeper, placed, record, self._forget_hidden, kinds, bases(message.logins)
            )
        sign = _signer() if any(one["kind"] == "aws" for one in message.logins.values()) else None
        if message.drop_to_uid is not None and os.geteuid() == 0:
            self._aside.drop(message.drop_to_uid)
            _drop(message.drop_to_uid)
        await recorder.ready()
        self._shared = Shared(
            recorder=recorder,
            credentials=Credentials(secrets, self._resolving),
            providers=message.providers,
            resolver=Resolver(message.resolver_overrides, message.upstream_overrides),
            authority=authority,
            upstream_tls=context,
            notify=self._channel.post,
            tell=self._tell,
            wait_for_audit=message.wait_for_audit,
            linger=_LINGER_SECONDS,
            aside=self._aside,
            sign=sign,
            turns=_turns(message, self._channel.post),
        )
        resolved = self._resolving.names() if self._resolving is not None else frozenset()
        return {"credentials": sorted({*secrets, *resolved})}

    async def _open(
        self, shared: Shared, message: OpenSandbox, descriptors: list[int]
    ) -> dict[str, Any]:
        try:
            # before the socket answers: a sandbox without its credentials is not opened
            credentials = shared.credentials.beside(_opened(self._opener, message))
            rules = egress_from_json(message.rules)
        except BaseException:
            for descriptor in descriptors:
                os.close(descriptor)
            raise
        run = RunState(rules.model)
        run.known(message.known_tool_uses)
        for call in message.pending_tool_uses:
            told = CallInput(digest=call.input_sha256, place=call.input_place)
            run.ledger.pending(call.tool_use_id, call.name, told)
        sandbox = SandboxState(
            sandbox_id=message.sandbox_id,
            run_id=message.run_id,
            session_id=message.session_id,
            rules=rules,
            shared=shared,
            run=run,
            credentials=credentials,
            tenant=message.tenant,
            batch=message.batch,
        )
        self._sandboxes[message.sandbox_id] = sandbox
        await self._listen(sandbox, descriptors)
        return {}

    async def _listen(self, sandbox: SandboxState, descriptors: list[int]) -> None:
        loop = asyncio.get_running_loop()
        for descriptor in descriptors:
            listener = socket.socket(fileno=descriptor)
            listener.setblocking(False)
            if listener.family == socket.AF_UNIX:
                server = await loop.create_unix_server(
                    lambda: Client(sandbox), sock=listener, backlog=256
                )
            else:
                server = await loop.create_server(
                    lambda: Client(sandbox), sock=listener, backlog=256
                )
            sandbox.servers.append(server)

    async def _close(self, sandbox: SandboxState) -> dict[str, Any]:
        await _settle(sandbox.close())
        del self._sandboxes[sandbox.sandbox_id]
        usage = sandbox.run.spent
        return {
            "input_tokens": usage.input_tokens,
            "output_tokens": usage.output_tokens,
            "cache_creation_input_tokens": usage.cache_creation_input_tokens,
            "cache_read_input_tokens": usage.cache_read_input_tokens,
            "requests": usage.requests,
            "cost_usd": usage.cost_usd,
        }

    def _forget_hidden(self) -> None:
        for sandbox in self._sandboxes.values():
            sandbox.forget_hidden()

    def _tell(self, notice: dict[str, Any]) -> None:
        # what is only told of may wait for company; each write wakes the worker
        self._channel.post(notice, _LINGER_SECONDS)


async def _settle(tasks: list[asyncio.Task[None]]) -> None:
    """Wait for exchanges that were cut: they still count what they used."""
    if tasks:
        await asyncio.wait(tasks, timeout=_SETTLE_SECONDS)


def _id(message: AnyMessage) -> int:
    return int(getattr(message, "id", 0))


def _recording(recorder: RecorderClient) -> Record:
    def record(kind: str, **fields: Any) -> None:
        # a recorder that is gone stops the request that wants the value: its own append is awaited
        with contextlib.suppress(UnavailableError):
            recorder.append_soon({"type": kind, **fields})

    return record


def _how(status: int) -> str:
    """As of waitpid(2): `exit 1`, `signal 9`."""
    code = os.waitstatus_to_exitcode(status)
    return f"exit {code}" if code >= 0 else f"signal {-code}"


def _resolving(
    keeper: KeeperLink,
    secrets: dict[str, Any],
    record: Record,
    changed: Callable[[], None],
    logins: Mapping[str, str],
    kept: frozenset[str],
) -> Resolving:
    settings = SecretSettings.model_validate(secrets)
    placed = {n: one for n, one in settings.credentials.items() if n not in kept}
    ages = Ages(most=settings.max_age_seconds, stale=settings.stale_seconds)
    return Resolving(keeper, placed, ages, record, changed=changed, logins=logins)


def _signer() -> Callable[..., tuple[tuple[bytes, bytes], ...]]:
    """botocore's, loaded whole: after ids are dropped nothing may be. Raises UnavailableError."""
    try:
        from ringfence.egress import signing
    except ModuleNotFoundError as error:
        raise missing_library(error, "aws") from None
    signing.warm()
    return signing.sign


def _turns(message: Configure, notify: Callable[[Message], None]) -> Turns | None:
    if not message.asks_for_turns:
        return None
    base, longest, total = message.retry_seconds
    patience = Patience(base=base, longest=longest, total=total)
    return Turns(notify, limited=message.limited, patience=patience)


def _secrets(message: Configure) -> dict[str, Secret]:
    secrets = {}
    if message.vault_path is not None and message.key_path is not None:
        vault = open_vault(Path(message.vault_path), Path(message.key_path))
        # what a login begins with stays with the keeper: it outlasts each session made of it
        kept = bases(message.logins)
        opened = {name: vault.get(name) for name in vault.names() if name not in kept}
        secrets = {name: Secret(value.reveal(), value.hosts) for name, value in opened.items()}
    if message.environment_credential is not None:
        secrets[RESERVED_CREDENTIAL] = Secret(message.environment_credential)
    return secrets


def _opened(opener: TenantOpener | None, message: OpenSandbox) -> dict[str, Secret]:
    """A sandbox's own credentials, by id."""
    if not message.credentials:
        return {}
    if opener is None or not message.tenant:
        raise UnavailableError(
            "vault-refused", "this egress process was not told to open credentials of tenants"
        )
    secrets: dict[str, Secret] = {}
    for each in message.credentials:
        if each.credential_id in secrets:
            raise UnavailableError("vault-refused", f"credential {each.credential_id} came twice")
        bound = Bound(
            tenant=message.tenant,
            vault_id=each.vault_id,
            credential_id=each.credential_id,
            host=each.host,
            expires_at=each.expires_at,
        )
        value = opener.open(each.sealed, bound, each.key_id)
        expires = None if each.expires_at is None else each.expires_at / 1_000_000
        secrets[each.credential_id] = Secret(value.reveal(), value.hosts, expires)
    return secrets


def preload() -> None:
    """Import what the standard library imports late: the interpreter may lie in a directory that
    the uid to come cannot read, such as a 0700 home.
    """
    # ssl encodes every server name by the first of them
    for codec in ("idna", "punycode", "utf-16", "utf-16-le", "latin-1", "ascii", "utf-8"):
        codecs.lookup(codec)
    traceback.format_exception(ValueError())


def _drop(uid: int) -> None:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    # a change of uid resets it (prctl(2)), and memory here holds credentials
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def _harden() -> None:
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # each sandbox may hold some hundred descriptors, and the usual soft limit is 1024 for all
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    os.umask(0o077)


def _settle_memory() -> None:
    """What is loaded stays, and a request leaves no cycles behind: the collector need not look
    through the one, nor for the other at every few hundred objects of a body that is read.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG, 10, 10)


def main(arguments: Sequence[str]) -> int:
    """Entry of the process."""
    _harden()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = socket.socket(fileno=int(arguments[0]))
    preload()
    zygote = fork_zygote(connection.fileno())

    async def serve() -> None:
        await Egress(connection, zygote).serve()

    _settle_memory()
    uvloop.run(serve())
    return 0
