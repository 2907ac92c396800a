"""`ringfence isolation list`, `--isolation` and `auto`, as a person meets them."""

from __future__ import annotations

from harness import Box


def test_the_list_names_every_technology(box: Box) -> None:
    policy = str(box.policy({"preset": "strict"}))
    done = box.call("isolation", "list", "--json", "--policy", policy)
    assert done.code == 0, done.err
    rows = {row["name"]: row for row in done.json["technologies"]}
    assert set(rows) == {"bubblewrap", "runtime", "container", "gvisor", "microvm"}
    for row in rows.values():
        assert row["available"] or row["problem"]
        assert row["kernel_bug"]
        assert row["needs"]
    assert rows["bubblewrap"]["available"]
    assert 0.001 < rows["bubblewrap"]["start_up"]["seconds"] < 60
    assert done.json["takes"] == "bubblewrap"
    again = box.call("isolation", "list", "--json", "--policy", policy)
    kept = {row["name"]: row for row in again.json["technologies"]}
    assert kept["bubblewrap"]["start_up"] == rows["bubblewrap"]["start_up"], "measured once"


def test_a_weaker_isolation_is_denied_and_the_same_one_is_not(box: Box) -> None:
    box.policy({"preset": "strict"})
    denied = box.execute("true", "--isolation", "runtime")
    assert denied.code == 3
    assert denied.json["error"]["code"] == "isolation-denied"
    assert box.execute("true", "--isolation", "bubblewrap").code == 0


def test_auto_says_what_it_took_and_why(box: Box) -> None:
    policy = str(box.policy({"preset": "strict", "isolation": {"threat_model": "own_code"}}))
    done = box.call("exec", "-w", str(box.workspace), "--policy", policy, "--", "true")
    assert done.code == 0, done.err
    assert "bubblewrap for threat model own_code" in " ".join(done.err.split())
    (started,) = [r for r in box.records() if r["type"] == "sandbox.started"]
    assert started["isolation"] == "bubblewrap"
    assert started["threat_model"] == "own_code"
    assert "own_code" in started["reason"]
