"""Breakers and the budget of repeated requests: what holds whatever comes."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from ringfence.limits.breaker import Breaker, BreakerSpec, Purse, RetrySpec, admit, note, spend
from ringfence.limits.view import breaker_view

T = 1000.0
SPEC = BreakerSpec(key="k", window=20.0, failures=4, opens=8.0, longest=50.0, probes=3, lease=6.0)
ACTS = st.lists(
    st.tuples(
        st.floats(0, 9),
        st.sampled_from(["admit", "fine", "failed", "left"]),
        st.integers(0, 9),
    ),
    min_size=1,
    max_size=120,
)


@given(acts=ACTS)
@settings(max_examples=200)
def test_half_open_lets_no_more_through_than_its_probes(
    acts: list[tuple[float, str, int]],
) -> None:
    """By what a client of it sees: leases that have not ended and nobody has spoken of."""
    breaker, now = Breaker(), T
    leases: dict[str, float] = {}
    for seconds, act, number in acts:
        now += seconds
        name = f"p{number}"
        if act == "admit":
            found = admit(breaker, SPEC, name, now)
            if found.before == "open":
                leases = {}
            if found.verdict == "probe":
                leases[name] = now + SPEC.lease
            assert found.wait <= SPEC.longest
            assert (found.wait > 0) is (found.verdict == "no")
        else:
            noted = note(breaker, SPEC, name, {"fine": True, "failed": False}.get(act), now)
            leases.pop(name, None)
            if noted.before is not None:
                leases = {}
        alive = [end for end in leases.values() if end > now]
        assert len(alive) <= SPEC.probes
        assert breaker.state != "closed" or not alive


@given(before=st.lists(st.tuples(st.floats(0, 5), st.booleans()), max_size=60))
def test_it_opens_within_its_window(before: list[tuple[float, bool]]) -> None:
    """Whatever came before: when all fail for a window, it is open at the end of that."""
    breaker, now = Breaker(), T
    for seconds, ok in before:
        now += seconds
        note(breaker, SPEC, "", ok, now)
    if breaker.state == "open":
        return
    end = now + SPEC.window
    while now < end and breaker.state == "closed":
        now += 2.0
        note(breaker, SPEC, "", False, now)
    assert breaker.state == "open"


@given(times=st.integers(0, 12), pause=st.floats(0.1, 3))
def test_it_closes_again_however_often_it_opened(times: int, pause: float) -> None:
    breaker, now, longest = Breaker(), T, 0.0
    for _ in range(SPEC.failures):
        note(breaker, SPEC, "", False, now)
    for _ in range(times):
        longest = max(longest, breaker.until - now)
        now = breaker.until
        assert admit(breaker, SPEC, "p", now).verdict == "probe"
        assert note(breaker, SPEC, "p", False, now).state == "open"
    assert longest <= SPEC.longest
    now = breaker.until
    for number in range(SPEC.wins):
        now += pause
        assert admit(breaker, SPEC, f"q{number}", now).verdict == "probe"
        note(breaker, SPEC, f"q{number}", True, now)
    assert breaker.state == "closed"
    assert admit(breaker, SPEC, "r", now).verdict == "go"


@given(acts=st.lists(st.tuples(st.floats(0, 2), st.booleans()), max_size=300))
def test_repeated_requests_stay_within_their_share(acts: list[tuple[float, bool]]) -> None:
    spec, now, repeated, said = RetrySpec(key="k"), T, 0, 0
    purse = Purse(spec.reserve, now)
    for first, (seconds, again) in enumerate(acts):
        now += seconds
        if again:
            repeated += spend(purse, spec, first - said, now)
            said = first
        most = spec.reserve + spec.share * first + spec.trickle * (now - T)
        assert repeated <= most + 1e-6


def test_a_clock_that_was_far_ahead_keeps_nobody_away() -> None:
    breaker = Breaker()
    for _ in range(SPEC.failures):
        note(breaker, SPEC, "", False, T + 1e6)
    assert breaker.state == "open"
    assert admit(breaker, SPEC, "a", T + 1e6).verdict == "no"
    assert admit(breaker, SPEC, "a", T).verdict == "probe"


def test_what_people_see_of_one() -> None:
    breaker = Breaker()
    note(breaker, SPEC, "", True, T)
    for _ in range(SPEC.failures):
        note(breaker, SPEC, "", False, T)
    seen = breaker_view("k", breaker, T + 3)
    assert (seen.state, seen.open_seconds, seen.failed, seen.asked) == ("open", 5.0, 4, 5)
    assert breaker_view("k", breaker, T + 9).state == "half-open", "the next request tries"
    admit(breaker, SPEC, "p", T + 9)
    assert breaker_view("k", breaker, T + 10).probes == 1
    assert breaker_view("k", breaker, T + 99).probes == 0


def test_who_asks_and_leaves_does_not_keep_it_from_the_others() -> None:
    breaker, spec, now = Breaker(), BreakerSpec(key="k"), T
    for _ in range(spec.row):
        note(breaker, spec, "", False, now)
    now = breaker.until
    for number in range(200):
        found = admit(breaker, spec, f"evil/{number}", now)
        now += 0.5
        if admit(breaker, spec, f"other/{number}", now).verdict != "no":
            note(breaker, spec, f"other/{number}", True, now)
        if breaker.state == "closed":
            break
        if found.verdict == "probe":
            note(breaker, spec, f"evil/{number}", None, now)
        now += 0.001
    assert breaker.state == "closed"
