"""Technologies by the names that a policy gives them, each made when it is first asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ringfence.errors import UnavailableError
from ringfence.sandbox.protocol import Backend

Factory = Callable[[], Backend]


class Backends:
    """What this worker can isolate with; strongest last."""

    def __init__(self, factories: Mapping[str, Factory]) -> None:
        self._factories = dict(factories)
        self._made: dict[str, Backend] = {}

    @property
    def names(self) -> Sequence[str]:
        """All that are known here, whether or not this host can run them."""
        return tuple(self._factories)

    def get(self, name: str) -> Backend:
        """The backend of a policy's `isolation`; a weaker one in its place would be a silent hole.

        Raises:
            UnavailableError: `isolation-unavailable` for a name that is not known here.
        """
        if name == "auto":
            name = self.names[0]
        if name not in self._factories:
            known = ", ".join(self._factories)
            raise UnavailableError(
                "isolation-unavailable",
                f"the policy names isolation {name}, and this host has {known}",
                hint="run it on a host that has it, or name another under isolation.backend",
            )
        if name not in self._made:
            self._made[name] = self._factories[name]()
        return self._made[name]

    async def close(self) -> None:
        """End what the backends keep ready. Idempotent."""
        for backend in self._made.values():
            await backend.close()
