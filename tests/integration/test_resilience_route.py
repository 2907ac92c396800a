"""Retries, breakers and failover on the model route: egress on real sockets, a worker's desk, a shared
store, and providers that fail.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import ssl
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from egress_rig import HOST, RULES, ask, event, message, until
from egress_rig import _answer as answer_of
from test_limits_route import Told, Worker

from ringfence.agent.messages import ToolEnded, ToolResult, ToolStarted
from ringfence.channel.messages import GuardUsed, ModelCalled, ModelTurn, ProviderConfig, PutOff
from ringfence.config import LimitSettings
from ringfence.config.resilience import BreakerSettings, RetrySettings
from ringfence.egress.address import Resolver
from ringfence.egress.credentials import CredentialError, Credentials
from ringfence.egress.model.course import Patience
from ringfence.egress.sandboxes import SandboxState
from ringfence.egress.tls import Authority
from ringfence.egress.turns import Turns
from ringfence.errors import UnavailableError
from ringfence.limits.sqlite import SqliteLimits
from ringfence.limits.store import MemoryLimits
from ringfence.policy.compiled import EgressRules, Failover, HostRule, ToolGrants
from ringfence.record.events import BreakerChanged, ModelMoved
from ringfence.telemetry.hub import Telemetry
from ringfence.telemetry.labels import Labels
from ringfence.telemetry.prometheus import PrometheusMeters
from ringfence.testing.upstream import make_chain
from ringfence.worker.breakers import Breakers
from ringfence.worker.desk import Desk
from ringfence.worker.guards import ToolWatch
from ringfence.worker.listening import heard, turns_told

SSE = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
OVERLOADED = b"HTTP/1.1 529 X\r\ncontent-length: 2\r\n%b\r\n{}"
START = event("message_start", message={"model": "claude-sonnet-5", "usage": {"input_tokens": 5}})
REST = (
    event("content_block_start", index=0, content_block={"type": "text", "text": ""})
    + event("content_block_delta", index=0, delta={"type": "text_delta", "text": "Hi."})
    + event("content_block_stop", index=0)
    + event("message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 3})
    + event("message_stop")
    + b"0\r\n\r\n"
)
GOOD = SSE + START + REST
DROP = b""
BURST = Patience(base=0.01, longest=0.05, total=2.0)
EAGER = RetrySettings(reserve=50)


class Provider:
    """Answers each connection by the first of `script`, and when that is used up by `otherwise`."""

    def __init__(self, *script: bytes, otherwise: bytes = GOOD) -> None:
        self.script, self.otherwise = list(script), otherwise
        self.bodies: list[dict[str, Any]] = []
        self.heads: list[bytes] = []
        self.silent = False

    def next(self) -> bytes:
        return self.script.pop(0) if self.script else self.otherwise

    @property
    def asked(self) -> int:
        return len(self.bodies)

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        self.config = ProviderConfig(base_url=f"http://127.0.0.1:{port}", credential=None)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(
                line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")
            )
            body = await reader.readexactly(int(length.split(b":")[1]))
            self.heads.append(head)
            self.bodies.append(json.loads(body))
            writer.write(self.next())
            await writer.drain()
        writer.close()


class Place:
    """Workers on one store, before providers by name."""

    def __init__(self, place: Path, providers: dict[str, Provider], **settings: Any) -> None:
        self._place, self.providers, self.workers = place, providers, list[Worker]()
        self.limits = LimitSettings.model_validate(settings.pop("limits", {}))
        self.breakers = BreakerSettings.model_validate(settings.pop("breakers", {}))
        self.retries = settings.pop("retries", EAGER)
        self.patience = settings.pop("patience", BURST)
        self.store = SqliteLimits(place / "limits" / "limits.sqlite")

    chain: Path

    def worker(self) -> Worker:
        name = f"w{len(self.workers)}"
        store = SqliteLimits(self._place / "limits" / "limits.sqlite")
        made = Worker(self._place, "http://127.0.0.1:9", self.limits, store, name)
        made.recorder = Told()
        made.meters = PrometheusMeters(frozenset({"worker"}))
        labels = Labels(tenants=1, providers=self.providers)
        made.hub = Telemetry(labels=labels, meters=made.meters)
        made.desk = Desk(
            self.limits,
            store,
            heard(made.recorder, made.hub),
            reply=turns_told(made._reply, made.hub),
            post=made.notices.append,
            name=name,
            breakers=self.breakers,
            retries=self.retries,
        )
        made.desk.breakers.listen = made.hub.breaker_heard

        def noticed(notice: Any) -> None:
            made.hub.noticed(notice)
            made._heard(notice)

        made.turns = Turns(noticed, limited=self.limits.on, patience=self.patience)
        made.shared = replace(
            made.shared,
            recorder=made.recorder,
            turns=made.turns,
            providers={name: each.config for name, each in self.providers.items()},
        )
        self.workers.append(made)
        return made

    async def close(self) -> None:
        for worker in self.workers:
            await worker.close()
        await self.store.close()


@contextlib.asynccontextmanager
async def opened(tmp_path: Path, *providers: Provider, **settings: Any) -> AsyncIterator[Place]:
    chain = make_chain(tmp_path, [HOST])
    async with contextlib.AsyncExitStack() as stack:
        named = {}
        for name, each in zip(("anthropic", "second", "third"), providers, strict=False):
            named[name] = await stack.enter_async_context(each)
        place = Place(tmp_path, named, **settings)
        place.chain = chain
        stack.push_async_callback(place.close)
        yield place


def rules(*failover: tuple[str | None, str | None], exhausted: Any = "unavailable") -> EgressRules:
    legs = tuple(Failover(provider=provider, model=model) for provider, model in failover)
    return replace(RULES, model=replace(RULES.model, failover=legs, exhausted=exhausted))


async def sandbox(worker: Worker, name: str, rules_: EgressRules = RULES) -> str:
    path = await worker.sandbox(name)
    state: SandboxState = worker.sandboxes[name]
    state.rules, state.run.rules = rules_, rules_.model
    return path


async def asked(path: str, **fields: Any) -> bytes:
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        writer.write(ask(**{"stream": True, **fields}))
        return await asyncio.wait_for(answer_of(reader), 60)
    finally:
        writer.close()


def told(worker: Worker, name: str, **labels: str) -> float | None:
    """What its operator reads."""
    return worker.meters.registry.get_sample_value(f"ringfence_{name}", labels)


def tries(worker: Worker, provider: str) -> list[float | None]:
    kinds = ("first", "repeated", "next")
    return [told(worker, "model_tries_total", provider=provider, kind=kind) for kind in kinds]


def events(worker: Worker, kind: type[Any]) -> list[Any]:
    return [each for each in worker.recorder.events if isinstance(each, kind)]


ERROR_FIRST = SSE + event("error", error={"type": "overloaded_error", "message": "x"})
REFUSED_ONCE = {
    "529": OVERLOADED % b"",
    "500": b"HTTP/1.1 500 X\r\ncontent-length: 2\r\n\r\n{}",
    "429": b"HTTP/1.1 429 X\r\ncontent-length: 2\r\nretry-after: 0.05\r\n\r\n{}",
    "dropped": DROP,
    "dropped after the head": SSE,
    "dropped before content": SSE + START + event("ping"),
    "error as first event": ERROR_FIRST + b"0\r\n\r\n",
    "error after the start": SSE + START + event("error", error={"type": "api_error"}),
    "a stream without an event": SSE + b"0\r\n\r\n",
    "garbage": b"HTTP/7 whatever\r\n\r\n",
}


@pytest.mark.parametrize("kind", REFUSED_ONCE)
async def test_what_fails_before_anything_passed_is_sent_again(tmp_path: Path, kind: str) -> None:
    async with opened(tmp_path, Provider(REFUSED_ONCE[kind])) as place:
        worker = place.worker()
        got = await asked(await sandbox(worker, "a/0"))
        assert got.startswith(b"HTTP/1.1 200"), got[:80]
        assert got.count(b"message_start") == 2, "one event, with its name and its type"
        assert b"Hi." in got
        assert place.providers["anthropic"].asked == 2
        (retried,) = worker.recorder.of("model.retried")
        assert retried["same"] is True
        answered = worker.recorder.of("model.answered")
        assert [each["reason"] for each in answered] == [retried["reason"], ""]
        told = [each for each in worker.notices if isinstance(each, ModelCalled) and each.over]
        assert len(told) == 2


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (b"HTTP/1.1 400 X\r\ncontent-length: 2\r\n\r\n{}", b"400"),
        (b"HTTP/1.1 401 X\r\ncontent-length: 2\r\n\r\n{}", b"401"),
        (OVERLOADED % b"x-should-retry: false\r\n", b"529"),
    ],
)
async def test_what_another_try_does_not_mend_passes_at_once(
    tmp_path: Path, answer: bytes, status: bytes
) -> None:
    async with opened(tmp_path, Provider(answer)) as place:
        got = await asked(await sandbox(place.worker(), "a/0"))
        assert got.startswith(b"HTTP/1.1 " + status)
        assert place.providers["anthropic"].asked == 1


async def test_what_has_begun_is_never_sent_again(tmp_path: Path) -> None:
    """The torn answer looks torn: the client decides."""
    half = SSE + START + event("content_block_start", index=0, content_block={"type": "text"})
    async with opened(tmp_path, Provider(half)) as place:
        worker = place.worker()
        got = await asked(await sandbox(worker, "a/0"))
        assert b"content_block_start" in got
        assert not got.endswith(b"0\r\n\r\n")
        assert place.providers["anthropic"].asked == 1
        await until(lambda: not worker.desk._open and not worker.desk._tasks)
        states, _ = await place.store.breakers()
        (state,) = states.values()
        assert sum(state.failed) == 1, "and its breaker hears of it"


async def test_a_time_that_was_asked_for_is_kept(tmp_path: Path) -> None:
    async with opened(tmp_path, Provider(OVERLOADED % b"retry-after: 0.4\r\n")) as place:
        path, began = await sandbox(place.worker(), "a/0"), time.monotonic()
        assert b" 200 " in await asked(path)
        assert 0.4 <= time.monotonic() - began < 5


async def test_everything_down_is_unavailable_in_its_time(tmp_path: Path) -> None:
    patience = Patience(base=0.01, longest=0.1, total=0.6)
    dead = Provider(otherwise=OVERLOADED % b"")
    async with opened(tmp_path, dead, patience=patience) as place:
        worker = place.worker()
        path, began = await sandbox(worker, "a/0"), time.monotonic()
        got = await asked(path)
        assert got.startswith(b"HTTP/1.1 503")
        assert b"x-ringfence-reason: model-unavailable" in got
        assert b"x-should-retry: false" in got
        assert time.monotonic() - began < 5
        # its breaker opened after five, and nobody asked any more
        assert dead.asked == 5
        (opened_,) = events(worker, BreakerChanged)
        name = "session/model/anthropic/claude-sonnet-5"
        assert (opened_.breaker, opened_.state) == (name, "open"), "of this session alone"
        assert tries(worker, "anthropic") == [1, 4, None]
        # the next is told at once what the first found out: it waits, and asks nobody
        assert (await asked(path)).startswith(b"HTTP/1.1 503")
        assert dead.asked == 5


async def test_a_breaker_is_shared_and_closes_again(tmp_path: Path) -> None:
    """Two sessions' failures keep the other worker's requests; what was held goes when it is well
    again.
    """
    dead = Provider(*[OVERLOADED % b""] * 3)
    quick = {"open_seconds": 0.5, "wins": 1, "failures": 2}
    patience = Patience(base=0.01, longest=0.1, total=20.0)
    async with opened(tmp_path, dead, breakers=quick, patience=patience) as place:
        first, second = place.worker(), place.worker()
        paths = [
            await sandbox(first, "a/0"),
            await sandbox(first, "a/1"),
            await sandbox(second, "b/0"),
        ]
        asking = [asyncio.ensure_future(asked(paths[0]))]
        await until(lambda: len(events(first, BreakerChanged)) == 1)
        asking.append(asyncio.ensure_future(asked(paths[1])))
        await until(lambda: any(_of_all(each) for each in events(first, BreakerChanged)))
        assert b" 200 " in await asked(paths[2])
        assert all(b" 200 " in each for each in await asyncio.gather(*asking))
        changes = (*events(first, BreakerChanged), *events(second, BreakerChanged))
        states = [each.state for each in changes if _of_all(each)]
        assert sorted(states) == ["closed", "half-open", "open"]
        names = {"kind": "model", "provider": "anthropic"}
        for state in ("closed", "half-open", "open"):
            counts = [
                told(each, "breaker_changes_total", **names, state=state)
                for each in (first, second)
            ]
            assert sum(one or 0 for one in counts) == 1, state
        assert told(first, "breaker_changes_total", **names, state="open") == 1
        # who heard last that it closed says so; each hears of it when it asks
        assert (
            min(told(each, "breakers_open", provider="anthropic") for each in (first, second)) == 0
        )
        assert b" 200 " in await asked(paths[0])
        assert b" 200 " in await asked(paths[1])
        for each in (first, second):
            assert told(each, "breakers_open", provider="anthropic") == 0


def _of_all(changed: BreakerChanged) -> bool:
    return not changed.breaker.startswith("session/")


async def test_one_session_opens_nothing_for_another(tmp_path: Path) -> None:
    """Whatever it makes fail, and however often; its own way is shut."""
    dead = Provider(otherwise=OVERLOADED % b"")
    patience = Patience(base=0.001, longest=0.002, total=0.3)
    breakers = {"open_seconds": 0.01, "longest_seconds": 0.02}
    async with opened(tmp_path, dead, patience=patience, breakers=breakers) as place:
        worker = place.worker()
        path, other = await sandbox(worker, "a/0"), await sandbox(worker, "a/1")
        for _ in range(6):
            assert b"model-unavailable" in await asked(path)
        assert dead.asked > 12
        assert not any(_of_all(each) for each in events(worker, BreakerChanged))
        dead.otherwise = GOOD
        assert b" 200 " in await asked(other)


async def test_what_an_agent_asks_wrongly_says_nothing_of_the_provider(tmp_path: Path) -> None:
    """An answer that began says that it is well; a refusal would hide what fails for others."""
    wrong = Provider(*[b"HTTP/1.1 400 X\r\ncontent-length: 2\r\n\r\n{}"] * 5)
    async with opened(tmp_path, wrong) as place:
        worker = place.worker()
        path = await sandbox(worker, "a/0")
        for _ in range(5):
            assert b" 400 " in await asked(path)
        await until(lambda: not worker.desk._open and not worker.desk._tasks)
        assert (await place.store.breakers())[0] == {}
        assert b" 200 " in await asked(path)
        await until(lambda: not worker.desk._open and not worker.desk._tasks)
        (state,) = (await place.store.breakers())[0].values()
        assert sum(state.fine) == 1


async def test_repeated_requests_end_with_their_budget(tmp_path: Path) -> None:
    dead = Provider(otherwise=OVERLOADED % b"")
    never = {"failures": 1000}
    few = RetrySettings(reserve=3, reserve_seconds=3600)
    patience = Patience(base=0.01, longest=0.02, total=1.0)
    async with opened(tmp_path, dead, breakers=never, retries=few, patience=patience) as place:
        workers = [place.worker(), place.worker()]
        paths = [await sandbox(each, f"a/{n}") for n, each in enumerate(workers)]
        got = await asyncio.gather(*(asked(path) for path in paths * 4))
        assert all(b"model-unavailable" in each for each in got)
        assert dead.asked == 8 + 3


async def test_a_session_moves_and_stays(tmp_path: Path) -> None:
    """The record says so, and what answered is what is metered."""
    down, up = Provider(otherwise=OVERLOADED % b""), Provider()
    async with opened(tmp_path, down, up) as place:
        worker = place.worker()
        path = await sandbox(worker, "a/0", rules(("second", None)))
        assert b" 200 " in await asked(path)
        assert (down.asked, up.asked) == (3, 1)
        down.otherwise = GOOD
        assert b" 200 " in await asked(path)
        assert (down.asked, up.asked) == (3, 2)
        (moved,) = events(worker, ModelMoved)
        assert (moved.provider, moved.to_provider, moved.reason) == (
            "anthropic",
            "second",
            "failed",
        )
        requested = [each["provider"] for each in worker.recorder.of("model.requested")]
        assert requested == ["anthropic"] * 3 + ["second"] * 2
        # another session has no reason to be elsewhere
        assert b" 200 " in await asked(await sandbox(worker, "a/1", rules(("second", None))))
        assert down.asked == 4
        assert tries(worker, "anthropic") == [2, 2, None]
        assert tries(worker, "second") == [1, None, 1]
        assert told(worker, "model_moves_total", reason="failed") == 1
        assert told(worker, "model_moves_total", reason="returned") == 0


async def test_a_session_returns_when_the_first_has_been_well_for_a_while(tmp_path: Path) -> None:
    down, up = Provider(*[OVERLOADED % b""] * 3), Provider()
    async with opened(tmp_path, down, up, breakers={"stay_seconds": 0.4}) as place:
        worker = place.worker()
        path = await sandbox(worker, "a/0", rules(("second", None)))
        for _ in range(2):
            assert b" 200 " in await asked(path)
        assert (down.asked, up.asked) == (3, 2)
        await asyncio.sleep(0.5)
        assert b" 200 " in await asked(path)
        assert (down.asked, up.asked) == (4, 2)
        assert [each.reason for each in events(worker, ModelMoved)] == ["failed", "returned"]


async def test_another_model_is_asked_in_its_own_words(tmp_path: Path) -> None:
    down, up = (
        Provider(otherwise=OVERLOADED % b""),
        Provider(otherwise=message(model="claude-haiku-4-5")),
    )
    conversation = [
        {"role": "user", "content": "hi"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "c2ln"},
                {"type": "text", "text": "yes?"},
            ],
        },
        {"role": "user", "content": "go on"},
    ]
    thinking = {"type": "enabled", "budget_tokens": 900}
    async with opened(tmp_path, down, up) as place:
        worker = place.worker()
        path = await sandbox(worker, "a/0", rules(("second", "claude-haiku-4-5")))
        got = await asked(path, messages=conversation, thinking=thinking, stream=False)
        assert b" 200 " in got
        (sent,) = up.bodies
        assert sent["model"] == "claude-haiku-4-5"
        assert "thinking" not in json.dumps(sent)
        assert down.bodies[0]["thinking"] == thinking, "the first was asked as it stood"
        used = worker.recorder.of("model.answered")[-1]
        assert used["cost_usd"] == pytest.approx((5 * 1 + 7 * 5) / 1e6), "at haiku's price"


async def test_when_nothing_answers_the_run_is_put_off(tmp_path: Path) -> None:
    down = Provider(otherwise=OVERLOADED % b"")
    patience = Patience(base=0.01, longest=0.02, total=0.2)
    async with opened(tmp_path, down, patience=patience) as place:
        worker = place.worker()
        path = await sandbox(worker, "a/0", rules(exhausted="queue"))
        got = await asked(path)
        assert got.startswith(b"HTTP/1.1 403")
        assert b"model-put-off" in got
        (told,) = [each for each in worker.notices if isinstance(each, PutOff)]
        assert told.sandbox_id == "a/0"
        assert told.seconds >= 1


async def test_a_full_lane_goes_to_the_next_provider(tmp_path: Path) -> None:
    """And with none behind it the request waits, as before."""
    limits = {"rates": {"all": {"requests": 1, "window_seconds": 600}}, "hold_seconds": 0.2}
    first, second = Provider(), Provider()
    async with opened(
        tmp_path, first, second, limits=limits, breakers={"move_seconds": 0}
    ) as place:
        worker = place.worker()
        path = await sandbox(worker, "a/0", rules(("second", None)))
        for _ in range(2):
            assert b" 200 " in await asked(path)
        assert (first.asked, second.asked) == (1, 1)
        assert [each.reason for each in events(worker, ModelMoved)] == ["limit"]
        alone = await sandbox(worker, "a/1")
        assert b"model-put-off" in await asked(alone)


async def test_a_limit_that_is_met_takes_part_in_backoff_budget_and_failover(
    tmp_path: Path,
) -> None:
    """A provider that names no time to wait is not asked without end, and the record says so."""
    limits = {"rates": {"all": {"requests": 10_000, "window_seconds": 60}}, "hold_seconds": 20}
    refused = b"HTTP/1.1 429 X\r\ncontent-length: 2\r\nretry-after: 0\r\n\r\n{}"
    first, second = Provider(otherwise=refused), Provider()
    async with opened(tmp_path, first, second, limits=limits) as place:
        worker = place.worker()
        assert b" 200 " in await asked(await sandbox(worker, "a/0", rules(("second", None))))
        assert (first.asked, second.asked) == (3, 1)
        assert [each["same"] for each in worker.recorder.of("model.retried")] == [True, True, False]


async def test_a_limit_that_is_met_with_no_budget_left_ends_in_the_queue(tmp_path: Path) -> None:
    """Whatever the policy does when a provider fails: this one is well."""
    limits = {"rates": {"all": {"requests": 10_000, "window_seconds": 60}}, "hold_seconds": 20}
    refused = b"HTTP/1.1 429 X\r\ncontent-length: 2\r\nretry-after: 0\r\n\r\n{}"
    first, none = Provider(otherwise=refused), RetrySettings(reserve=0, share=0)
    patience = Patience(base=0.01, longest=0.02, total=0.5)
    async with opened(tmp_path, first, limits=limits, retries=none, patience=patience) as place:
        worker = place.worker()
        assert b"model-put-off" in await asked(await sandbox(worker, "a/0"))
        assert first.asked == 1


@pytest.mark.parametrize("listed", [(), (("second", None),)], ids=["alone", "an open second"])
async def test_a_second_provider_that_is_shut_makes_nothing_worse(
    tmp_path: Path, listed: tuple[tuple[str, None], ...]
) -> None:
    first, second = Provider(*[OVERLOADED % b""] * 3), Provider()
    patience = Patience(base=0.01, longest=0.3, total=3.0)
    async with opened(
        tmp_path, first, second, patience=patience, breakers={"failures": 8}
    ) as place:
        worker = place.worker()
        for number in range(12):
            await worker.desk.breakers.note("model/second/claude-sonnet-5", f"x{number}", ok=False)
        assert b" 200 " in await asked(await sandbox(worker, "a/0", rules(*listed)))
        assert (first.asked, second.asked) == (4, 0)


async def test_a_client_that_leaves_between_two_tries_ends_them(tmp_path: Path) -> None:
    down = Provider(otherwise=OVERLOADED % b"retry-after: 30\r\n")
    async with opened(tmp_path, down, patience=Patience(total=100.0)) as place:
        worker = place.worker()
        path = await sandbox(worker, "a/0")
        _, writer = await asyncio.open_unix_connection(path)
        writer.write(ask(stream=True))
        await until(lambda: bool(worker.recorder.of("model.retried")))
        writer.close()
        await until(lambda: not worker.sandboxes["a/0"].connections)
        assert down.asked == 1
        assert worker.desk._open == {}
        assert worker.sandboxes["a/0"].run._reserved == {}


async def fetched(path: str, ca: Path, target: bytes = b"/mcp") -> bytes:
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        writer.write(b"CONNECT %b:443 HTTP/1.1\r\nhost: %b:443\r\n\r\n" % ((HOST.encode(),) * 2))
        assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
        await writer.start_tls(ssl.create_default_context(cafile=str(ca)), server_hostname=HOST)
        head = b"GET %b HTTP/1.1\r\nhost: %b\r\nconnection: close\r\n\r\n"
        writer.write(head % (target, HOST.encode()))
        return await asyncio.wait_for(reader.read(), 20)
    finally:
        writer.close()


@pytest.mark.parametrize(
    ("served", "status", "tenant", "shut"),
    [
        (True, b"503", "a", True),
        (True, b"500", "a", False),
        (True, b"503", "b", False),
        (False, b"503", "a", False),
    ],
    ids=["a server of the policy", "by what it was asked", "another tenant", "another host"],
)
async def test_an_mcp_server_that_fails_is_left_alone(
    tmp_path: Path, served: bool, status: bytes, tenant: str, shut: bool
) -> None:
    """By its breaker, for all workers of a tenant, where it does not answer: an error of its own
    may be what the agent asked for. A host that is none is asked as often as anybody wants.
    """
    answer, count = b"HTTP/1.1 %b X\r\ncontent-length: 0\r\n\r\n" % status, 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            count += 1
            writer.write(answer)
            await writer.drain()
        writer.close()

    quick = {"failures": 2, "open_seconds": 0.5, "wins": 1}
    async with opened(tmp_path, Provider(), breakers=quick) as place:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(place.chain)
        server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
        port = server.sockets[0].getsockname()[1]
        workers, paths = [place.worker(), place.worker()], []
        granted = replace(
            RULES,
            hosts=(HostRule(host=HOST),),
            mcp_servers=(f"{HOST}:443/mcp", f"{HOST}:443/two")
            if served
            else (f"other.{HOST}:443/mcp",),
        )
        for number, worker in enumerate(workers):
            worker.shared = replace(
                worker.shared,
                authority=Authority.load(tmp_path / "ca"),
                resolver=Resolver({}, {f"{HOST}:443": f"127.0.0.1:{port}"}),
            )
            paths.append(await sandbox(worker, f"a/{number}", granted))
            worker.sandboxes[f"a/{number}"].tenant = tenant if number else "a"
        ca = tmp_path / "ca" / "ca.pem"
        for _ in range(2):
            assert b" %b " % status in await fetched(paths[0], ca)
        await until(lambda: not workers[0].desk._tasks)
        got = await fetched(paths[1], ca)
        assert (b"mcp-server-shut" in got) is shut
        assert count == (2 if shut else 3)
        # another server of that host is another server
        assert b"mcp-server-shut" not in await fetched(paths[1], ca, b"/two")
        answer = b"HTTP/1.1 200 X\r\ncontent-length: 0\r\n\r\n"
        await asyncio.sleep(0.6)
        for _ in range(2):
            assert b" 200 " in await fetched(paths[1], ca)
        changed = [each.state for worker in workers for each in events(worker, BreakerChanged)]
        if shut or not served:
            assert changed == (["open", "half-open", "closed"] if shut else [])
        server.close()


@pytest.mark.parametrize("word", ["none", "late"])
async def test_a_worker_that_says_nothing_of_an_mcp_server_lets_nothing_to_it(word: str) -> None:
    """Refused after a while, and what the worker may have given is given back."""
    said = list[Any]()
    turns = Turns(said.append, guard_seconds=0.05)
    ids = {"sandbox_id": "s", "run_id": "r", "session_id": "", "tenant": "a", "server": "x:443"}
    assert await turns.guard(**ids) == "breakers-unanswered"
    wanted, used = said
    assert (used.ticket, used.ok) == (wanted.ticket, None)
    if word == "late":
        turns.told(ModelTurn(sandbox_id="s", ticket=wanted.ticket, go=True))
    # one that is answered in its time goes, or is told that the server is shut
    for go, kept in ((True, 2), (False, "mcp-server-shut")):
        asking = asyncio.ensure_future(turns.guard(**ids))
        await until(lambda: not isinstance(said[-1], GuardUsed))
        turns.told(ModelTurn(sandbox_id="s", ticket=said[-1].ticket, go=go))
        assert await asking == kept
        said.append(used)


async def test_a_tool_that_keeps_failing_is_told_of() -> None:
    """Once, for its agent's version; what the policy denied says nothing of it."""
    store, told = MemoryLimits(), Told()
    settings = BreakerSettings(failures=3)
    breakers = Breakers(store, told, settings, RetrySettings())  # type: ignore[arg-type]
    grants = ToolGrants(offered=("Denied", "Fine", "mcp__crm__find"))
    watch = ToolWatch(breakers, {"id": "agent_1", "version": 2}, grants, run_id="r")

    def call(number: int, name: str, *, allowed: bool = True, error: bool = True) -> None:
        begun = ToolStarted(
            tool_use_id=str(number), name=name, input={}, allowed=allowed, reason=""
        )
        watch.heard(begun)
        watch.heard(ToolResult(tool_use_id=str(number), content=(), is_error=error))

    for number in range(9):
        call(number, "Denied", allowed=False)
        call(100 + number, "Fine", error=False)
        call(200 + number, "mcp__crm__find")
    await until(lambda: not watch._tasks)
    (changed,) = [each for each in told.events if isinstance(each, BreakerChanged)]
    assert (changed.breaker, changed.state) == ("tool/agent_1/2/mcp__crm__find", "open")
    assert changed.run_id == "r"
    assert set((await store.breakers())[0]) == {
        "default/tool/agent_1/2/Fine",
        "default/tool/agent_1/2/mcp__crm__find",
    }


