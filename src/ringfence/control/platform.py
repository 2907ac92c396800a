"""The platform as its composition root makes it, for the gateway and the operator's commands."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from ringfence.config import GatewaySettings
from ringfence.control.files import FileLimits
from ringfence.control.narrowing import NetworkRules
from ringfence.control.tenancy import Ceiling
from ringfence.policy.document import PolicyDocument
from ringfence.queue.protocol import Queue
from ringfence.store.contents import Contents
from ringfence.store.database import Database
from ringfence.vault.keys import VaultPaths


@dataclass(frozen=True, kw_only=True, slots=True)
class Keeping:
    """What is kept beside the database: contents of files, and the public key to seal to."""

    contents: Contents
    limits: FileLimits
    vault: VaultPaths


def keeping(state_dir: Path, settings: GatewaySettings) -> Keeping:
    """Of a state directory."""
    return Keeping(
        contents=Contents(state_dir / "platform" / "files"),
        limits=FileLimits(
            file=settings.max_file_mb << 20,
            tenant=settings.file_quota_mb << 20,
            seconds=settings.file_seconds,
            download_uploads=settings.download_uploads,
        ),
        vault=VaultPaths(state_dir),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Platform:
    """A database, not yet connected, the operator's settings, what makes the queue, and what is
    kept beside them.
    """

    database: Database
    settings: GatewaySettings
    queue: Callable[[], Queue]
    keeping: Keeping

    def ceiling(self, policy: PolicyDocument) -> Ceiling:
        """What the operator's policy and settings allow together."""
        network = NetworkRules(
            unrestricted=self.settings.unrestricted == "policy",
            package_hosts=self.settings.package_hosts,
        )
        return Ceiling(policy=policy, network=network)

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[Database]:
        """The database with the schema of this version, closed at the end."""
        try:
            await self.database.migrate()
            yield self.database
        finally:
            await self.database.close()
