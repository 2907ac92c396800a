"""An upstream that refuses whatever it is sent: what that costs a source, and redaction."""

from __future__ import annotations

import asyncio
import json
import random
import time

import pytest

from ringfence.egress.credentials import CredentialError, Credentials
from ringfence.egress.keeping import Given
from ringfence.egress.lifetime import Ages
from ringfence.egress.redact import Needles
from ringfence.egress.resolving import _OLDER, REDACT_SECONDS, Resolving
from ringfence.vault.sources import openbao

NAME = "provider/b"
AGES = Ages(most=60, stale=600)


class Sts:
    """A login that gives another session each time, and a clock."""

    def __init__(self, lease: float = 3600.0) -> None:
        self.now, self.asked, self.lease = 1000.0, 0, lease
        self.chance = random.Random(7)

    def resolving(self) -> Resolving:
        return Resolving(
            self,
            {},
            AGES,
            lambda *_, **__: None,
            clock=lambda: self.now,
            logins={NAME: "aws-login"},
        )

    async def ask(self, name: str, *, doubted: bool = False) -> Given:
        self.asked += 1
        fields = {name: self.chance.randbytes(size).hex() for name, size in (("key", 10), ("secret", 20), ("token", 450))}  # fmt: skip
        value = bytearray(json.dumps(fields, separators=(",", ":")).encode())
        return Given(value=value, version=str(self.asked), lease_seconds=self.lease, hosts=())


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_an_upstream_that_refuses_everything_has_a_role_assumed_ever_more_seldom() -> None:
    sts = Sts()
    resolving = sts.resolving()
    credentials = Credentials({}, resolving)
    await resolving.get(NAME)
    for _ in range(600):
        sts.now += 1
        resolving.doubt(NAME)
        await settle()
        await resolving.get(NAME)
    assert 3 <= sts.asked <= 5  # the first, and after 2, 60, 120 and 240 seconds
    begun = time.process_time()
    Needles(credentials.values([NAME]))
    assert time.process_time() - begun < 0.5
    # one that is refused half an hour later is believed again
    sts.now += 1800
    before = sts.asked
    resolving.doubt(NAME)
    await resolving.get(NAME)
    assert sts.asked == before + 1
    resolving.close()


async def test_a_session_that_is_refused_is_had_anew_and_the_next_not_within_a_minute() -> None:
    sts = Sts()
    resolving = sts.resolving()
    first = (await resolving.get(NAME)).reveal()
    sts.now += 2
    resolving.doubt(NAME)
    second = (await resolving.get(NAME)).reveal()
    assert second != first
    sts.now += 59
    resolving.doubt(NAME)
    assert (await resolving.get(NAME)).reveal() == second
    sts.now += 1
    resolving.doubt(NAME)
    assert (await resolving.get(NAME)).reveal() != second
    resolving.close()


async def test_what_was_replaced_is_redacted_for_its_time_however_short_leases_are() -> None:
    sts = Sts(lease=3.0)
    resolving = sts.resolving()
    credentials = Credentials({}, resolving)
    given: list[bytes] = []
    for _ in range(300):
        sts.now += 2
        try:
            given.append((await resolving.get(NAME)).shown()[2])
        except CredentialError as error:
            assert error.status == 503
        await settle()
    values = set(credentials.values([NAME]))
    assert values >= set(given)  # none was dropped before its time
    assert _OLDER <= len(resolving.held([NAME])) <= _OLDER + 2
    # and there is room when that is over
    sts.now += REDACT_SECONDS
    resolving._outlive(resolving._kept[NAME])
    assert await resolving.get(NAME)
    resolving.close()


@pytest.mark.parametrize("count", [32])
def test_many_values_are_prepared_in_no_time(count: int) -> None:
    chance = random.Random(3)
    values = [chance.randbytes(900).hex().encode() for _ in range(count * 12)]
    begun = time.process_time()
    needles = Needles(values)
    assert time.process_time() - begun < 0.5
    assert needles.overlap(b"x" + values[5][:1700]) == 1700


def test_a_login_that_is_refused_says_what_to_look_at_and_a_secret_something_else() -> None:
    login, secret = (
        openbao._refusal(status, path, {})
        for status, path in ((400, "auth/approle/login"), (403, "kv/data/ci/github"))
    )
    assert (login.code, secret.code) == ("secret-denied", "secret-denied")
    assert "role_id" in login.hint
    assert "role_id" not in secret.hint
