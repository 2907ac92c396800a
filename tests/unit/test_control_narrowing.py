"""An environment can only narrow the operator's policy, whatever it says."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringfence.control.environment_shapes import EnvironmentDefinition, resolved
from ringfence.control.narrowing import NetworkRules, narrow
from ringfence.errors import CallerError, DeniedError
from ringfence.policy.compile import compile_policy
from ringfence.policy.decide import Outcome, decide_host, host_rule
from ringfence.policy.diff import diff
from ringfence.policy.document import PolicyDocument
from ringfence.policy.load import PRESETS, from_mapping

HOSTS = (
    "api.anthropic.com",
    "a.example.com",
    "b.example.com",
    "c.b.example.com",
    "other.example.org",
)
WILD = ("*.example.com", "*.b.example.com")
PATHS = ("/srv/data", "/srv/data/deep", "/srv/other", "/workspace", "/workspace/sub")


PATTERNS = ("ephemeral", "hybrid", "long-running", "multi-agent")
WAYS = [
    {"provider": "aws"},
    {"provider": "gcp"},
    {"provider": "gcp", "model": "claude-sonnet-5"},
    {"model": "claude-opus-5"},
]
ELSEWHERE = [{"provider": "azure"}, {"provider": "aws", "model": "claude-sonnet-5"}]
CARE = ("own_code", "internal_team", "third_party_input", "hostile_multi_tenant")
LIVES = {"ephemeral": 0, "hybrid": 1, "long-running": 2, "multi-agent": 0}


def environment(networking: dict[str, Any] | None = None, **block: Any) -> EnvironmentDefinition:
    config: dict[str, Any] = {"type": "cloud"}
    if networking is not None:
        config["networking"] = networking
    return EnvironmentDefinition.model_validate({"name": "x", "config": config, "ringfence": block})


def limited(*hosts: str, **more: Any) -> dict[str, Any]:
    return {"type": "limited", "allowed_hosts": list(hosts), **more}


grants = st.lists(
    st.builds(
        lambda host, port, paths, opaque: {
            "host": host,
            "port": port,
            "paths": [] if opaque else paths,
            "opaque": opaque,
        },
        st.sampled_from([*HOSTS[1:], *WILD]),
        st.sampled_from([443, 8443]),
        st.lists(st.sampled_from(["GET /v1/**", "POST /v1/a"]), max_size=2, unique=True),
        st.booleans(),
    ),
    max_size=5,
    unique_by=lambda grant: (grant["host"], grant["port"]),
)


@st.composite
def ceilings(draw: st.DrawFn) -> PolicyDocument:
    model = draw(st.booleans())
    values: dict[str, Any] = {
        "version": 1,
        "preset": draw(st.sampled_from(PRESETS)),
        "network": {"allowed_hosts": [*(["api.anthropic.com"] if model else []), *draw(grants)]},
        "execution": {"max_memory_mb": draw(st.sampled_from([256, 2048])), "cpus": 1.5},
        "isolation": draw(
            st.sampled_from(
                [
                    {},
                    {"backend": "gvisor"},
                    {"backend": "microvm", "emulation": "allow"},
                    {"threat_model": "internal_team"},
                    {"backend": "gvisor", "threat_model": "third_party_input"},
                    {"backend": "auto", "threat_model": "hostile_multi_tenant"},
                ]
            )
        ),
        "hosting": {"pattern": draw(st.sampled_from(PATTERNS))},
        "model": draw(st.sampled_from([{}, {"failover": WAYS, "fallback": "claude-haiku-4-5"}])),
        "filesystem": {
            "readable_paths": draw(st.sampled_from([[], ["/srv/data"]])),
            "blocked_paths": ["/srv/secret"],
            "hidden": ["*.key"],
        },
    }
    return from_mapping(values)


@st.composite
def environments(draw: st.DrawFn) -> EnvironmentDefinition:
    def maybe(strategy: st.SearchStrategy[Any]) -> Any:
        return draw(st.none() | strategy)

    paths = st.lists(st.sampled_from(PATHS), max_size=2)
    network = draw(
        st.none()
        | st.just({"type": "unrestricted"})
        | st.builds(
            lambda hosts, mcp, packages: limited(
                *hosts, allow_mcp_servers=mcp, allow_package_managers=packages
            ),
            st.lists(st.sampled_from([*HOSTS, *WILD]), max_size=3),
            st.booleans(),
            st.booleans(),
        )
    )
    block = {
        "isolation": maybe(
            st.sampled_from(["auto", "bubblewrap", "runtime", "container", "gvisor", "microvm"])
        ),
        "threat_model": maybe(st.sampled_from(CARE)),
        "failover": maybe(
            st.lists(st.sampled_from([*WAYS, *ELSEWHERE]), max_size=3, unique_by=str)
        ),
        "hosting": maybe(st.sampled_from([one.replace("-", "_") for one in PATTERNS])),
        "filesystem": maybe(
            st.fixed_dictionaries(
                {},
                optional={
                    "workspace": st.sampled_from(["review", "direct", "readonly"]),
                    "readable_paths": paths,
                    "writable_paths": paths,
                    "blocked_paths": st.just(["/srv/data/deep"]),
                    "hidden": st.just(["*.secret"]),
                    "tmp_exec": st.just(False),
                    "exec_in_workspace": st.just(False),
                },
            )
        ),
        "execution": maybe(
            st.fixed_dictionaries(
                {},
                optional={
                    "max_memory_mb": st.sampled_from([64, 1024, 9000]),
                    "cpus": st.sampled_from([0.5, 3.0]),
                    "allow_subprocess": st.just(False),
                },
            )
        ),
    }
    return environment(network, **block)


@settings(max_examples=120)
@given(
    ceilings(),
    environments(),
    st.booleans(),
    st.lists(st.sampled_from(HOSTS), max_size=2),
    st.sampled_from([(), ("a.example.com",)]),
)
def test_what_is_compiled_never_allows_more_than_the_ceiling(
    ceiling: PolicyDocument,
    asked: EnvironmentDefinition,
    unrestricted: bool,
    mcp_hosts: list[str],
    package_hosts: tuple[str, ...],
) -> None:
    rules = NetworkRules(unrestricted=unrestricted, package_hosts=package_hosts)
    try:
        narrowed = narrow(ceiling, asked, rules, mcp_hosts=mcp_hosts)
    except (DeniedError, CallerError):
        return
    assert not diff(ceiling, narrowed).widens
    # a sandbox lives no longer, and is shared by several agents only where the operator has it so
    own, pattern = ceiling.hosting.pattern, narrowed.hosting.pattern
    assert LIVES[pattern] <= LIVES[own]
    assert pattern != "multi-agent" or own == "multi-agent"
    if ceiling.isolation.threat_model is not None:
        assert narrowed.isolation.threat_model is not None
        assert CARE.index(narrowed.isolation.threat_model) >= CARE.index(
            ceiling.isolation.threat_model
        )
    # a request goes where it could have gone, and nowhere else
    served, could = (compile_policy(one).egress.model.failover for one in (narrowed, ceiling))
    assert set(served) <= set(could)
    # by the code that decides at run time, which neither narrowing nor diff is made of
    most, least = compile_policy(ceiling).egress, compile_policy(narrowed).egress
    for host in HOSTS:
        for port in (443, 8443):
            if decide_host(least, host, port).outcome is Outcome.ALLOW:
                assert decide_host(most, host, port).outcome is Outcome.ALLOW
                one, other = host_rule(least, host, port), host_rule(most, host, port)
                assert one is not None
                assert other is not None
                assert (one.paths, one.opaque) == (other.paths, other.opaque)
    # spelled out, it means the same
    again = EnvironmentDefinition.model_validate(resolved(asked))
    assert narrow(ceiling, again, rules, mcp_hosts=mcp_hosts) == narrowed


def test_narrowing_is_not_refusing_everything() -> None:
    ceiling = from_mapping(
        {
            "version": 1,
            "preset": "developer",
            "network": {"allowed_hosts": ["api.anthropic.com", "*.example.com"]},
            "filesystem": {"readable_paths": ["/srv/data"]},
            "hosting": {"pattern": "long-running"},
        }
    )
    asked = environment(
        limited("a.example.com"),
        isolation="gvisor",
        hosting="long_running",
        filesystem={"readable_paths": ["/srv/data"], "workspace": "readonly"},
        execution={"max_memory_mb": 100},
    )
    narrowed = narrow(ceiling, asked, NetworkRules())
    assert [grant.host for grant in narrowed.network.allowed_hosts] == [
        "api.anthropic.com",
        "a.example.com",
    ]
    assert narrowed.filesystem.readable_paths == ("/srv/data",)
    assert narrowed.filesystem.workspace == "readonly"
    assert narrowed.execution.max_memory_mb == 100
    assert narrowed.execution.pids == ceiling.execution.pids
    assert (narrowed.isolation.backend, narrowed.hosting.pattern) == ("gvisor", "long-running")


def test_without_networking_only_the_model_is_reached() -> None:
    ceiling = from_mapping(
        {"version": 1, "network": {"allowed_hosts": ["api.anthropic.com", "a.example.com"]}}
    )
    narrowed = narrow(ceiling, environment(), NetworkRules())
    assert [grant.host for grant in narrowed.network.allowed_hosts] == ["api.anthropic.com"]


def test_unrestricted_is_refused_until_the_operator_settles_it() -> None:
    ceiling = from_mapping({"version": 1, "network": {"allowed_hosts": ["a.example.com"]}})
    asked = environment({"type": "unrestricted"})
    with pytest.raises(DeniedError) as caught:
        narrow(ceiling, asked, NetworkRules())
    assert caught.value.code == "unrestricted-denied"
    allowed = narrow(ceiling, asked, NetworkRules(unrestricted=True))
    assert allowed.network == ceiling.network


def test_a_wildcard_keeps_the_narrower_lines_below_it() -> None:
    ceiling = from_mapping(
        {
            "version": 1,
            "network": {
                "allowed_hosts": [
                    "*.example.com",
                    {"host": "a.example.com", "paths": ["GET /v1/**"]},
                ]
            },
        }
    )
    narrowed = narrow(ceiling, environment(limited("*.example.com")), NetworkRules())
    rule = host_rule(compile_policy(narrowed).egress, "a.example.com", 443)
    assert rule is not None
    assert [path.path for path in rule.paths] == ["/v1/**"]


@pytest.mark.parametrize(
    ("networking", "block", "word"),
    [
        (limited("evil.example.net"), {}, "evil.example.net"),
        (limited("*.example.net"), {}, "*.example.net"),
        (limited(allow_package_managers=True), {}, "allow_package_managers"),
        (None, {"execution": {"cpus": 3.0}}, "execution.cpus"),
        (None, {"isolation": "runtime"}, "isolation"),
        (None, {"isolation": "auto"}, "threat_model"),
        (None, {"threat_model": "own_code", "isolation": "auto"}, "isolation"),
        (None, {"hosting": "long_running"}, "hosting: long_running"),
        (None, {"hosting": "multi_agent"}, "hosting: multi_agent"),
        (None, {"filesystem": {"readable_paths": ["/srv/other"]}}, "/srv/other"),
        (None, {"filesystem": {"writable_paths": ["/srv/data"]}}, "/srv/data"),
        (None, {"filesystem": {"readable_paths": ["/srv/data/deep"]}}, "/srv/data/deep"),
        (None, {"filesystem": {"workspace": "direct"}}, "workspace"),
        (None, {"failover": [{"provider": "aws"}]}, "failover: the same model at aws"),
    ],
)
def test_what_is_wider_is_refused_by_its_name(
    networking: dict[str, Any] | None, block: dict[str, Any], word: str
) -> None:
    ceiling = from_mapping(
        {
            "version": 1,
            "network": {"allowed_hosts": ["a.example.com"]},
            "filesystem": {"readable_paths": ["/srv/data"], "workspace": "review"},
            "isolation": {"backend": "container"},
            "hosting": {"pattern": "hybrid"},
            "execution": {"cpus": 2.0},
        }
    )
    with pytest.raises(DeniedError, match=word.replace("*", r"\*")):
        narrow(ceiling, environment(networking, **block), NetworkRules())


@pytest.mark.parametrize(
    ("own", "allowed"),
    [
        ("ephemeral", {"ephemeral"}),
        ("hybrid", {"ephemeral", "hybrid"}),
        ("long-running", {"ephemeral", "hybrid", "long-running"}),
        ("multi-agent", {"ephemeral", "multi-agent"}),
    ],
)
def test_a_hosting_pattern_stays_within_the_operators(own: str, allowed: set[str]) -> None:
    ceiling = from_mapping({"version": 1, "hosting": {"pattern": own}})
    found = set()
    for pattern in PATTERNS:
        with contextlib.suppress(DeniedError):
            asked = environment(hosting=pattern.replace("-", "_"))
            found.add(narrow(ceiling, asked, NetworkRules()).hosting.pattern)
    assert found == allowed
    assert narrow(ceiling, environment(), NetworkRules()).hosting.pattern == own


def test_more_care_than_the_operators_is_allowed() -> None:
    isolation = {"backend": "gvisor", "threat_model": "internal_team"}
    ceiling = from_mapping({"version": 1, "isolation": isolation})
    asked = environment(threat_model="third_party_input", isolation="gvisor")
    narrowed = narrow(ceiling, asked, NetworkRules())
    assert narrowed.isolation.threat_model == "third_party_input"
    # a boundary that is strong enough does not make up for less care
    for care in ("own_code", "internal_team"):
        with pytest.raises(DeniedError, match=f"threat_model: {care}"):
            narrow(narrowed, environment(threat_model=care, isolation="gvisor"), NetworkRules())


HAIKU = "claude-haiku-4-5"
"""The ceiling's fallback: a way at its own provider, the last."""


