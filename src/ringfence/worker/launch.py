"""Bringing a worker up: recorder and egress processes, stores, and what attempts share."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import AbstractContextManager, AsyncExitStack, asynccontextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ringfence.agent.permissions import Approver
from ringfence.channel.link import EgressLink
from ringfence.channel.messages import Configure, ProviderConfig
from ringfence.channel.spawn import EgressProcess
from ringfence.config import Config, Provider
from ringfence.config.providers import LOGIN
from ringfence.config.secrets import RESERVED_CREDENTIAL
from ringfence.errors import CallerError, DeniedError, UnavailableError
from ringfence.limits.store import LimitStore, MemoryLimits
from ringfence.model import RunRequest, RunResult
from ringfence.policy.compiled import CompiledPolicy
from ringfence.record.client import RecorderClient, RecorderProcess
from ringfence.record.session_base import Claim, SessionStore
from ringfence.record.sessions import SqliteSessionStore
from ringfence.sandbox.registry import Backends
from ringfence.telemetry.hub import Telemetry
from ringfence.vault.keys import VaultPaths, public_key
from ringfence.vault.store import VaultFile, check_value
from ringfence.worker import providers
from ringfence.worker.attempt import Attempt
from ringfence.worker.control import RunControl
from ringfence.worker.desk import Desk
from ringfence.worker.egressdir import sweep
from ringfence.worker.ids import new_id
from ringfence.worker.listening import heard, turns_told
from ringfence.worker.live import Hold
from ringfence.worker.sealed import NOTHING_SEALED, Sealed
from ringfence.worker.seats import Company, SeatPool
from ringfence.worker.station import NoticeBoard, OnMessage, Station
from ringfence.worker.warm import WarmPool

_PLATFORM = "anthropic"


def local_sessions(config: Config) -> SessionStore:
    """Transcripts in the state directory, wherever the settings keep those of the platform."""
    return SqliteSessionStore(config.state_dir / "sessions.sqlite")


@dataclass(frozen=True, kw_only=True)
class Launcher:
    """Makes stations.

    Attributes:
        make_backends: the isolation technologies for a configuration; named in `wiring` only.
        make_sessions: the store of transcripts for a configuration.
        make_limits: the store of limits that workers share; None where the settings limit nothing.
        make_telemetry: who is told what happens, where anybody is.
        environment_key: the operator's ANTHROPIC_API_KEY, if there is one.
        opens_tenants: whether runs bring sealed credentials of tenants: egress then keeps the
            vault's private key in its memory.
    """

    config: Config
    make_backends: Callable[[Config], Backends]
    make_sessions: Callable[[Config], SessionStore] = local_sessions
    environment_key: str | None = None
    opens_tenants: bool = False
    make_limits: Callable[[Config], LimitStore | None] = lambda _: None
    make_telemetry: Callable[[], AbstractContextManager[Telemetry | None]] = nullcontext

    @asynccontextmanager
    async def station(
        self, approver: Approver, isolation: str | None = None
    ) -> AsyncIterator[Station]:
        """Start the processes; on leaving, drain and end them in the right order. `isolation` is
        the technology to have ready for the first run.
        """
        state = self.config.state_dir
        private_directory(state)
        claude = claude_binary(self.config)
        async with AsyncExitStack() as stack:
            telemetry = stack.enter_context(self.make_telemetry())
            backends = self.make_backends(self.config)
            stack.push_async_callback(backends.close)
            if (
                isolation and isolation in backends.names
            ):  # what `auto` takes is known when it was tried
                backends.get(isolation).warm()
            anchor = self.config.audit.anchor
            recorder_process = RecorderProcess.start(
                state / "audit", anchor=anchor.model_dump_json() if anchor.places else None
            )
            stack.push_async_callback(asyncio.to_thread, recorder_process.close)
            egress_process = EgressProcess.start()
            stack.push_async_callback(asyncio.to_thread, egress_process.close)
            client = RecorderClient(recorder_process.sockets["worker"])
            stack.push_async_callback(client.close)
            recorder = heard(client, telemetry)
            notices = NoticeBoard(telemetry)
            link = EgressLink(egress_process.connection, notices.post)
            stack.push_async_callback(link.close)
            await client.ready()
            limits = await asyncio.to_thread(self.make_limits, self.config)
            desk = Desk(
                self.config.limits,
                # breakers of a worker that shares nothing are its own
                limits or MemoryLimits(),
                recorder,
                reply=turns_told(link.tell, telemetry),
                post=notices.post,
                name=new_id("desk"),
                breakers=self.config.breakers,
                retries=self.config.retries,
            )
            notices.desk = desk.heard
            if telemetry is not None:
                desk.breakers.listen = telemetry.breaker_heard
            stack.push_async_callback(desk.close)
            retries = self.config.retries
            await link.request(
                Configure,
                descriptors=[recorder_process.sockets["egress"].fileno()],
                asks_for_turns=True,
                limited=self.config.limits.on,
                retry_seconds=(
                    retries.base_seconds,
                    retries.longest_seconds,
                    retries.total_seconds,
                ),
                **self._configuration(),
            )
            recorder_process.sockets["egress"].close()
            sessions = await asyncio.to_thread(self.make_sessions, self.config)
            stack.push_async_callback(asyncio.to_thread, sessions.close)
            await asyncio.to_thread(sweep, state)
            ca_certificate = (state / "ca" / "ca.pem").read_bytes()
            warm = WarmPool(self.config, claude=claude, ca_certificate=ca_certificate)
            stack.push_async_callback(warm.close)
            seats = SeatPool(self.config.live, recorder)
            stack.push_async_callback(seats.close)
            yield Station(
                config=self.config,
                backends=backends,
                recorder=recorder,
                egress=link,
                notices=notices,
                sessions=sessions,
                approver=approver,
                claude=claude,
                ca_certificate=ca_certificate,
                seats=seats,
                warm=warm,
                breakers=desk.breakers,
                telemetry=telemetry,
            )

    def _configuration(self) -> dict[str, Any]:
        config, paths = self.config, VaultPaths(self.config.state_dir)
        sealed = set(VaultFile(paths.store).entries())
        if self.opens_tenants:
            # made now, or the first credential of a tenant would wait for the worker's next start
            public_key(paths)
        borrowed = {name for name in config.providers if self.borrows_environment_key(name)}
        if borrowed:
            self._check_environment_key()
        return {
            "providers": {
                name: _provider(name, provider, borrows=name in borrowed)
                for name, provider in config.providers.items()
            },
            "vault_path": str(paths.store) if sealed else None,
            "key_path": str(paths.key) if sealed or self.opens_tenants else None,
            "opens_tenants": self.opens_tenants,
            "environment_credential": self.environment_key if borrowed else None,
            "secrets": config.secrets.model_dump(mode="json") if self._placed else {},
            "logins": logins(config),
            "state_dir": str(config.state_dir),
            "ca_dir": str(config.state_dir / "ca"),
            "resolver_overrides": config.egress.resolve,
            "upstream_overrides": config.egress.connect,
            "upstream_ca": str(config.egress.ca_file) if config.egress.ca_file else None,
            "drop_to_uid": config.egress_uid if os.geteuid() == 0 else None,
        }

    @property
    def _placed(self) -> Collection[str]:
        """Credentials whose values the settings place in a source."""
        return self.config.secrets.credentials

    def borrows_environment_key(self, provider: str = _PLATFORM) -> bool:
        """Whether a provider's credential is the one of the environment: the Anthropic key, no
        other, and only when the vault holds none.
        """
        name = self._named(provider).credential
        if name != _PLATFORM or not self.environment_key or name in self._placed:
            return False
        return name not in VaultFile(VaultPaths(self.config.state_dir).store).entries()

    def missing_credential(self, *providers: str) -> str | None:
        """Name of a credential that one of the providers needs and nobody has; None when all is
        well.

        Raises:
            CallerError: `settings-invalid` for a provider that the settings do not name;
                `credential-value` for a key of the environment that no header can carry.
            UnavailableError: `vault-refused`.
        """
        sealed = VaultFile(VaultPaths(self.config.state_dir).store).entries()
        for provider in providers or (_PLATFORM,):
            named = self._named(provider)
            name = named.login.credential if named.login is not None else named.credential
            if name is None or name in self._placed or name in sealed:
                continue
            if not self.borrows_environment_key(provider):
                return name
            self._check_environment_key()
        return None

    def _check_environment_key(self) -> None:
        check_value(self.environment_key or "", "the key in ANTHROPIC_API_KEY")

    def _named(self, provider: str) -> Provider:
        if provider not in self.config.providers:
            raise CallerError(
                "settings-invalid",
                f"the settings name no provider {provider!r}, which the policy asks for",
                hint=f"set RINGFENCE_PROVIDERS__{provider.upper()}__BASE_URL",
            )
        return self.config.providers[provider]


def logins(config: Config) -> dict[str, Any]:
    """What the keeper logs in for, by the name of its credential (`Configure.logins`)."""
    return {
        LOGIN + name: {
            "kind": "aws" if provider.aws is not None else "google",
            "login": provider.login.model_dump(mode="json"),
            "region": provider.region,
        }
        for name, provider in config.providers.items()
        if provider.login is not None
    }


def _provider(name: str, provider: Provider, *, borrows: bool) -> ProviderConfig:
    login = provider.login
    credential = RESERVED_CREDENTIAL if borrows else provider.credential
    return ProviderConfig(
        base_url=provider.base_url,
        credential=credential if login is None else LOGIN + name,
        header=provider.header,
        kind=provider.kind,
        region=provider.region,
        project=provider.project,
        models=provider.models,
        login=login is not None,
        renews=login is not None and login.renews,
    )


async def attempt(
    station: Station,
    policy: CompiledPolicy,
    request: RunRequest,
    *,
    control: RunControl,
    on_message: OnMessage,
    sealed: Sealed = NOTHING_SEALED,
    claim: Claim | None = None,
    files: Path | None = None,
    hold: Hold | None = None,
    company: Company | None = None,
    batch: bool = False,
) -> RunResult:
    """One attempt on a station; `sealed` are its tenant's credentials, where it has a tenant;
    `batch` lets its model requests stand behind those of others;
    `claim` is the queue's run that it is an attempt of; `files` a directory of this host that is
    `/mnt/session` inside, read-only; `hold` brings the sandbox of the session's turn before, and
    keeps this one's for the next; `company` has it take a seat beside others.

    Raises:
        DeniedError: `model-denied`, for an agent under a policy that allows no model: it would
            start, and end with the words of a client that could not log in; `provider-denied`.
    """
    if not request.command and not policy.egress.model.enabled:
        raise DeniedError(
            "model-denied",
            "the policy allows no model",
            hint="network.allowed_hosts: [api.anthropic.com]",
        )
    if not request.command:
        providers.check(station.config, policy.egress.model)
    made = Attempt(
        station,
        policy,
        request,
        control=control,
        on_message=on_message,
        sealed=sealed,
        claim=claim,
        files=files,
        hold=hold,
        company=company,
        batch=batch,
    )
    return await made.run()


def private_directory(path: Path) -> None:
    """Make the state directory 0700, or refuse one that others can write.

    Raises:
        UnavailableError: `state-refused`.
    """
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = path.stat()
        if status.st_uid != os.geteuid():
            raise UnavailableError(
                "state-refused",
                f"{path} belongs to another user",
                hint="set RINGFENCE_STATE_DIR to a directory of your own",
            )
        if status.st_mode & 0o077:
            path.chmod(0o700)
    except OSError as error:
        raise UnavailableError(
            "state-refused",
            f"{path} cannot be made: {error.strerror}",
            hint="set RINGFENCE_STATE_DIR to a directory that you can write",
        ) from None


def claude_binary(config: Config) -> Path:
    """The operator's own claude, or the bundled one.

    Raises:
        UnavailableError: `claude-missing`.
    """
    path = config.claude
    if path is None:
        return bundled_claude()
    if not (path.is_file() and os.access(path, os.X_OK)):
        raise UnavailableError(
            "claude-missing",
            f"{path} is not a program",
            hint="name the claude binary in the setting `claude` (RINGFENCE_CLAUDE), or leave it",
        )
    return path


def bundled_claude() -> Path:
    """The binary inside the claude-agent-sdk wheel.

    Raises:
        UnavailableError: `claude-missing`; the pure-Python wheel of other platforms has none.
    """
    import importlib.util

    found = importlib.util.find_spec("claude_agent_sdk")
    origin = Path(found.origin) if found is not None and found.origin else None
    path = origin.parent / "_bundled" / "claude" if origin is not None else None
    if path is None or not path.exists():
        raise UnavailableError(
            "claude-missing",
            "the claude binary is not installed",
            hint="pip install claude-agent-sdk on glibc Linux, or set RINGFENCE_CLAUDE",
        )
    return path
