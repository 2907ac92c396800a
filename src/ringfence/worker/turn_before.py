"""What attempts before this one have left of a turn, as its session's events tell it."""

from __future__ import annotations

import itertools

from ringfence.control import turns
from ringfence.control.turns import NewEvent, Turn
from ringfence.errors import UnavailableError
from ringfence.queue.protocol import RetryAfter
from ringfence.store import events as rows
from ringfence.store.database import Database
from ringfence.worker.public_events import cut_off

MAX_TIMES_AWAY = 12
"""How often a turn waits for a model that does not answer, the client's own retries apart: in all
about forty minutes. Then it ends for its caller."""
_BUSY, BUSY_SECONDS = 60, 5.0
"""So often a turn is put off because its directory is held, each time for so long."""
AWAY = "the model did not answer"
"""How the event begins that tells of it."""


async def lost_calls(database: Database, turn: Turn) -> tuple[list[NewEvent], set[str]]:
    """Results for the calls that attempts before this one began and did not end; and the events of
    the calls that have one.
    """
    if turn.attempt == 1:
        return [], set()
    kinds = ("agent.tool_use", "agent.mcp_tool_use", "agent.tool_result", "agent.mcp_tool_result")
    async with database.reading() as connection:
        found = await rows.of_turn(connection, turn.tenant, turn.session_id, kinds, turn.turn)
    ended = {
        str(row.body.get("tool_use_id") or row.body.get("mcp_tool_use_id"))
        for row in found
        if row.type.endswith("_result")
    }
    lost = [
        cut_off(row.type, row.id)
        for row in found
        if row.type.endswith("_use") and row.id not in ended
    ]
    return lost, ended


async def times_away(database: Database, turn: Turn) -> int:
    """How often the turn has been put off because the model did not answer."""
    async with database.reading() as connection:
        told = await rows.of_turn(
            connection, turn.tenant, turn.session_id, ("session.error",), turn.turn
        )
    return sum(str(row.body["error"]["message"]).startswith(AWAY) for row in told)


async def busy(database: Database, turn: Turn, error: UnavailableError) -> Exception:
    """What is raised where the session's directory is held: the turn is put off. An attempt that
    was given up ends when it finds that out; a sandbox that cannot be stopped may have it for ever,
    and a turn is not put off without end: then it is the error itself.

    Raises:
        Superseded.
    """
    if error.code != "session-busy" or await times_put_off(database, turn) >= _BUSY:
        return error
    async with database.writing() as connection:
        await turns.put_off(connection, turn)
    return RetryAfter(BUSY_SECONDS, error.message)


async def times_put_off(database: Database, turn: Turn) -> int:
    """How often it has been because its directory was another's: such an attempt tells of nothing
    before that, and one that waits for the model of an error.
    """
    begun, put_off = "session.status_running", "session.status_rescheduled"
    kinds = (begun, put_off, "session.error")
    async with database.reading() as connection:
        found = await rows.of_turn(connection, turn.tenant, turn.session_id, kinds, turn.turn)
    return [*itertools.pairwise(row.type for row in found)].count((begun, put_off))
