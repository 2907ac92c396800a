"""The platform as its composition root makes it, for the gateway and the operator's commands."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from ringfence.config import GatewaySettings
from ringfence.control.narrowing import NetworkRules
from ringfence.control.tenancy import Ceiling
from ringfence.policy.document import PolicyDocument
from ringfence.queue.protocol import Queue
from ringfence.store.database import Database


@dataclass(frozen=True, kw_only=True, slots=True)
class Platform:
    """A database, not yet connected, the operator's settings, and what makes the queue."""

    database: Database
    settings: GatewaySettings
    queue: Callable[[], Queue]

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
