"""Credentials of a run's tenant on their way through the worker, which cannot open them."""

from __future__ import annotations

from dataclasses import dataclass

from ringfence.channel.messages import SealedCredential
from ringfence.policy.binding import Unbound, bind
from ringfence.policy.compiled import EgressRules


@dataclass(frozen=True, kw_only=True, slots=True)
class Sealed:
    """As `ringfence.control.vaults.for_session` found them, and whose they are."""

    tenant: str
    credentials: tuple[SealedCredential, ...]

    def bound(
        self, rules: EgressRules
    ) -> tuple[EgressRules, list[SealedCredential], tuple[Unbound, ...]]:
        """The rules of egress with those that have a place in them, and those alone: what cannot
        be used is not opened. And those that were left out.
        """
        named = [(each.credential_id, each.host) for each in self.credentials]
        rules, unbound = bind(rules, named)
        left_out = {each.name for each in unbound}
        kept = [each for each in self.credentials if each.credential_id not in left_out]
        return rules, kept, unbound


NOTHING_SEALED = Sealed(tenant="", credentials=())