class Tools:
    """Attempts of one agent's version, each at a worker of its own, that share a store."""

    FIND = "mcp__crm__find"

    def __init__(self, *sessions: str, **settings: Any) -> None:
        store, self.told, self.number = MemoryLimits(), Told(), 0
        quick = {"failures": 3, "open_seconds": 0.3, "wins": 1, "tools": ("mcp__crm",), **settings}
        for session in sessions:
            breakers = Breakers(
                store,
                self.told,  # type: ignore[arg-type]
                BreakerSettings(**quick),
                RetrySettings(),
            )
            ids = {"run_id": f"r-{session}", "session_id": session}
            grants = ToolGrants(offered=(self.FIND, "mcp__crm__add", "mcp__crmx__find"))
            watch = ToolWatch(breakers, {"id": "agent_1", "version": 2}, grants, **ids)
            setattr(self, session, watch)

    async def call(
        self, watch: ToolWatch, *, error: bool | None, name: str = FIND
    ) -> tuple[str | None, str]:
        """Why not, and its id; `error` None leaves it without a result."""
        self.number += 1
        identity = f"toolu_{self.number}"
        why = await watch.enter(identity, name)
        allowed = why is None
        watch.heard(
            ToolStarted(tool_use_id=identity, name=name, input={}, allowed=allowed, reason="")
        )
        if not allowed:
            await watch.left(identity)
        if error is not None:
            watch.heard(ToolResult(tool_use_id=identity, content=(), is_error=error))
            await until(lambda: not watch._tasks)
        return why, identity

    @property
    def changed(self) -> list[tuple[str, str]]:
        found = [each for each in self.told.events if isinstance(each, BreakerChanged)]
        return [(each.breaker, each.state) for each in found]


