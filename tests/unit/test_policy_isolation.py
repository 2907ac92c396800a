"""Which technology a threat model gets, and what may stand in place of a policy's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringfence.errors import CallerError, DeniedError, UnavailableError
from ringfence.model import RunRequest
from ringfence.policy.compile import compile_policy
from ringfence.policy.isolation import (
    BOUNDARIES,
    TECHNOLOGIES,
    THREAT_MODELS,
    THREATS,
    Availability,
    choose,
    enough,
    strength,
)
from ringfence.policy.lint import lint
from ringfence.policy.load import from_mapping
from ringfence.policy.problems import PolicyInvalidError
from ringfence.policy.section import Isolation
from ringfence.sandbox.protocol import Control, ControlState
from ringfence.sandbox.registry import Backends, Picked
from ringfence.worker.prepare import check, narrowed, refuse_emulated, start_notices

HERE = Availability()
GONE = Availability(problem="not installed", mend="install it")


def rules(**isolation: Any) -> Any:
    return compile_policy(from_mapping({"version": 1, "isolation": isolation}))


class Fake:
    """A backend that can run, or lacks controls."""

    def __init__(self, name: str, *missing: Control, emulated: bool = False) -> None:
        self.name, self.missing, self.emulated = name, missing, emulated
        self.not_held: dict[str, str] = {}
        self.probed = 0

    def probe(self, profile: Any) -> list[ControlState]:
        self.probed += 1
        return [
            ControlState(control=c, enforced=c not in self.missing, how="x", mend=f"mend {c.value}")
            for c in Control
        ]


def known(*fakes: Fake) -> Backends:
    return Backends({fake.name: lambda fake=fake: fake for fake in fakes})


def test_the_tables_are_whole() -> None:
    choices = get_args(get_args(Isolation.model_fields["backend"].annotation)[0])
    assert set(choices) == {*TECHNOLOGIES, "auto"}
    assert set(BOUNDARIES) == set(TECHNOLOGIES)
    assert set(THREATS) == set(THREAT_MODELS)


@pytest.mark.parametrize(
    ("threat_model", "first"),
    [
        ("own_code", "bubblewrap"),
        ("internal_team", "container"),
        ("third_party_input", "gvisor"),
        ("hostile_multi_tenant", "microvm"),
    ],
)
def test_the_best_fit_is_taken_where_all_are_there(threat_model: Any, first: str) -> None:
    choice = choose(threat_model, dict.fromkeys(TECHNOLOGIES, HERE))
    assert choice.technology == first
    assert threat_model in choice.reason


@given(
    st.sampled_from(THREAT_MODELS),
    st.dictionaries(
        st.sampled_from(TECHNOLOGIES),
        st.builds(Availability, problem=st.sampled_from(["", "no"]), emulated=st.booleans()),
    ),
)
def test_never_a_weaker_one(threat_model: Any, states: dict[str, Availability]) -> None:
    choice = choose(threat_model, states)
    if choice.technology is None:
        assert choice.mend
        assert not any(
            not state.problem and enough(name, threat_model, emulated=state.emulated)
            for name, state in states.items()
        )
    else:
        state = states[choice.technology]
        assert not state.problem
        assert enough(choice.technology, threat_model, emulated=state.emulated)


def test_an_emulated_machine_is_never_hostile_grade() -> None:
    states = {"microvm": Availability(emulated=True)}
    assert choose("hostile_multi_tenant", states).technology is None
    assert "emulated" in choose("hostile_multi_tenant", states).reason
    assert choose("hostile_multi_tenant", {"microvm": HERE}).technology == "microvm"


def test_a_refusal_says_what_to_install() -> None:
    choice = choose("third_party_input", {"bubblewrap": HERE, "gvisor": GONE})
    assert choice.technology is None
    assert "gvisor: install it" in choice.mend
    assert "microvm: it needs QEMU" in choice.mend


def test_auto_tries_the_best_fit_first_and_stops() -> None:
    container, bubblewrap = Fake("container", Control.MEMORY), Fake("bubblewrap")
    gvisor = Fake("gvisor")
    profile = rules(threat_model="internal_team").sandbox
    picked = known(gvisor, bubblewrap, container).pick(profile)
    assert picked.backend.name == "bubblewrap"
    assert "not container: it cannot enforce memory" in picked.reason
    assert (container.probed, bubblewrap.probed, gvisor.probed) == (1, 1, 0)


def test_auto_without_a_strong_one_refuses_the_start() -> None:
    with pytest.raises(UnavailableError) as caught:
        known(Fake("bubblewrap")).pick(rules(threat_model="third_party_input").sandbox)
    assert caught.value.code == "isolation-unavailable"
    assert "gvisor" in caught.value.hint


def test_auto_needs_a_threat_model_and_a_threat_model_means_auto() -> None:
    with pytest.raises(PolicyInvalidError):
        rules(backend="auto")
    assert rules(threat_model="own_code").sandbox.isolation == "auto"
    assert rules().sandbox.isolation == "bubblewrap"
    named = rules(backend="gvisor", threat_model="own_code").sandbox
    assert named.isolation == "gvisor"


def test_lint_finds_a_weaker_one_than_the_threat_model_asks_for() -> None:
    def ids(**isolation: Any) -> set[str]:
        document = from_mapping({"version": 1, "isolation": isolation})
        return {finding.id for finding in lint(document)}

    assert "POL041" in ids(backend="bubblewrap", threat_model="third_party_input")
    assert "POL041" not in ids(backend="gvisor", threat_model="third_party_input")
    assert "POL041" not in ids(threat_model="hostile_multi_tenant")


def test_what_a_policy_names_and_is_too_weak_is_said_at_the_start() -> None:
    profile = rules(backend="bubblewrap", threat_model="third_party_input").sandbox
    notices = start_notices(known(Fake("bubblewrap")).pick(profile), profile)
    assert [notice.kind for notice in notices] == ["isolation-weak"]
    profile = rules(backend="bubblewrap").sandbox
    assert start_notices(known(Fake("bubblewrap")).pick(profile), profile) == []


@pytest.mark.parametrize("named", TECHNOLOGIES)
@pytest.mark.parametrize("asked", TECHNOLOGIES)
def test_a_run_can_only_ask_for_one_as_strong(tmp_path: Path, named: Any, asked: Any) -> None:
    policy = rules(backend=named)
    request = RunRequest(prompt="x", workspace=str(tmp_path), isolation=asked)
    if strength(asked) >= strength(named):
        check(request, policy, state_dir=tmp_path / "state")
        assert narrowed(policy, request).sandbox.isolation == asked
        return
    with pytest.raises(DeniedError) as caught:
        check(request, policy, state_dir=tmp_path / "state")
    assert caught.value.code == "isolation-denied"
    assert named in caught.value.hint
    assert asked not in caught.value.hint


def test_a_run_cannot_undercut_a_threat_model(tmp_path: Path) -> None:
    policy = rules(threat_model="third_party_input")
    check(
        RunRequest(prompt="x", workspace=str(tmp_path), isolation="microvm"),
        policy,
        state_dir=tmp_path / "state",
    )
    for asked, error in (("bubblewrap", DeniedError), ("teleport", CallerError)):
        with pytest.raises(error):
            check(
                RunRequest(prompt="x", workspace=str(tmp_path), isolation=asked),
                policy,
                state_dir=tmp_path / "state",
            )


REFUSED: list[dict[str, Any]] = [
    {"threat_model": "hostile_multi_tenant"},
    {"threat_model": "hostile_multi_tenant", "emulation": "allow"},
    {"threat_model": "third_party_input", "emulation": "allow"},
    {"backend": "bubblewrap", "emulation": "allow"},
    {"backend": "gvisor", "emulation": "allow"},
]


@pytest.mark.parametrize("isolation", REFUSED)
def test_an_emulated_machine_cannot_be_asked_for_in_place_of_something_stronger(
    isolation: dict[str, Any],
) -> None:
    stated = rules(**isolation).sandbox
    with pytest.raises(DeniedError) as caught:
        refuse_emulated("microvm", Picked(Fake("microvm", emulated=True)), stated)
    assert caught.value.code == "isolation-denied"
    assert "emulated on this host" in caught.value.message
    assert "microvm" not in caught.value.hint
    refuse_emulated("microvm", Picked(Fake("microvm", emulated=False)), stated)


def test_an_emulated_machine_does_where_the_policy_calls_it_enough() -> None:
    machine = Picked(Fake("microvm", emulated=True))
    named = rules(backend="microvm", emulation="allow").sandbox
    refuse_emulated("microvm", machine, named)
    refuse_emulated(None, machine, rules(backend="microvm").sandbox)
    refuse_emulated("microvm", machine, rules(threat_model="own_code").sandbox)
    refuse_emulated("microvm", machine, rules(backend="runtime", emulation="allow").sandbox)


def test_what_a_policy_that_allows_emulation_holds_for_enough(tmp_path: Path) -> None:
    """Its floor is an emulated machine's: a stronger one may replace it, and does without it."""
    request = RunRequest(prompt="x", workspace=str(tmp_path), isolation="bubblewrap")
    lenient = rules(backend="microvm", emulation="allow")
    check(request, lenient, state_dir=tmp_path / "state")
    with pytest.raises(DeniedError):
        check(request, rules(backend="microvm"), state_dir=tmp_path / "state")


def test_a_policy_that_names_an_emulated_one_below_its_threat_model_is_told() -> None:
    isolation = {"backend": "microvm", "threat_model": "hostile_multi_tenant"}
    profile = rules(**isolation, emulation="allow").sandbox
    notices = start_notices(known(Fake("microvm", emulated=True)).pick(profile), profile)
    assert [notice.kind for notice in notices] == ["isolation-weak"]
    assert start_notices(known(Fake("microvm", emulated=False)).pick(profile), profile) == []


def test_the_list_calls_a_refused_emulation_what_it_is() -> None:
    class Refusing(Fake):
        def probe(self, _: Any) -> Any:
            raise UnavailableError("emulation-refused", "emulated", hint="allow it")

    state = known(Refusing("microvm")).availability("microvm", rules().sandbox)
    assert state == Availability(problem="emulated", mend="allow it", emulated=True)
