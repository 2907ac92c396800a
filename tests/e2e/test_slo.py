"""Error budgets with a real `ringfence up`, the real claude, a simulator and an operator's server."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import pytest
from anthropic import Anthropic
from harness import Box, script
from platform_rig import TOOLS, Hook, Watch, kinds, message, up, words

SLO = {"success": 0.5, "min_events": 2, "window_days": 1}


@pytest.mark.storm
def test_agents_that_fail_are_told_of_and_what_nobody_waits_for_waits(box: Box) -> None:
    kind = ["slo.alert_fired"]
    with (
        Hook() as hook,
        up(
            box,
            *("--slots", "1"),
            RINGFENCE_WEBHOOKS=hook.settings(kinds=kind),
            RINGFENCE_SLO=json.dumps(SLO),
        ) as (_, client),
    ):
        agent = client.beta.agents.create(name="coder", model="claude-sonnet-4-5", tools=TOOLS).id
        place = client.beta.environments.create(name="place", config={"type": "cloud"}).id

        def turn(text: str, until: str, *, batch: bool = False) -> tuple[Any, list[Any]]:
            session = client.beta.sessions.create(
                agent=agent, environment_id=place, extra_body={"ringfence": {"batch": batch}}
            )
            watch = Watch(client, session.id)
            message(client, session.id, text)
            found = watch.until(until)
            return client.beta.sessions.retrieve(session.id), found

        # before anything has failed, work of low priority runs
        _, found = turn(script({"text": "Early."}), "session.status_idle", batch=True)
        assert words(found) == ["Early."]
        for _ in range(3):
            _, found = turn(script({"error": 400, "times": 9}), "session.status_idle")
            assert found[-1].stop_reason.type == "retries_exhausted"
        told = {_rule(hook.next(90), place) for _ in range(2)}
        assert told == {"ticket", "budget"}
        stopped, found = turn(script({"text": "Late."}), "session.status_rescheduled", batch=True)
        assert stopped.status == "rescheduling"
        assert "agent.message" not in kinds(found)
        (error,) = [event for event in found if event.type == "session.error"]
        assert error.error.message.startswith("error-budget-spent")
        _, found = turn(script({"text": "At once."}), "session.status_idle")
        assert words(found) == ["At once."]
        _seen_by_the_operator(box, client, place)


def _rule(told: Any, place: str) -> str:
    data = told.data.model_dump()
    assert (data["type"], data["id"]) == ("slo.alert_fired", place)
    return str(data["ringfence"]["rule"])


def _seen_by_the_operator(box: Box, client: Anthropic, place: str) -> None:
    shown = box.call("slo", "status", "--json", RINGFENCE_SLO=json.dumps(SLO))
    assert shown.code == 0, shown.err
    (one,) = json.loads(shown.out)
    assert (one["environment_id"], one["held_back"]) == (place, 1)
    (objective,) = one["objectives"]
    # three failed, one came early, one at once
    assert (objective["bad"], objective["total"]) == (3, 5)
    stats = box.call("queue", "stats", "--json", RINGFENCE_SLO=json.dumps(SLO))
    assert json.loads(stats.out)["held_back"] == 1
    assert [one.status for one in client.beta.sessions.list()].count("rescheduling") == 1