async def test_a_tool_that_fails_for_several_is_kept_from_all_and_tried_by_one() -> None:
    """Over workers; another tool, and one that the operator has not named, stay as they were."""
    tools = Tools("a", "b", "c")
    a, b, c = tools.a, tools.b, tools.c  # type: ignore[attr-defined]
    for watch in (a, b, a, b, c):
        assert (await tools.call(watch, error=True))[0] is None
    assert tools.changed == [(f"tool/agent_1/2/{Tools.FIND}", "open")]
    why, _ = await tools.call(c, error=True)
    assert why is not None
    assert "mcp__crm__find keeps failing: calls of it are held back for 1 s more" in why
    assert (await tools.call(c, error=False, name="mcp__crm__add"))[0] is None
    assert (await tools.call(c, error=False, name="mcp__crmx__find"))[0] is None
    await asyncio.sleep(0.35)
    first, _ = await tools.call(a, error=None)
    second, _ = await tools.call(b, error=None)
    assert first is None
    assert second is not None
    assert "another call tries it just now" in second
    a.heard(ToolResult(tool_use_id=f"toolu_{tools.number - 1}", content=(), is_error=False))
    await until(lambda: not a._tasks)
    assert [state for _, state in tools.changed] == ["open", "half-open", "closed"]
    for watch in (a, b, c):
        assert (await tools.call(watch, error=False))[0] is None


