"""The platform as its composition root makes it, for the gateway and the operator's commands."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ringfence.config import GatewaySettings, SloSettings, WebhookSettings
from ringfence.control.files import FileLimits
from ringfence.control.narrowing import NetworkRules
from ringfence.control.slo_watch import Watch
from ringfence.control.tenancy import Ceiling
from ringfence.control.webhooks import Target, target_of
from ringfence.policy.document import PolicyDocument
from ringfence.queue.protocol import Queue
from ringfence.slo.budget import Seen
from ringfence.store.contents import Contents
from ringfence.store.database import Database
from ringfence.vault.keys import VaultPaths


@dataclass(frozen=True, kw_only=True, slots=True)
class Keeping:
    """What is kept beside the database: contents of files, and the public key to seal to."""

    contents: Contents
    limits: FileLimits
    vault: VaultPaths


def keeping(state_dir: Path, settings: GatewaySettings, files: Path | None = None) -> Keeping:
    """Of a state directory; `files`: where contents lie instead."""
    return Keeping(
        contents=Contents(files or state_dir / "platform" / "files"),
        limits=FileLimits(
            file=settings.max_file_mb << 20,
            tenant=settings.file_quota_mb << 20,
            count=settings.files,
            seconds=settings.file_seconds,
            download_uploads=settings.download_uploads,
        ),
        vault=VaultPaths(state_dir),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Platform:
    """A database, not yet connected, the operator's settings, what makes the queue, and what is
    kept beside them. webhooks: by the operator's name. slo: what is promised of runs.
    """

    database: Database
    settings: GatewaySettings
    queue: Callable[[], Queue]
    keeping: Keeping
    webhooks: Mapping[str, WebhookSettings] = field(default_factory=dict)
    slo: SloSettings = field(default_factory=SloSettings)

    def ceiling(self, policy: PolicyDocument) -> Ceiling:
        """What the operator's policy and settings allow together."""
        network = NetworkRules(
            unrestricted=self.settings.unrestricted == "policy",
            package_hosts=self.settings.package_hosts,
        )
        return Ceiling(
            policy=policy,
            network=network,
            approval_seconds=self.settings.approval_seconds,
            slo=self.slo,
        )

    def targets(self) -> tuple[Target, ...]:
        """What `webhooks` stand for. Raises CallerError `settings-invalid`."""
        return tuple(target_of(name, one) for name, one in self.webhooks.items())

    def watch(
        self, database: Database, tell: Callable[[Sequence[Seen]], None] | None = None
    ) -> Watch | None:
        """What looks after the promises, and who hears of it; None where there is none. Raises
        CallerError `settings-invalid`.
        """
        return Watch(database, self.slo, tell=tell) if self.slo.on else None

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[Database]:
        """The database with the schema of this version, closed at the end."""
        try:
            await self.database.migrate()
            yield self.database
        finally:
            await self.database.close()