def ways(ceiling: PolicyDocument, *named: dict[str, str]) -> list[tuple[str | None, str | None]]:
    narrowed = narrow(ceiling, environment(failover=list(named)), NetworkRules())
    found = compile_policy(narrowed).egress.model.failover
    return [(leg.provider, leg.model) for leg in found]


def test_the_operators_ways_are_left_out_and_put_in_another_order() -> None:
    ceiling = from_mapping({"version": 1, "model": {"failover": WAYS, "fallback": HAIKU}})
    aws, gcp, other, here = ((one.get("provider"), one.get("model")) for one in WAYS)
    assert ways(ceiling, WAYS[1], WAYS[0]) == [gcp, aws]
    assert ways(ceiling, WAYS[2]) == [other]
    # the operator's own provider may be named, or not
    assert ways(ceiling, {"provider": "anthropic", "model": "claude-opus-5"}) == [here]
    assert ways(ceiling, {"model": HAIKU}, WAYS[0]) == [(None, HAIKU), aws]
    assert ways(ceiling) == [], "none of them, not the fallback either"
    untouched = compile_policy(narrow(ceiling, environment(), NetworkRules()))
    left = [(leg.provider, leg.model) for leg in untouched.egress.model.failover]
    assert left == [aws, gcp, other, here, (None, HAIKU)]


@pytest.mark.parametrize(
    "way", [*ELSEWHERE, {"model": "claude-sonnet-5"}, {"provider": "anthropic"}]
)
def test_a_way_that_is_not_the_operators_is_refused(way: dict[str, str]) -> None:
    """Not by a provider and a model that stand in two of the operator's, either."""
    ceiling = from_mapping({"version": 1, "model": {"failover": WAYS, "fallback": HAIKU}})
    with pytest.raises(DeniedError, match="failover: ") as refused:
        ways(ceiling, WAYS[0], way)
    assert refused.value.code == "environment-denied"
    with pytest.raises(CallerError, match="drop it"):
        ways(ceiling, WAYS[0], WAYS[0])