async def test_a_tool_that_fails_for_one_session_is_kept_from_that_one() -> None:
    """What a call came to is said from inside: nobody takes a tool from the others."""
    tools = Tools("a", "b")
    a, b = tools.a, tools.b  # type: ignore[attr-defined]
    for _ in range(12):
        await tools.call(a, error=True)
    assert (await tools.call(a, error=True))[0] is not None
    assert (await tools.call(b, error=False))[0] is None
    assert {name for name, _ in tools.changed} == {f"session/tool/agent_1/2/{Tools.FIND}"}


async def test_an_attempt_that_ends_gives_its_try_of_a_tool_back() -> None:
    tools = Tools("a", "b", "c", open_seconds=0.1)
    a, b, c = tools.a, tools.b, tools.c  # type: ignore[attr-defined]
    for watch in (a, b, a, b, c):
        await tools.call(watch, error=True)
    await asyncio.sleep(0.15)
    assert (await tools.call(a, error=None))[0] is None
    assert (await tools.call(b, error=None))[0] is not None
    await a.close()
    assert (await tools.call(b, error=False))[0] is None
    assert tools.changed[-1][1] == "closed"


async def test_a_call_whose_time_was_up_is_a_failure_of_its_tool() -> None:
    tools = Tools("a", failures=2)
    a = tools.a  # type: ignore[attr-defined]
    for _ in range(2):
        _, identity = await tools.call(a, error=None)
        ended = ToolEnded(tool_use_id=identity, name=Tools.FIND, outcome="timeout", duration_ms=1.0)
        a.heard(ended)
        await until(lambda: not a._tasks)
    assert (await tools.call(a, error=True))[0] is not None


