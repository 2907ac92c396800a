"""Transcripts in Redis or Valkey: every act is one script, and time is the server's.

A script runs alone, so that an append and the look at its lease are one moment. All keys of a
tenant have one hash tag and so lie in one slot of a cluster. How much a crash of the server can
lose is the server's setting (`appendonly`, `appendfsync`, replicas): what an append returned for
is in its memory. A server that may evict keys is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from ringfence.errors import CallerError, UnavailableError
from ringfence.record.session_base import (
    Holder,
    Place,
    Row,
    SessionInfo,
    SessionLimits,
    SessionStore,
    away,
    busy,
    taken_over,
    too_long,
)
from ringfence.record.transcript import PROJECT

_WAIT = 5.0
_AT_ONCE = 200
"""Entries that are read with one command, so that no other client waits long."""

_CLOCK = """
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
"""

# A script that has written is not undone: all that could refuse comes first.
_WRITE = (
    _CLOCK
    + """
local run, token, max, parent, session = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4], ARGV[5]
if run ~= '' then
  local held = redis.call('HMGET', KEYS[1], 'run', 'token')
  if held[1] ~= run or held[2] ~= token then return 'taken' end
end
local size, fresh, at = 0, {}, 7
for stream = 1, tonumber(ARGV[6]) do
  local uuids, seen = KEYS[4 + 2 * stream], {}
  local subpath, count = ARGV[at], tonumber(ARGV[at + 1])
  at = at + 2
  for _ = 1, count do
    local uuid, body = ARGV[at], ARGV[at + 1]
    if uuid == '' or not (seen[uuid] or redis.call('SISMEMBER', uuids, uuid) == 1) then
      seen[uuid] = true
      size = size + #body
      fresh[#fresh + 1] = {stream, subpath, uuid, body}
    end
    at = at + 2
  end
end
if tonumber(redis.call('HGET', KEYS[2], 'bytes') or '0') + size > max then return 'long' end
redis.call('HSETNX', KEYS[2], 'created', now)
redis.call('HSET', KEYS[2], 'changed', now)
if parent ~= '' then redis.call('HSET', KEYS[2], 'parent', parent) end
redis.call('HINCRBY', KEYS[2], 'bytes', size)
redis.call('HINCRBY', KEYS[2], 'entries', #fresh)
redis.call('ZADD', KEYS[3], now, session)
for _, row in ipairs(fresh) do
  redis.call('RPUSH', KEYS[3 + 2 * row[1]], row[4])
  if row[3] ~= '' then redis.call('SADD', KEYS[4 + 2 * row[1]], row[3]) end
  redis.call('SADD', KEYS[4], row[2])
end
return 'done'
"""
)

_TAKE = (
    _CLOCK
    + """
local held = redis.call('HMGET', KEYS[1], 'run', 'token', 'expires')
local expires, last = tonumber(held[3] or '0'), tonumber(ARGV[2])
local alive = expires > now and expires <= now + last
if alive and not (held[1] >= ARGV[3] and held[1] < ARGV[1]) then return {0, held[1]} end
local token = tonumber(held[2] or '0') + 1
redis.call('HSET', KEYS[1], 'run', ARGV[1], 'token', token, 'expires', now + last)
return {token, ''}
"""
)

_EXTEND = (
    _CLOCK
    + """
local held = redis.call('HMGET', KEYS[1], 'run', 'token')
if held[1] ~= ARGV[1] or held[2] ~= ARGV[2] then return 'taken' end
if ARGV[3] == '' then
  redis.call('HSET', KEYS[1], 'run', '', 'expires', 0)
else
  redis.call('HSET', KEYS[1], 'expires', now + tonumber(ARGV[3]))
end
return 'done'
"""
)

# keys of the streams are made here, of a prefix in the same slot: which there are is known here
_DELETE = """
local subpaths = ARGV[2] ~= '' and {ARGV[2]} or redis.call('SMEMBERS', KEYS[3])
for _, subpath in ipairs(subpaths) do
  redis.call('DEL', ARGV[3] .. subpath, ARGV[4] .. subpath)
  redis.call('SREM', KEYS[3], subpath)
end
if ARGV[2] == '' then
  redis.call('DEL', KEYS[1], KEYS[3])
  redis.call('ZREM', KEYS[2], ARGV[1])
end
return 'done'
"""

_KEEP = """
local folded = tonumber(redis.call('HGET', KEYS[1], 'folded') or '0')
if redis.call('EXISTS', KEYS[1]) == 1 and folded < tonumber(ARGV[2]) then
  redis.call('HSET', KEYS[1], 'summary', ARGV[1], 'folded', ARGV[2])
end
return 'done'
"""


class RedisSessionStore(SessionStore):
    """SessionStore over a Redis of version 7 or newer, or a Valkey.

    Raises:
        CallerError: `settings-invalid` for what is no URL of a Redis.
        UnavailableError: `store-unavailable`.
    """

    def __init__(self, url: str, limits: SessionLimits | None = None) -> None:
        super().__init__(limits)
        try:
            self._redis = redis.Redis.from_url(
                url,
                socket_timeout=_WAIT,
                socket_connect_timeout=_WAIT,
                decode_responses=True,
                # a script whose answer was lost may have run: what tries again must know that
                retry=Retry(NoBackoff(), 0),
            )
        except ValueError:
            raise CallerError(
                "settings-invalid",
                "session_store is not a URL of a Redis",
                hint="write redis[s]://user:password@host:port/number",
            ) from None
        self._scripts = {
            name: self._redis.register_script(script)
            for name, script in (
                ("write", _WRITE),
                ("take", _TAKE),
                ("extend", _EXTEND),
                ("delete", _DELETE),
                ("keep", _KEEP),
            )
        }
        self._refuse_eviction()

    def close(self) -> None:
        """End the connections."""
        self._redis.close()

    def _refuse_eviction(self) -> None:
        memory: Any = self._ask(lambda server: server.info("memory"))
        policy = memory.get("maxmemory_policy", "noeviction")
        if memory.get("maxmemory", 0) and policy != "noeviction":
            self.close()
            raise away("Redis", f"it drops keys when it is full ({policy})", "noeviction keeps all")

    def _ask(self, act: Callable[[redis.Redis], Any]) -> Any:
        with _faults():
            return act(self._redis)

    def _script(self, name: str, keys: Sequence[str], *values: str | int) -> Any:
        with _faults():
            return self._scripts[name](keys=keys, args=values)

    def _write(
        self,
        place: Place,
        streams: Mapping[str, Sequence[Row]],
        *,
        holder: Holder | None = None,
        parent: str | None = None,
    ) -> None:
        keys = [_lease(place), _meta(place), _index(place), _subs(place)]
        run, token = holder or ("", 0)
        values: list[str | int] = [run, token, self.limits.max_bytes, parent or "", place.session]
        values.append(len(streams))
        for subpath, rows in streams.items():
            keys += [_stream(place) + subpath, _uuids(place) + subpath]
            values += [subpath, len(rows)]
            for identity, body in rows:
                values += [identity or "", body]
        match self._script("write", keys, *values):
            case "taken":
                raise taken_over(place.session)
            case "long":
                raise too_long(self.limits)

    def _lines(
        self, place: Place, subpath: str, *, start: int = 0, stop: int | None = None
    ) -> list[str]:
        key = _stream(place) + subpath
        if start < 0:
            return list(self._ask(lambda server: server.lrange(key, start, -1)))
        lines: list[str] = []
        while stop is None or start < stop:
            end = start + _AT_ONCE if stop is None else min(start + _AT_ONCE, stop)
            part = self._ask(partial(_lrange, key=key, start=start, stop=end))
            lines += part
            if len(part) < end - start:
                break
            start = end
        return lines

    def _subpaths(self, place: Place) -> list[str]:
        found = self._ask(lambda server: server.smembers(_subs(place)))
        return sorted(subpath for subpath in found if subpath)

    def _delete(self, place: Place, subpath: str | None) -> None:
        self._script(
            "delete",
            [_meta(place), _index(place), _subs(place)],
            *(place.session, subpath or "", _stream(place), _uuids(place)),
        )

    def _listed(self, tenant: str, project: str) -> list[tuple[str, int]]:
        index = _index(Place(tenant, project, ""))
        found = self._ask(lambda server: server.zrange(index, 0, -1, withscores=True))

        def are_there(server: redis.Redis) -> list[Any]:
            pipe = server.pipeline(transaction=False)
            for session, _ in found:
                pipe.exists(_stream(Place(tenant, project, session)))
            return pipe.execute()

        there = self._ask(are_there) if found else []
        return [
            (session, int(changed))
            for (session, changed), main in zip(found, there, strict=True)
            if main
        ]

    def _infos(self, tenant: str, limit: int, skip: int) -> list[SessionInfo]:
        index = _index(Place(tenant, PROJECT, ""))
        last = -1 if limit < 0 else skip + limit - 1
        names = self._ask(lambda server: server.zrevrange(index, skip, last))

        def look(server: redis.Redis) -> list[Any]:
            pipe: Any = server.pipeline(transaction=False)
            for name in names:
                place = Place(tenant, PROJECT, name)
                pipe.hgetall(_meta(place)).hmget(_lease(place), "run", "expires")
            return [*pipe.time().execute()]

        *found, (seconds, micros) = self._ask(look)
        now = seconds * 1000 + micros // 1000
        pairs = zip(names, found[::2], found[1::2], strict=True)
        # one that was deleted in between has no fields any more
        return [_info(name, meta, lease, now) for name, meta, lease in pairs if meta]

    def _take(self, place: Place, run: str, since: str) -> int:
        token, held = self._script("take", [_lease(place)], run, self.limits.lease_ms, since)
        if not token:
            raise busy(place.session, held, self.limits)
        return int(token)

    def _extend(self, place: Place, holder: Holder) -> None:
        if self._script("extend", [_lease(place)], *holder, self.limits.lease_ms) == "taken":
            raise taken_over(place.session)

    def _give_back(self, place: Place, holder: Holder) -> None:
        self._script("extend", [_lease(place)], *holder, "")

    def _summary(self, place: Place) -> tuple[str | None, int]:
        found = self._ask(lambda server: server.hmget(_meta(place), "summary", "folded"))
        return found[0], int(found[1] or 0)

    def _keep_summary(self, place: Place, text: str, folded: int) -> None:
        self._script("keep", [_meta(place)], text, folded)


def _lrange(server: redis.Redis, *, key: str, start: int, stop: int) -> Any:
    return server.lrange(key, start, stop - 1)


def _tag(tenant: str) -> str:
    """`-` is no tenant's id: the one of a host of one's own."""
    return f"ringfence:{{{tenant or '-'}}}"


def _lease(place: Place) -> str:
    return f"{_tag(place.tenant)}:lease:{place.session}"


def _meta(place: Place) -> str:
    return f"{_tag(place.tenant)}:session:{place.project}/{place.session}"


def _index(place: Place) -> str:
    return f"{_tag(place.tenant)}:sessions:{place.project}"


def _subs(place: Place) -> str:
    return f"{_tag(place.tenant)}:subpaths:{place.project}/{place.session}"


def _stream(place: Place) -> str:
    return f"{_tag(place.tenant)}:entries:{place.project}/{place.session}/"


def _uuids(place: Place) -> str:
    return f"{_tag(place.tenant)}:uuids:{place.project}/{place.session}/"


def _info(name: str, meta: dict[str, str], lease: list[str | None], now: int) -> SessionInfo:
    run, expires = lease
    return SessionInfo(
        session_id=name,
        created=int(meta["created"]) / 1000,
        changed=int(meta["changed"]) / 1000,
        bytes=int(meta["bytes"]),
        parent=meta.get("parent", ""),
        entries=int(meta["entries"]),
        held_by=(run or "") if int(expires or 0) > now else "",
        first_prompt="",
    )


@contextmanager
def _faults() -> Iterator[None]:
    """Without the message, which can hold what was sent."""
    hint = "see that it runs, that its memory is not full, and RINGFENCE_SESSION_STORE"
    try:
        yield
    except (redis.RedisError, OSError) as error:
        raise away("Redis", f"it does not answer ({type(error).__name__})", hint) from error
    except UnicodeDecodeError:
        raise UnavailableError(
            "store-unavailable", "an entry of the transcript is damaged"
        ) from None
