"""The contract of a secret source, one test a clause; every source passes it unchanged.

Subclass `SecretSourceContract` and give it a `place` fixture: where the source under test looks, and
how it is changed from outside.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Protocol

import pytest

from ringfence.config.reference import Reference
from ringfence.errors import UnavailableError
from ringfence.vault.source import SecretSource

__all__ = ["FIRST", "SECOND", "UNFIT", "SecretSourceContract", "SourcePlace", "refused"]

FIRST, SECOND = "cnry-source-first-0123456789", "cnry-source-second-9876543210"
UNFIT = ("short", FIRST + " " + SECOND, "é" + FIRST, FIRST * 400)
"""What no header carries."""


class SourcePlace(Protocol):
    """Where one source looks.

    Attributes:
        source: the source.
        reference: of what `put` puts there; nothing lies there at first.
        hidden: what no error may tell: tokens that open the source.
    """

    source: SecretSource
    reference: Reference
    hidden: tuple[str, ...]

    def put(self, value: str) -> None:
        """Put a value there, in place of what was."""

    def away(self) -> AbstractContextManager[None]:
        """While it is entered, the source does not answer. Skips where that cannot be."""

    def barred(self) -> AbstractContextManager[None]:
        """While it is entered, the source says no to us. Skips where it cannot."""


def refused(place: SourcePlace, code: str) -> None:
    """It says so, and nothing that is nobody's business."""
    with pytest.raises(UnavailableError) as caught:
        place.source.resolve(place.reference)
    assert caught.value.code == code, caught.value.render()
    said = caught.value.render()
    for secret in (FIRST, SECOND, *place.hidden):
        assert secret not in said


class _Clauses:
    @pytest.fixture
    def place(self) -> SourcePlace:
        """Where the source looks."""
        raise NotImplementedError("a subclass names the source")

    def test_a_value_resolves_with_its_version_and_hides_itself(self, place: SourcePlace) -> None:
        place.put(FIRST)
        found = place.source.resolve(place.reference)
        assert found.value == FIRST.encode()
        assert found.version
        assert FIRST not in found.version
        assert FIRST not in repr(found)
        assert place.source.resolve(place.reference).version == found.version

    def test_another_value_has_another_version(self, place: SourcePlace) -> None:
        place.put(FIRST)
        first = place.source.resolve(place.reference)
        place.put(SECOND)
        second = place.source.resolve(place.reference)
        assert second.value == SECOND.encode()
        assert second.version != first.version

    def test_what_is_not_there_is_absent(self, place: SourcePlace) -> None:
        refused(place, "secret-absent")
        place.put(FIRST)
        assert place.source.resolve(place.reference).value == FIRST.encode()

    @pytest.mark.parametrize("value", UNFIT)
    def test_what_no_header_carries_is_no_value(self, place: SourcePlace, value: str) -> None:
        place.put(value)
        refused(place, "secret-unfit")

    def test_one_that_is_away_is_unreachable_and_comes_back(self, place: SourcePlace) -> None:
        place.put(FIRST)
        with place.away():
            refused(place, "secret-unreachable")
        assert place.source.resolve(place.reference).value == FIRST.encode()

    def test_one_that_says_no_is_denied(self, place: SourcePlace) -> None:
        place.put(FIRST)
        assert place.source.resolve(place.reference).value == FIRST.encode()
        with place.barred():
            refused(place, "secret-denied")
        assert place.source.resolve(place.reference).value == FIRST.encode()

    def test_many_may_ask_at_once(self, place: SourcePlace) -> None:
        place.put(FIRST)
        with ThreadPoolExecutor(8) as threads:
            found = list(threads.map(lambda _: place.source.resolve(place.reference), range(16)))
        assert {one.value for one in found} == {FIRST.encode()}


class SecretSourceContract(_Clauses):
    """All clauses."""
