"""The summary of a test run names what was skipped: CI must not lose a backend unseen."""

from __future__ import annotations

from backends import NAMES, available, reasons, summary
from ringfence.policy.section import Isolation


def test_every_technology_of_a_policy_has_a_line() -> None:
    choices = Isolation.model_json_schema()["properties"]["backend"]
    assert all(name in str(choices) for name in NAMES)
    lines = summary({"gvisor": 3}, {"microvm": 2}, lambda n: "no KVM" if n == "microvm" else "")
    assert [line.split()[0] for line in lines] == list(NAMES)
    assert "gvisor      ran (3 tests)" in lines
    assert "microvm     SKIPPED (2 tests): no KVM" in lines
    assert "container   no tests were selected" in lines


def test_a_name_that_is_not_built_is_not_available() -> None:
    assert available("teleport") == "not part of this version"


def test_every_reason_is_said_with_how_many_it_kept() -> None:
    skipped = ["Skipped: needs euid 0", "Skipped: nginx is not installed", "Skipped: needs euid 0"]
    assert reasons(skipped) == ["    2  needs euid 0", "    1  nginx is not installed"]
    assert reasons([]) == []
