"""A fleet under fire: sessions that talk through it, a killer that shoots at its processes, and
what must hold when the smoke has gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anthropic import Anthropic
from harness import Box, bash, processes_with, script, wait_for
from platform_rig import TOOLS, up, words
from sqlalchemy import text

from ringfence.store.database import Database, open_postgresql, open_sqlite

KINDS = {"gateway": "serve", "worker": "worker", "egress": "ringfence.egress"}


@dataclass(kw_only=True)
class Storm:
    """`every`: turns that end between two shots, at least and at most: a busy host is not shot at
    oftener for each run than an idle one. `shots`: at most so many.
    """

    sessions: int
    turns: int
    every: tuple[int, int]
    shots: int = 1_000_000
    seed: int = 4711
    seconds: float = 1200.0
    killed: Counter[str] = field(default_factory=Counter)
    ended: list[int] = field(default_factory=list)


@dataclass(kw_only=True)
class Talk:
    """What one session's client saw: ids in the order of the stream, and the sent messages'."""

    session: str
    seen: list[str] = field(default_factory=list)
    sent: list[str] = field(default_factory=list)
    breaks: int = 0


def _parents() -> dict[int, tuple[int, bytes]]:
    """Pid to parent and command line, of all processes."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                line = (entry / "cmdline").read_bytes()
                stat = (entry / "stat").read_text().rpartition(")")[2].split()
                found[int(entry.name)] = (int(stat[1]), line)
    return found


def victims(supervisor: int, kind: str) -> list[int]:
    """Processes of a fleet of one kind."""
    every, word = _parents(), KINDS[kind].encode()
    members = {pid for pid, (parent, _) in every.items() if parent == supervisor}
    if kind == "egress":
        # the launchers below a worker name modules, too
        parents = {pid for pid in members if b"worker" in every[pid][1].split(b"\0")}
        return [p for p, (q, line) in every.items() if q in parents and word in line.split(b"\0")]
    return [pid for pid in members if word in every[pid][1].split(b"\0")]


@contextmanager
def firing(storm: Storm, supervisor: int) -> Iterator[None]:
    """SIGKILL at seeded moments while the block runs."""
    over, dice = threading.Event(), random.Random(storm.seed)

    def quiet(kind: str, ended: int, moment: float) -> bool:
        """Wait for two to shoot at, some ends and a moment; False when it is over."""
        while not over.wait(0.2):
            if len(storm.ended) >= ended and len(victims(supervisor, kind)) == 2:
                return not over.wait(moment)
        return False

    def shoot() -> None:
        kinds = list(KINDS)
        while (count := sum(storm.killed.values())) < storm.shots:
            more = dice.randint(*storm.every) if count else 0
            # each kind in turn: what hurts most first
            kind = kinds[(count + 1) % len(kinds)]
            if not quiet(kind, len(storm.ended) + more, dice.uniform(0.0, 3.0)):
                return
            with contextlib.suppress(ProcessLookupError, IndexError):
                os.kill(dice.choice(sorted(victims(supervisor, kind))), signal.SIGKILL)
                storm.killed[kind] += 1

    thread = threading.Thread(target=shoot)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(30)


def words_of(number: int) -> str:
    return f"said-{number}."


def prompt(number: int) -> str:
    """Mostly the shortest; every third has a call that takes long enough to be shot in."""
    if number % 3 == 1:
        return script(bash(f"echo {number} >> log; sleep 1"), {"text": words_of(number)})
    return script({"text": words_of(number)})


def talk(client: Anthropic, agent: str, place: str, storm: Storm) -> Talk:
    """Turns one after the other; the stream is taken up behind the last event that was seen."""
    once, events = {"Idempotency-Key": os.urandom(12).hex()}, client.beta.sessions.events
    made = _retried(
        lambda: client.beta.sessions.create(agent=agent, environment_id=place, extra_headers=once)
    )
    mine, idles, until = Talk(session=made.id), 0, time.monotonic() + storm.seconds
    for number in range(storm.turns):
        mine.sent.append(_say(client, mine.session, number))
        if not mine.seen:
            page = _retried(lambda: events.list(mine.session, limit=1, order="asc"))
            mine.seen.append(page.data[0].id)
        while idles <= number:
            assert time.monotonic() < until, f"{mine.session} has not come to turn {number}'s end"
            idles += _listen(client, mine)
        storm.ended.append(number)
    return mine


def _say(client: Anthropic, session: str, number: int) -> str:
    content = [{"type": "text", "text": prompt(number)}]
    sent = _retried(
        lambda: client.beta.sessions.events.send(
            session,
            events=[{"type": "user.message", "content": content}],  # type: ignore[list-item]
            extra_headers={"Idempotency-Key": f"{session}-{number}"},
        )
    )
    assert sent.data
    return str(sent.data[0].id)


def _retried(act: Callable[[], Any]) -> Any:
    """Through a gateway that is shot meanwhile; the key makes it one effect."""
    end = time.monotonic() + 120
    while True:
        try:
            return act()
        except Exception as error:
            status = getattr(error, "status_code", None)
            if time.monotonic() > end or (status and status < 500 and status not in {409, 429}):
                raise
            time.sleep(0.2)


def _listen(client: Anthropic, mine: Talk) -> int:
    """1 when the session is idle, 0 when the stream broke off before."""
    try:
        headers = {"Last-Event-ID": mine.seen[-1]}
        with client.beta.sessions.events.stream(mine.session, extra_headers=headers) as stream:
            for event in stream:
                mine.seen.append(event.id)
                if event.type == "session.status_idle":
                    return 1
    except Exception as error:
        status = getattr(error, "status_code", None)
        if status and status < 500 and status != 429:
            raise
    mine.breaks += 1
    time.sleep(0.2)
    return 0


