"""How every environment stands, for the operator's eyes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from ringfence.config import SloSettings
from ringfence.control.promises import objectives
from ringfence.control.slo_view import standings
from ringfence.control.tenancy import moment
from ringfence.slo.budget import AlertState, Standing
from ringfence.store import slo
from ringfence.store.slo import AlertRow, Environment

_AT_ONCE = 500


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """One environment. name: its tenant's words; firing: alerts, by objective and rule; held_back:
    turns of low priority that wait for its budget.
    """

    place: Environment
    name: str
    standings: tuple[Standing, ...]
    firing: dict[tuple[str, str], AlertRow]
    held_back: int

    def promise(self) -> dict[str, Any]:
        """What is promised, as JSON."""
        return {**self._named(), "objectives": [_objective(one) for one in self.standings]}

    def to_json(self) -> dict[str, Any]:
        """How it stands."""
        found = [{**_objective(one), **_stands(one), **self._alerts(one)} for one in self.standings]
        return {**self._named(), "held_back": self.held_back, "objectives": found}

    def _named(self) -> dict[str, Any]:
        return {"tenant": self.place[0], "environment_id": self.place[1], "name": self.name}

    def _alerts(self, one: Standing) -> dict[str, Any]:
        rows = [row for (sli, _), row in self.firing.items() if sli == one.objective.sli]
        return {
            "firing": [{"rule": row.rule, "since": moment(row.since)} for row in rows],
            "relief_at": next((moment(row.relief_at) for row in rows if row.relief_at), None),
        }


def _objective(one: Standing) -> dict[str, Any]:
    objective = one.objective
    return {
        "slo": objective.sli.value,
        "share": objective.share,
        "seconds": objective.seconds or None,
        "window_days": objective.days,
        "min_events": objective.min_events,
    }


def _stands(one: Standing) -> dict[str, Any]:
    return {
        "total": one.counts.total,
        "bad": one.counts.bad,
        "left": round(one.left, 6),
        "exhausted": one.exhausted,
        "burn": [
            {"rule": each.name, "window": each.window, "rate": round(each.burn, 4)}
            for each in one.readings[1:]
        ],
    }


async def reports(connection: AsyncConnection, settings: SloSettings, at: int) -> list[Report]:
    """Of every environment that is not archived, at a moment (microseconds), by tenant and id."""
    held = await slo.held(connection)
    firing: dict[Environment, dict[tuple[str, str], AlertRow]] = {}
    for row in await slo.alerts(connection, state=AlertState.FIRING):
        firing.setdefault((row.tenant_id, row.environment_id), {})[row.key] = row
    found: list[Report] = []
    behind = ("", "")
    while page := await slo.definitions(connection, behind, _AT_ONCE):
        behind = page[-1][0]
        for place, body in page:
            promised = objectives(settings, body)
            report = Report(
                place=place,
                name=str(body.get("name", "")),
                standings=tuple(await standings(connection, place, promised, at)),
                firing=firing.get(place, {}),
                held_back=held.get(place, 0),
            )
            found.append(report)
    return found
