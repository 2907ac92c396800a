"""The order of work: nothing is lost, slow files begin the workers' pieces."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from order import SLOW, arranged

COUNTS = st.dictionaries(st.sampled_from("abcdefghij"), st.integers(1, 30), min_size=1)
SECONDS = st.dictionaries(st.sampled_from("abcdefghij"), st.integers(1, 500))


def pieces(found: list[int], workers: int) -> list[list[int]]:
    """As xdist's `WorkStealingScheduling.check_schedule` hands out what nobody has begun."""
    left, cut = list(found), []
    for number in range(workers):
        size = len(left) // (workers - number)
        cut.append(left[:size])
        del left[:size]
    return cut


@given(COUNTS, SECONDS, st.integers(1, 8))
def test_every_test_has_one_place(
    counts: dict[str, int], seconds: dict[str, int], workers: int
) -> None:
    files = [name for name, count in counts.items() for _ in range(count)]
    found = arranged(files, workers, seconds)
    assert sorted(found) == list(range(len(files)))
    for name in set(files) & set(seconds):
        places = [found.index(at) for at, file in enumerate(files) if file == name]
        assert places == list(range(places[0], places[0] + len(places))), "in order, and together"


def test_each_piece_begins_with_what_takes_longest() -> None:
    counts = {"quick": 40, "long": 3, "longer": 2, "other": 40, "longest": 1}
    files = [name for name, count in counts.items() for _ in range(count)]
    found = arranged(files, 2, {"long": 20, "longer": 25, "longest": 50})
    first, second = ([files[at] for at in piece] for piece in pieces(found, 2))
    assert first == ["longest"] + ["quick"] * 40 + ["other"] * 2
    assert second == ["longer"] * 2 + ["long"] * 3 + ["other"] * 38


def test_the_slow_files_exist() -> None:
    root = Path(__file__).parents[2]
    assert [name for name in SLOW if not (root / name).is_file()] == []