def weather(box: Box, storm: Storm, *more: str) -> dict[str, Any]:
    """The whole storm; what was counted. Asserts all that must hold."""
    began = time.monotonic()
    with up(box, "--gateways", "2", "--workers", "2", *more) as (process, first):
        client = first.with_options(max_retries=2, timeout=60)
        agent = client.beta.agents.create(name="coder", model="claude-sonnet-4-5", tools=TOOLS)  # type: ignore[arg-type]
        place = client.beta.environments.create(name="place", config={"type": "cloud"})
        database = _database(box, process.pid)
        with firing(storm, process.pid), ThreadPoolExecutor(storm.sessions) as pool:
            talks = list(
                pool.map(lambda _: talk(client, agent.id, place.id, storm), range(storm.sessions))
            )
        spent = time.monotonic() - began
        told = {
            one.session: _retried(
                lambda one=one: list(client.beta.sessions.events.list(one.session, order="asc"))
            )
            for one in talks
        }
        rows = asyncio.run(_rows(database()))
        # what a dead worker left is removed by the living
        left = wait_for(lambda: not _left(box), 60)
        assert left, _left(box)
        process.send_signal(signal.SIGTERM)
        assert process.wait(150) == 0
    print("shots", shown(dict(storm.killed)), "seconds", round(spent))
    found = [_check(one, told[one.session], rows[one.session], storm) for one in talks]
    assert wait_for(lambda: not processes_with(str(box.state)))
    assert not _mounts(box), "mounts"
    verified = box.call("audit", "verify")
    assert verified.code == 0, verified.err
    return {
        "runs": storm.sessions * storm.turns,
        "seconds": round(spent),
        "killed": dict(storm.killed),
        "streams broken off": sum(one.breaks for one in talks),
        "ends": dict(sum((one["ends"] for one in found), Counter())),
        "rescheduled": sum(one["rescheduled"] for one in found),
        "said twice": sum(one["twice"] for one in found),
    }


def _check(mine: Talk, told: list[Any], rows: dict[str, Any], storm: Storm) -> dict[str, Any]:
    """One session: the stream is the table, every message has one end."""
    ids = [event.id for event in told]
    assert mine.seen == ids, "the stream is not the table"
    assert [row[0] for row in rows["events"]] == list(range(1, len(ids) + 1))
    assert [row[1] for row in rows["events"]] == ids
    messages = [row for row in rows["events"] if row[2] == "user.message"]
    # each message once, each in a turn of its own, and each turn with one end
    assert [row[1] for row in messages] == mine.sent
    assert [row[3] for row in messages] == list(range(1, storm.turns + 1))
    assert [row[0] for row in rows["turns"]] == list(range(1, storm.turns + 1))
    kinds = Counter(event.type for event in told)
    assert kinds["session.status_idle"] == storm.turns
    uses = [event.id for event in told if event.type == "agent.tool_use"]
    results = [event.tool_use_id for event in told if event.type == "agent.tool_result"]
    assert sorted(uses) == sorted(results), "a call has one result"
    ends, twice = Counter(row[1] for row in rows["turns"]), 0
    bodies = {event.id: event for event in told}
    for turn, end in rows["turns"]:
        own = [bodies[row[1]] for row in rows["events"] if row[3] == turn]
        said = words(own)
        if "session.status_rescheduled" not in [event.type for event in own]:
            assert (end, said) == ("succeeded", [words_of(turn - 1)]), (mine.session, turn)
            continue
        # asked to go on, the simulator has no script; what a lost attempt had told stands
        assert end != "succeeded" or said, (mine.session, turn)
        assert set(said) <= {words_of(turn - 1), "OK."}, (mine.session, turn, said)
        twice += len(said) - len(set(said))
    return {"ends": ends, "rescheduled": kinds["session.status_rescheduled"], "twice": twice}


def settings_of(supervisor: int) -> dict[str, str]:
    """A worker's: with services the addresses are new ones each time."""
    (pid, *_) = victims(supervisor, "worker")
    parts = Path(f"/proc/{pid}/environ").read_text().split("\0")
    pairs = (part.split("=", 1) for part in parts if part.startswith("RINGFENCE_"))
    return dict(pairs)


def _database(box: Box, supervisor: int) -> Callable[[], Database]:
    url = settings_of(supervisor).get("RINGFENCE_DATABASE")
    if url is None:
        return lambda: open_sqlite(box.state / "platform" / "platform.sqlite")
    return lambda: open_postgresql(url)


async def _rows(database: Database) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    async with database.reading() as connection:
        for name, columns, order in (
            ("events", "position, id, type, turn", "position"),
            ("turns", "turn, status", "turn"),
        ):
            query = f"SELECT session_id, {columns} FROM {name} ORDER BY session_id, {order}"
            for session, *row in await connection.execute(text(query)):
                found.setdefault(session, {"events": [], "turns": []})[name].append(row)
    await database.close()
    return found


def _left(box: Box) -> list[str]:
    """What sandboxes leave: directories, mounts, control groups of processes that are gone."""
    places = [box.state / kind for kind in ("egress", "session-files")]
    found = [str(path) for place in places if place.is_dir() for path in place.iterdir()]
    return found + _mounts(box) + _groups()


def _mounts(box: Box) -> list[str]:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line for line in lines if str(box.state) in line]


def _groups() -> list[str]:
    """Control groups whose worker is gone."""
    found = []
    for path in Path("/sys/fs/cgroup").rglob("ringfence-*-sb_*"):
        if not Path(f"/proc/{path.name.split('-')[1]}").exists():
            found.append(str(path))
    return found


def shown(numbers: dict[str, Any]) -> str:
    return json.dumps(numbers, sort_keys=True)
