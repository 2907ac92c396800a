"""Buckets, queue, budgets and estimates: what holds whatever comes."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringfence.limits import budget, lane
from ringfence.limits.budget import Book, Charge, Hold, Money
from ringfence.limits.estimate import Estimator, Quantile
from ringfence.limits.lane import Amount, Caps, Lane, Seen, Spec, Want
from ringfence.limits.provider import DEFAULT_BLOCK, seen

T = 1000.0
SECONDS = st.floats(0, 30)
TOKENS = st.floats(0, 400)
ACTS = st.lists(
    st.tuples(SECONDS, st.sampled_from("abc"), st.booleans(), TOKENS, st.floats(-300, 300)),
    min_size=1,
    max_size=40,
)


def spec(**more: object) -> Spec:
    return Spec(**{"name": "org/p/m", "caps": Caps(input_tokens=3000.0), **more})  # type: ignore[arg-type]


def want(key: str, tenant: str = "a", tokens: float = 1.0, **more: object) -> Want:
    values = {"amount": Amount(1, tokens), "share": max(tokens, 1.0), **more}
    return Want(id=key, tenant=tenant, **values)  # type: ignore[arg-type]


@given(acts=ACTS, burst=st.sampled_from([0.02, 0.04, 0.3]))
def test_never_over_the_limit_in_any_window(
    acts: list[tuple[float, str, bool, float, float]], burst: float
) -> None:
    """What passed in any window, with what it turned out to be, at the moment of any grant."""
    made, state, now = spec(burst=burst, fill=1 - burst), Lane(), T
    taken: list[tuple[float, float]] = []
    waiting: list[Want] = []
    for number, (seconds, tenant, batch, tokens, off) in enumerate(acts):
        now += seconds
        waiting.append(want(f"t{number}", tenant, tokens, batch=batch))
        granted = lane.take(state, made, waiting, now).granted
        sizes = {each.id: each.amount.input_tokens for each in waiting}
        for key in granted:
            taken.append((now, sizes[key]))
            capacity = made.capacity(3000.0, 1)
            for since, _ in taken:
                passed = sum(size for at, size in taken if since <= at <= now)
                beyond = max(0.0, sizes[key] - capacity)
                allowed = capacity + made.rate(3000.0) * (now - since) + beyond
                assert passed <= allowed + 1e-6
                if now - since <= made.window:
                    assert passed <= 3000.0 + beyond + 1e-6
        waiting = [each for each in waiting if each.id not in granted]
        if granted:  # what it was in truth
            lane.settle(state, made, tenant, Amount(0, off), now)
            taken.append((now, -off))


@given(acts=ACTS)
def test_nobody_starves(acts: list[tuple[float, str, bool, float, float]]) -> None:
    """A request is served once the lane could have served all of its class that came before it,
    and the class's share of what came since, whatever keeps coming.
    """
    made, state, now = spec(batch_share=0.1), Lane(), T
    old = want("old", "z", 100.0, batch=True)
    waiting, served = [old], False
    chance = random.Random(len(acts))
    for step in range(4000):
        _, tenant, batch, tokens, _ = acts[step % len(acts)]
        while len(waiting) < 12:  # always more than can pass
            waiting.append(
                want(f"t{step}-{len(waiting)}-{chance.random()}", tenant, tokens + 50, batch=batch)
            )
        granted = lane.take(state, made, waiting, now).granted
        waiting = [each for each in waiting if each.id not in granted]
        if "old" in granted:
            served = True
            break
        now += 1.0
    assert served
    assert now - T < 600


@given(debt=st.floats(1, 50_000), tokens=st.floats(1, 5000))
def test_debt_is_paid_to_the_last_token(debt: float, tokens: float) -> None:
    made, state = spec(), Lane()
    lane.take(state, made, [want("first", tokens=tokens)], T)
    lane.settle(state, made, "a", Amount(0, -debt), T)
    capacity, rate = made.capacity(3000.0, 1), made.rate(3000.0)
    owed = min(50.0, capacity) - (capacity - tokens - debt)
    if owed > 1:
        early = T + (owed - 1) / rate
        assert lane.take(state, made, [want("next", tokens=50.0)], early).granted == ()
    late = T + max(0.0, owed + 1) / rate
    assert lane.take(state, made, [want("next", tokens=50.0)], late).granted == ("next",)


@given(
    left=st.lists(st.floats(0, 200), min_size=1, max_size=5),
    blocks=st.lists(st.floats(0, 20), min_size=1, max_size=5),
    data=st.randoms(use_true_random=False),
)
def test_corrections_come_to_the_same_in_any_order(
    left: list[float], blocks: list[float], data: random.Random
) -> None:
    told = [Seen(left=Caps(input_tokens=each)) for each in left]
    told += [Seen(blocked=each) for each in blocks]
    ends = []
    for _ in range(2):
        state = Lane()
        lane.take(state, spec(), [], T)
        for each in told:
            lane.correct(state, spec(), each, T)
        ends.append((state.levels, state.blocked))
        data.shuffle(told)
    assert ends[0] == ends[1]


def test_tenants_that_are_gone_are_forgotten() -> None:
    state = Lane()
    for number in range(640):
        lane.take(state, Spec(name="x"), [want(f"t{number}", f"tenant{number}")], T + 60 * number)
    assert 60 <= len(state.tenants) < 130


@given(
    acts=st.lists(
        st.tuples(st.integers(0, 9), st.floats(0, 3), st.floats(0, 1), st.booleans()),
        max_size=60,
    )
)
def test_a_budget_is_never_exceeded(acts: list[tuple[int, float, float, bool]]) -> None:
    """As long as nothing costs more than its worst case."""
    book, cap, held = Book(), 10.0, dict[str, float]()
    for number, (key, worst, part, pays) in enumerate(acts):
        name = f"h{key}"
        if pays and name in held:
            budget.pay(book, name, Money(part * held.pop(name), 1))
        elif name not in held:
            wish = Hold(
                id=name,
                charges=(Charge("b", cap, None),),
                worst=Money(worst, 1),
                likely=Money(worst / 2, 1),
                seconds=1e9,
            )
            if budget.hold(book, wish, T + number).verdict == "held":
                held[name] = worst
        (standing,) = budget.standing(book) or [budget.Spent("b", Money(), Money())]
        assert standing.spent.usd + standing.held.usd <= cap + 1e-6
        assert standing.held.usd == pytest.approx(sum(held.values()))


@given(values=st.lists(st.floats(1, 1e6), min_size=1, max_size=80))
def test_a_quantile_lies_among_what_came(values: list[float]) -> None:
    quantile = Quantile()
    for value in values:
        quantile.add(value)
    assert quantile.value is not None
    assert min(values) / 1.001 <= quantile.value <= max(values) * 1.2501


def test_the_past_fades() -> None:
    quantile = Quantile()
    for value in (*[10_000.0] * 200, *[100.0] * 60):
        quantile.add(value)
    assert quantile.value is not None
    assert quantile.value < 130


def test_estimates_are_learned_and_never_of_max_tokens() -> None:
    estimator = Estimator()
    first = estimator.estimate("l", "a", 40_000, 64_000)
    assert first == (10_000, 400)
    for _ in range(30):
        estimator.learn("l", "a", 40_000, 2_000, 900)
    into, out = estimator.estimate("l", "a", 80_000, 64_000)
    assert into == pytest.approx(4_000, rel=0.26)
    assert out == pytest.approx(900, rel=0.26)
    assert estimator.estimate("l", "new", 80_000, 64_000) == (into, out), "from the lane's others"
    assert estimator.estimate("other", "a", 40_000, 64_000) == first
    assert estimator.estimate("l", "a", 80_000, 100)[1] == 100, "but no more than it may"


def test_what_is_remembered_is_bounded() -> None:
    estimator = Estimator()
    for number in range(5000):
        estimator.learn("l", f"t{number}", 1000, 250, 10)
    assert len(estimator._known) <= 4096


@given(text=st.text(max_size=12))
def test_a_provider_that_talks_nonsense_says_nothing(text: str) -> None:
    names = ("limit", "remaining", "reset")
    headers = {f"anthropic-ratelimit-requests-{name}": text for name in names}
    found = seen({**headers, "retry-after": text}, refused=True)
    for value in (*found.caps, *found.left):
        assert value is None or (math.isfinite(value) and value >= 0)
    assert 0 < found.blocked <= 86_400


def test_what_a_provider_says() -> None:
    headers = {
        "anthropic-ratelimit-requests-limit": "50",
        "anthropic-ratelimit-requests-remaining": "49",
        "anthropic-ratelimit-input-tokens-limit": "30000",
        "anthropic-ratelimit-output-tokens-remaining": "0",
        "retry-after": "7",
    }
    found = seen(headers, refused=False)
    assert found == Seen(caps=Caps(50, 30_000, None), left=Caps(49, None, 0), blocked=0.0)
    assert seen(headers, refused=True).blocked == 7.0
    assert seen({}, refused=True).blocked == DEFAULT_BLOCK


@settings(max_examples=30)
@given(weights=st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5)))
def test_shares_follow_weights(weights: tuple[int, int, int]) -> None:
    """Within one request of each, of all that was served while all had some waiting."""
    made, state, now = Spec(name="x", caps=Caps(requests=60)), Lane(), T
    wants = [
        want(f"{name}{number}", name, weight=float(weight))
        for name, weight in zip("abc", weights, strict=True)
        for number in range(60)
    ]
    served: list[str] = []
    while len(served) < 60:
        granted = lane.take(state, made, wants, now).granted
        served += granted
        wants = [each for each in wants if each.id not in granted]
        now += 1.05
    for name, weight in zip("abc", weights, strict=True):
        due = len(served) * weight / sum(weights)
        assert abs(sum(each[0] == name for each in served) - due) <= 2
