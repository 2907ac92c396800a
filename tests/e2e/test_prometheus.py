"""Debian's own Prometheus, which scrapes a fleet and evaluates the rules of `deploy/`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import pytest
import yaml
from harness import Box, bash, script
from platform_rig import Watch, message, session_of, up

from prometheus import Server, missing, prometheus

DEPLOYED = Path(__file__).parents[2] / "deploy" / "prometheus"
# two processes have one, so that it finds no single partner: it loads, and fails when it is asked
WRONG = "ringfence_build_info / on() ringfence_build_info"


@pytest.mark.storm
def test_the_rules_hold_for_what_a_fleet_tells(box: Box, tmp_path: Path) -> None:
    """Every rule evaluates without an error, over the pages of two gateways and two workers; what
    is recorded is what was; a rule that is wrong is seen to be.
    """
    if reason := missing("prometheus"):
        pytest.skip(reason)
    place, wrong = box.place / "targets", tmp_path / "wrong.yaml"
    rules = [{"record": "test:wrong", "expr": WRONG}]
    wrong.write_text(yaml.safe_dump({"groups": [{"name": "wrong", "rules": rules}]}))
    metrics = {
        "RINGFENCE_TELEMETRY__METRICS": json.dumps({"targets": str(place)}),
        "RINGFENCE_SLO": json.dumps({"success": 0.99}),
    }
    fleet = ("--gateways", "2", "--workers", "2", "--slots", "1")
    with up(box, *fleet, **metrics) as (_, client), prometheus(_config(place, wrong)) as server:
        server.until(lambda: _scraped(server) == {"gateway": 2, "worker": 2})
        session = session_of(client)
        watch = Watch(client, session.id)
        message(client, session.id, script(bash("echo one"), {"text": "Done."}))
        watch.until("session.status_idle")
        watch.close()
        # what came after the first scrape of a series is what rates see
        server.until(lambda: _value(server, "sum(ringfence_turns_total)") == 1)
        server.until(lambda: _value(server, "sum(ringfence_slo_budget_left)") == 1)
        server.until(lambda: _value(server, "count(ringfence:model_cost_usd:rate1h)") == 1)
        found = server.until(lambda: _evaluated(server))
        assert _value(server, "sum(ringfence_model_requests_total)") == 2
        assert _value(server, "count(count by (ringfence_process) (up == 1))") >= 2
    deployed = yaml.safe_load((DEPLOYED / "rules.yaml").read_text())["groups"]
    ours = {rule.get("record") or rule["alert"] for group in deployed for rule in group["rules"]}
    faults = {name: rule["lastError"] for name, rule in found.items() if rule["health"] != "ok"}
    assert found.keys() == ours | {"test:wrong"}
    assert faults.keys() == {"test:wrong"}, faults
    assert "many-to-many" in faults["test:wrong"]
    states = {name: rule["state"] for name, rule in found.items() if rule["type"] == "alerting"}
    assert set(states.values()) == {"inactive"}, "one good turn alarms nobody"


def _config(targets: Path, *more: Path) -> dict[str, Any]:
    """As it is deployed, with an eye that does not wait."""
    config: dict[str, Any] = yaml.safe_load((DEPLOYED / "prometheus.yaml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(DEPLOYED / "rules.yaml"), *map(str, more)]
    (scrape,) = config["scrape_configs"]
    (found,) = scrape["file_sd_configs"]
    found["files"], found["refresh_interval"] = [f"{targets}/*.json"], "1s"
    return config


def _scraped(server: Server) -> dict[str, int]:
    """How many of each process answer."""
    found: dict[str, int] = {}
    for one in server.api("/api/v1/targets", state="active")["data"]["activeTargets"]:
        if one["health"] == "up":
            name = one["labels"]["ringfence_process"].partition("-")[0]
            found[name] = found.get(name, 0) + 1
    return found


def _value(server: Server, query: str) -> float | None:
    found = server.api("/api/v1/query", query=query)["data"]["result"]
    return float(found[0]["value"][1]) if found else None


def _evaluated(server: Server) -> dict[str, Any]:
    """Every rule by its name, once all have been evaluated."""
    groups = server.api("/api/v1/rules")["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    known = all(rule["health"] != "unknown" for rule in rules)
    return {rule["name"]: rule for rule in rules} if known else {}
