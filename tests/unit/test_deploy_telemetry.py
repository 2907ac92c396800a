"""Rules and dashboards of `deploy/`: every name and label in them is one that processes have."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser as promql
import pytest
import yaml

from prometheus import missing, program
from ringfence.telemetry.catalogue import CATALOGUE, metric_of

ROOT = Path(__file__).parents[2]
RULES = yaml.safe_load((ROOT / "deploy/prometheus/rules.yaml").read_text())
DASHBOARDS = sorted((ROOT / "deploy/grafana").glob("*.json"))
TARGETS = {"job", "instance", "ringfence_process"}
"""Labels that Prometheus itself gives what it scrapes."""


def _rules() -> list[dict[str, Any]]:
    return [rule for group in RULES["groups"] for rule in group["rules"]]


RECORDED: dict[str, set[str]] = {}
"""Labels of what the recording rules make; filled as they are checked, in their order."""


def _panels(node: Any) -> Iterator[dict[str, Any]]:
    for panel in node.get("panels", ()):
        yield panel
        yield from _panels(panel)


def _expressions() -> list[tuple[str, str]]:
    found = [(rule.get("record") or rule["alert"], rule["expr"]) for rule in _rules()]
    for path in DASHBOARDS:
        for panel in _panels(json.loads(path.read_text())):
            found += [(panel["title"], one["expr"]) for one in panel.get("targets", ())]
    return found


def labels_of(name: str) -> set[str] | None:
    metric = metric_of(name)
    if metric is not None:
        le = {"le"} if name.endswith("_bucket") else set()
        return {*metric.labels, *le, *TARGETS}
    return RECORDED.get(name)


def wrong(expression: str) -> list[str]:
    """What an expression names that nobody has."""
    tree = promql.parse(expression.replace("$__rate_interval", "5m").replace("$tenant", "x"))
    found: list[str] = []
    _visit(tree, found)
    return found


def _visit(node: Any, found: list[str]) -> set[str]:
    """The labels that are left of a node; what is wrong in it goes to `found`."""
    if isinstance(node, promql.VectorSelector):
        labels = labels_of(node.name or "")
        if labels is None:
            found.append(f"metric {node.name}")
            return set()
        found += [
            f"{node.name}: label {one.name}"
            for one in node.matchers.matchers
            if one.name not in labels
        ]
        return labels
    if isinstance(node, promql.MatrixSelector):
        return _visit(node.vector_selector, found)
    if isinstance(node, promql.AggregateExpr):
        labels = _visit(node.expr, found)
        named = set(node.modifier.labels) if node.modifier is not None else set()
        found += [f"by {one}" for one in sorted(named - labels)]
        by = node.modifier is None or str(node.modifier.type).endswith("By")
        return named if by else labels - named
    if isinstance(node, promql.BinaryExpr):
        sides = _visit(node.lhs, found), _visit(node.rhs, found)
        return sides[0] or sides[1]
    if isinstance(node, promql.Call):
        labels = set[str]()
        for argument in node.args:
            labels |= _visit(argument, found)
        return labels - ({"le"} if node.func.name == "histogram_quantile" else set())
    if isinstance(node, promql.ParenExpr | promql.UnaryExpr | promql.SubqueryExpr):
        return _visit(node.expr, found)
    assert isinstance(node, promql.NumberLiteral | promql.StringLiteral), type(node)
    return set()


def _record() -> None:
    for rule in _rules():
        if "record" in rule:
            tree = promql.parse(rule["expr"])
            RECORDED[rule["record"]] = _visit(tree, [])


_record()


@pytest.mark.parametrize(("where", "expression"), _expressions())
def test_every_expression_names_what_there_is(where: str, expression: str) -> None:
    assert wrong(expression) == [], where


@pytest.mark.parametrize(
    ("expression", "why"),
    [
        ("sum(rate(ringfence_turn_total[5m]))", "metric ringfence_turn_total"),
        ("ringfence_queue_runs{status='dead'}", "ringfence_queue_runs: label status"),
        ("sum by (run_id) (ringfence_turns_total)", "by run_id"),
        ("ringfence_turn_seconds > 1", "metric ringfence_turn_seconds"),
        ("1 + sum by (le) (rate(ringfence_turn_seconds_sum[5m]))", "by le"),
        ("sum by (tenant) (ringfence:model_errors:ratio10m)", "by tenant"),
    ],
)
def test_an_expression_that_names_something_else_is_found(expression: str, why: str) -> None:
    assert wrong(expression) == [why]


def test_every_metric_is_looked_at_somewhere() -> None:
    text = "\n".join(expression for _, expression in _expressions())
    unused = {
        metric.name
        for metric in CATALOGUE
        if not any(re.search(rf"\b{name}\b", text) for name in metric.samples)
    }
    assert unused == set()


def test_every_alarm_says_what_to_do() -> None:
    page = (ROOT / "docs/how-to/observability.md").read_text()
    anchors = {
        re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^#+ (.*)$", page, re.MULTILINE)
    }
    names = [rule["alert"] for rule in _rules() if "alert" in rule]
    assert len(names) == len(set(names)) > 10
    for rule in _rules():
        if "alert" in rule:
            assert rule["labels"]["severity"] in {"info", "warning", "critical"}
            assert rule["annotations"].keys() == {"summary", "description", "runbook_url"}
            place, _, anchor = rule["annotations"]["runbook_url"].partition("#")
            assert place == "docs/how-to/observability.md"
            assert anchor in anchors, anchor


def test_dashboards_are_whole() -> None:
    assert DASHBOARDS
    for path in DASHBOARDS:
        board = json.loads(path.read_text())
        panels = list(_panels(board))
        assert len({panel["id"] for panel in panels}) == len(panels)
        taken: set[tuple[int, int]] = set()
        for panel in panels:
            place = panel["gridPos"]
            cells = {
                (place["x"] + x, place["y"] + y)
                for x in range(place["w"])
                for y in range(place["h"])
            }
            assert not cells & taken, panel["title"]
            assert max(x for x, _ in cells) < 24
            taken |= cells
            for one in panel.get("targets", ()):
                assert one["datasource"]["uid"] == "${datasource}"
        variables = {one["name"] for one in board["templating"]["list"]}
        used = set(re.findall(r"\$\{?(\w+)", json.dumps(board)))
        assert used - {"__rate_interval"} <= variables


def test_promtool_agrees() -> None:
    """Debian's `prometheus` has it; rules_test.yaml is what alarms do over time."""
    if reason := missing("promtool"):
        pytest.skip(reason)
    promtool = str(program("promtool"))
    for what in (["check", "rules", "rules.yaml"], ["test", "rules", "rules_test.yaml"]):
        done = subprocess.run(
            [promtool, *what],
            cwd=ROOT / "deploy/prometheus",
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