def test_only_tools_of_mcp_servers_are_kept_back() -> None:
    assert BreakerSettings(tools=("mcp__crm", "mcp__crm__find")).tools
    for wrong in ("Bash", "mcp__*", "mcp__"):
        with pytest.raises(ValueError, match="pattern"):
            BreakerSettings(tools=(wrong,))


class Sealed(Credentials):
    """Of a source that does not answer the first time."""

    def __init__(self) -> None:
        super().__init__({})
        self.asked = 0

    async def for_model(self, *_: Any) -> Any:
        self.asked += 1
        if self.asked == 1:
            raise CredentialError("credential-unavailable", 503)


async def test_a_credential_whose_source_is_away_is_asked_for_again(tmp_path: Path) -> None:
    async with opened(tmp_path, Provider()) as place:
        place.providers["anthropic"].config = place.providers["anthropic"].config.model_copy(
            update={"credential": "x"}
        )
        worker = place.worker()
        path = await sandbox(worker, "a/0")
        worker.sandboxes["a/0"].credentials = Sealed()
        assert b" 200 " in await asked(path)
        assert place.providers["anthropic"].asked == 1
        (retried,) = worker.recorder.of("model.retried")
        assert retried["reason"] == "credential-unavailable"
        await until(lambda: not worker.desk._open and not worker.desk._tasks)
        (state,) = (await place.store.breakers())[0].values()
        assert sum(state.failed) == 0, "the provider has nothing to do with it"


