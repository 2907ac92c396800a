"""One reader of the store for all streams of this process, and what each stream has still to send.

Every few milliseconds one query asks for the newest positions of all sessions that are followed;
what is new of one is read once and encoded once, however many follow it. A follower is a position
and nothing else: nothing is kept for it, and one that falls behind what is kept in common reads the
store for itself, from where it stands. So a slow one costs no memory, and none misses an event or
gets it twice, whichever process it comes back to.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import structlog

from ringfence.control import session_view
from ringfence.control.journal import new_event_id
from ringfence.errors import DeniedError, RingfenceError
from ringfence.store import events, sessions
from ringfence.store.database import Database, now
from ringfence.store.events import EventRow

_PAGE, _PAGE_BYTES = 50, 4 << 20
_KEPT_BYTES = 1_000_000
_PAUSE = 1.0
"""Seconds after the store did not answer."""

_LAST = frozenset({"session.status_terminated", "session.deleted"})
_LOG = structlog.get_logger("ringfence.gateway")


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """One event as it goes out. last: nothing follows."""

    position: int
    data: bytes
    last: bool


def frame(row: EventRow) -> Frame:
    """The event in the format that the official client's `Stream` decodes: its type is the name,
    its id the id that `Last-Event-ID` hands back.
    """
    body = json.dumps(session_view.event(row), separators=(",", ":"))
    data = f"event: {row.type}\nid: {row.id}\ndata: {body}\n\n".encode()
    return Frame(position=row.position, data=data, last=row.type in _LAST)


@dataclass(kw_only=True, slots=True)
class _Topic:
    """A session that is followed: frames of the positions `floor` + 1 to `position`."""

    tenant: str
    session: str
    position: int
    floor: int
    followers: int = 0
    kept: deque[Frame] = field(default_factory=deque)
    size: int = 0
    deleted: Frame | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def publish(self, frames: Sequence[Frame]) -> None:
        for one in frames:
            self.kept.append(one)
            self.size += len(one.data)
            self.position = one.position
        while self.size > _KEPT_BYTES:
            dropped = self.kept.popleft()
            self.size -= len(dropped.data)
            self.floor = dropped.position
        self.wake()

    def wake(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()

    def end(self) -> None:
        row = EventRow(
            position=self.position + 1,
            id=new_event_id(),
            type="session.deleted",
            body={},
            turn=None,
            created_at=now(),
            processed_at=now(),
        )
        self.deleted = frame(row)
        self.wake()


class Follower:
    """One stream's place in a session."""

    def __init__(self, fanout: Fanout, topic: _Topic, position: int) -> None:
        self._fanout = fanout
        self._topic = topic
        self._position = position
        self.left = False

    def leave(self) -> None:
        """The reader is gone: wait for nothing more."""
        self.left = True
        self._topic.wake()

    async def frames(self, wait: float) -> Sequence[Frame]:
        """What comes next; nothing when so many seconds pass without, or it is to end.

        Raises:
            UnavailableError: it is far behind, and the store does not answer.
        """
        topic = self._topic
        changed = topic.changed
        if self._position < topic.floor:
            return self._moved(await self._fanout.read(topic, self._position))
        if self._position < topic.position:
            return self._moved([one for one in topic.kept if one.position > self._position])
        if topic.deleted is not None:
            return [topic.deleted]
        if not (self.left or self._fanout.draining):
            try:
                async with asyncio.timeout(wait):
                    await changed.wait()
            except TimeoutError:
                pass
        return []

    def _moved(self, frames: Sequence[Frame]) -> Sequence[Frame]:
        if frames:
            self._position = frames[-1].position
        return frames


class Fanout:
    """All streams of a process.

    `total` and `each` bound the streams that are open, of the process and of one tenant.
    """

    def __init__(
        self, database: Database, *, total: int = 768, each: int = 512, every: float = 0.1
    ) -> None:
        self._database = database
        self._total, self._each, self._every = total, each, every
        self._topics: dict[str, _Topic] = {}
        self._open: Counter[str] = Counter()
        self._kicked = asyncio.Event()
        self._stopped = False
        self.draining = False

    def kick(self) -> None:
        """Something was written by this process; look now."""
        self._kicked.set()

    def drain(self) -> None:
        """Let every stream end."""
        self.draining = True
        for topic in self._topics.values():
            topic.wake()

    def stop(self) -> None:
        """Let `run` end, when it has read what it is reading."""
        self.drain()
        self._stopped = True
        self.kick()

    @contextmanager
    def following(
        self, tenant: str, session: str, *, position: int, head: int
    ) -> Iterator[Follower]:
        """Follow a session, which is the tenant's, from behind a position; `head` is its newest.

        Raises:
            DeniedError: `streams-exhausted`.
        """
        if self._open.total() >= self._total or self._open[tenant] >= self._each:
            raise DeniedError(
                "streams-exhausted",
                "too many event streams are open",
                hint="close some, or read the list of events instead",
            )
        topic = self._topics.get(session)
        if topic is None:
            topic = _Topic(tenant=tenant, session=session, position=head, floor=head)
            self._topics[session] = topic
        self._open[tenant] += 1
        topic.followers += 1
        self.kick()
        try:
            yield Follower(self, topic, position)
        finally:
            topic.followers -= 1
            self._open[tenant] -= 1
            if topic.followers == 0:
                del self._topics[session]

    async def run(self) -> None:
        """Until `stop`. While the store is away streams stay open, and catch up later."""
        while not self._stopped:
            pause = self._every if self._topics else None
            try:
                async with asyncio.timeout(pause):
                    await self._kicked.wait()
            except TimeoutError:
                pass
            self._kicked.clear()
            try:
                await self._look()
            except RingfenceError as error:
                _LOG.warning("streams wait for the store", code=error.code, why=error.message)
                await asyncio.sleep(_PAUSE)

    async def _look(self) -> None:
        topics = [topic for topic in self._topics.values() if topic.deleted is None]
        if not topics:
            return
        async with self._database.reading() as connection:
            heads = await sessions.heads(connection, [topic.session for topic in topics])
        for topic in topics:
            head = heads.get(topic.session)
            if head is None:
                topic.end()
            elif head > topic.position:
                frames = await self.read(topic, topic.position)
                topic.publish(frames)
                if topic.position < head:
                    self.kick()

    async def read(self, topic: _Topic, position: int) -> Sequence[Frame]:
        """A page of what follows a position. Raises UnavailableError."""
        async with self._database.reading() as connection:
            found = await events.beyond(
                connection,
                topic.tenant,
                topic.session,
                position,
                limit=_PAGE,
                most_bytes=_PAGE_BYTES,
            )
        return [frame(row) for row in found]
