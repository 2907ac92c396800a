"""Technologies by the names that a policy gives them, each made when it is first asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from ringfence.errors import RingfenceError, UnavailableError
from ringfence.policy.compiled import SandboxProfile
from ringfence.policy.isolation import THREATS, Availability, choose
from ringfence.sandbox.protocol import Backend, Emulating, stopping

Factory = Callable[[], Backend]


class Picked(NamedTuple):
    """A technology, and why it is this one; the reason is empty when the policy names it."""

    backend: Backend
    reason: str = ""


class Backends:
    """What this worker can isolate with."""

    def __init__(self, factories: Mapping[str, Factory]) -> None:
        self._factories = dict(factories)
        self._made: dict[str, Backend] = {}

    @property
    def names(self) -> Sequence[str]:
        """All that are known here, whether or not this host can run them."""
        return tuple(self._factories)

    def get(self, name: str) -> Backend:
        """The backend of a name; a weaker one in its place would be a silent hole.

        Raises:
            UnavailableError: `isolation-unavailable` for a name that is not known here.
        """
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

    def pick(self, profile: SandboxProfile) -> Picked:
        """The backend of a policy. For `auto` its candidates are tried, the best fit first, until
        one is there: a probe may take seconds.

        Raises:
            UnavailableError: `isolation-unavailable`, also when nothing that is strong enough for
                the threat model can run here.
        """
        if profile.isolation != "auto" or profile.threat_model is None:
            return Picked(self.get(profile.isolation))
        states: dict[str, Availability] = {}
        for name in THREATS[profile.threat_model].order:
            states[name] = self.availability(name, profile)
            choice = choose(profile.threat_model, states)
            if choice.technology is not None:
                return Picked(self.get(choice.technology), choice.reason)
        raise UnavailableError("isolation-unavailable", choice.reason, hint=choice.mend)

    def availability(self, name: str, profile: SandboxProfile) -> Availability:
        """Whether a sandbox under these rules would start with a technology, as it says itself."""
        if name not in self._factories:
            return Availability(problem="this version of ringfence has no backend for it")
        backend = self.get(name)
        try:
            stops = stopping(backend.probe(profile), profile.accept_unenforced)
        except RingfenceError as error:
            emulated = error.code == "emulation-refused"
            return Availability(problem=error.message, mend=error.hint, emulated=emulated)
        emulated = isinstance(backend, Emulating) and backend.emulated
        if not stops:
            return Availability(emulated=emulated)
        controls = ", ".join(state.control.value for state in stops)
        return Availability(
            problem=f"it cannot enforce {controls}", mend=stops[0].mend, emulated=emulated
        )

    async def close(self) -> None:
        """End what the backends keep ready. Idempotent."""
        for backend in self._made.values():
            await backend.close()