class Away(MemoryLimits):
    """Knows no breaker and no budget of repeated requests."""

    async def admit(self, *_: Any, **__: Any) -> Any:
        raise UnavailableError("store-unavailable", "away")

    note = spend = admit


async def test_without_a_store_requests_pass_and_none_is_repeated(tmp_path: Path) -> None:
    """A breaker guards nothing; what is repeated is load."""
    patience = Patience(base=0.01, longest=0.02, total=0.1)
    flaky = Provider(GOOD, OVERLOADED % b"")
    async with opened(tmp_path, flaky, patience=patience) as place:
        worker = place.worker()
        worker.desk = Desk(
            place.limits,
            Away(),
            worker.recorder,
            reply=worker._reply,
            post=worker.notices.append,
            name="away",
        )
        path = await sandbox(worker, "a/0")
        assert b" 200 " in await asked(path)
        assert b"model-unavailable" in await asked(path)
        assert flaky.asked == 2


class Weather(Provider):
    """Fails by chance, and wholly while `down`."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._chance, self.down = random.Random(seed), False

    def next(self) -> bytes:
        roll = self._chance.random()
        if self.down or roll < 0.02:
            return OVERLOADED % b""
        return (SSE + START) if roll < 0.03 else GOOD


@pytest.mark.storm
async def test_a_fleet_in_bad_weather_completes_every_run(tmp_path: Path) -> None:
    """2 % 529, 1 % dropped streams, and an outage of the first provider: nothing of it is seen, and
    no more than a tenth is asked beside what was asked for.
    """
    first, second, runs, each = Weather(1), Weather(2), 40, 50
    settings_ = {"open_seconds": 0.5, "stay_seconds": 1.0}
    patience = Patience(base=0.05, longest=1.0, total=30.0)
    retries = RetrySettings(reserve=10)
    async with opened(
        tmp_path, first, second, breakers=settings_, patience=patience, retries=retries
    ) as place:
        workers = [place.worker() for _ in range(4)]
        way = rules(("second", None))
        paths = [await sandbox(workers[n % 4], f"t/{n}", way) for n in range(runs)]
        statuses: list[bytes] = []

        async def run(path: str) -> None:
            for _ in range(each):
                got = await asked(path)
                statuses.append(got.split(b" ")[1] if b"message_stop" in got else got)
                await asyncio.sleep(0.02)

        async def outage() -> None:
            await until(lambda: len(statuses) > runs * each * 0.3, 120)
            first.down = True
            await until(lambda: len(statuses) > runs * each * 0.6, 120)
            first.down = False

        await asyncio.gather(outage(), *(run(path) for path in paths))
        assert set(statuses) == {b"200"}
        asked_for, sent = runs * each, first.asked + second.asked
        print("extra", sent - asked_for, "of", asked_for, "by provider", first.asked, second.asked)
        assert sent <= asked_for * 1.1
        # an outage is found out once, not by each run and worker
        states = [e.state for worker in workers for e in events(worker, BreakerChanged)]
        assert "open" in states
        assert states.count("closed") >= 1
