"""What is given up on the model route, what it costs, and what a breaker hears of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from egress_rig import RULES, ask, event, message, until
from test_egress_aside import aside
from test_limits_route import Worker
from test_resilience_route import (
    BURST,
    GOOD,
    OVERLOADED,
    REST,
    SSE,
    START,
    Place,
    Provider,
    asked,
    opened,
    rules,
    sandbox,
)

from ringfence.channel.messages import ModelHeard, ProviderConfig
from ringfence.egress import trying
from ringfence.egress.aside import Aside, heavy
from ringfence.egress.model import Judged, judge
from ringfence.egress.model.pricing import price
from ringfence.policy.compiled import ModelRules

MODEL_ID = "anthropic.claude-sonnet-5-20260101-v1:0"


class Slowly(Provider):
    """Writes `pieces` with a pause before each, and then waits."""

    def __init__(self, *pieces: bytes, pause: float = 0.0, rest: float = 20.0) -> None:
        super().__init__()
        self.pieces, self.pause, self.rest, self.written = pieces, pause, rest, 0
        self._serving = set[asyncio.Task[None] | None]()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._serving.add(serving := asyncio.current_task())
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, TimeoutError):
                await self._write(reader, writer)
        finally:
            self._serving.discard(serving)
            writer.transport.abort()

    async def _write(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        self.bodies.append({})
        for piece in self.pieces:
            await asyncio.sleep(self.pause)
            writer.write(piece)
            await asyncio.wait_for(writer.drain(), 0.5)
            self.written += len(piece)
        # until it is hung up on
        await asyncio.wait_for(reader.read(), self.rest)

    async def __aexit__(self, *_: object) -> None:
        await super().__aexit__()
        await until(lambda: not self._serving)
        await asyncio.sleep(0)


async def counted(place: Place, worker: Worker) -> dict[str, tuple[int, int]]:
    """(fine, failed) of each provider's breaker, when all has been said."""
    await until(lambda: not worker.desk._open and not worker.desk._tasks)
    states, _ = await place.store.breakers()
    return {name.split("/")[2]: (sum(each.fine), sum(each.failed)) for name, each in states.items()}


def reasons(worker: Worker) -> list[str]:
    return [each["reason"] for each in worker.recorder.of("model.answered")]


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trying, "SILENT_SECONDS", 0.4)
    monkeypatch.setattr(trying, "BEGIN_SECONDS", 1.2)


PING = event("ping")
COMMENT = b": " + b"x" * 65_000 + b"\n\n"
COMMENT = b"%x\r\n%b\r\n" % (len(COMMENT), COMMENT)


async def test_what_never_says_anything_is_not_kept(tmp_path: Path) -> None:
    """Comments without end: given up after a quarter of a megabyte, and the next is asked."""
    endless, second = Slowly(SSE + START, *[COMMENT] * 200), Provider()
    async with opened(tmp_path, endless, second) as place:
        worker = place.worker()
        got = await asyncio.wait_for(
            asked(await sandbox(worker, "a/0", rules(("second", None)))), 9
        )
        assert b"Hi." in got
        assert set(reasons(worker)[:-1]) == {"upstream-empty"}
        kept = [each for each in worker.recorder.of("model.answered") if each["reason"]]
        assert kept[0]["input_tokens"] == 5, "what was given up is paid"
        # socket buffers of both ends come on top
        assert endless.written < 6 << 20
        assert (await counted(place, worker))["anthropic"][0] == 0


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize(
    "pieces",
    [(SSE,), (SSE + START,), (SSE + START, *[PING] * 60), (b"HTTP/1.1 200 OK\r\n",), ()],
    ids=["head", "start", "pings", "half a head", "nothing"],
)
async def test_a_stream_that_does_not_begin_is_given_up(
    tmp_path: Path, pieces: tuple[bytes, ...]
) -> None:
    """Wherever it stops, and however it goes on saying nothing; the next provider is asked."""
    mute = Slowly(*pieces, pause=0.1)
    async with opened(tmp_path, mute, Provider()) as place:
        worker, began = place.worker(), time.monotonic()
        got = await asyncio.wait_for(
            asked(await sandbox(worker, "a/0", rules(("second", None)))), 9
        )
        assert b"Hi." in got
        assert time.monotonic() - began < 6
        assert reasons(worker) == ["upstream-silent", ""]
        assert mute.asked == 1
        given_up = worker.recorder.of("model.answered")[0]
        assert given_up["output_tokens"] > 0, "it may have worked all the time"
        assert await counted(place, worker) == {"anthropic": (0, 1), "second": (1, 0)}


@pytest.mark.usefixtures("hasty")
async def test_a_stream_that_is_slow_to_begin_is_waited_for(tmp_path: Path) -> None:
    """The twin: longer than a silence, with pings in it; and content may pause as it likes."""
    content = event("content_block_start", index=0, content_block={"type": "text", "text": ""})
    slow = Slowly(SSE + START, PING, PING, content, pause=0.25, rest=0.0)
    slow.pieces = (*slow.pieces, *[PING] * 4, REST)
    async with opened(tmp_path, slow, Provider()) as place:
        worker = place.worker()
        got = await asked(await sandbox(worker, "a/0", rules(("second", None))))
        assert got.endswith(b"0\r\n\r\n")
        assert reasons(worker) == [""]
        assert (await counted(place, worker))["anthropic"] == (1, 0)


@pytest.mark.usefixtures("hasty")
async def test_silence_is_paid_for_and_repeated_once(tmp_path: Path) -> None:
    async with opened(tmp_path, Slowly(), patience=replace(BURST, total=20.0)) as place:
        worker = place.worker()
        path = await sandbox(worker, "a/0")
        assert (await asked(path)).startswith(b"HTTP/1.1 503")
        assert place.providers["anthropic"].asked == 2
        spent = worker.sandboxes["a/0"].run.spent
        assert spent.requests == 2
        assert spent.output_tokens > 0
        # so that a limit of requests holds for what is repeated, too
        one = replace(RULES, model=replace(RULES.model, max_requests=1))
        got = await asked(await sandbox(worker, "a/1", one))
        assert b"budget-exhausted-max-requests" in got
        assert place.providers["anthropic"].asked == 3


@pytest.mark.usefixtures("hasty")
async def test_a_silent_leg_is_had_again_where_breakers_shut_the_others(tmp_path: Path) -> None:
    """A list makes nothing worse: alone it would have had its one more try, too."""
    mute, patience = Slowly(), replace(BURST, total=20.0)
    async with opened(tmp_path, mute, Provider(), patience=patience) as place:
        worker = place.worker()
        for number in range(12):
            second = "model/second/claude-sonnet-5"
            await worker.desk.breakers.note(second, f"x{number}", ok=False)
        got = await asked(await sandbox(worker, "a/0", rules(("second", None))))
        assert got.startswith(b"HTTP/1.1 503")
        assert (mute.asked, place.providers["second"].asked) == (2, 0)


@pytest.mark.parametrize("pieces", [(), (SSE + START,)], ids=["before the head", "after it"])
async def test_who_leaves_before_anything_began_says_nothing_of_the_provider(
    tmp_path: Path, pieces: tuple[bytes, ...]
) -> None:
    async with opened(tmp_path, Slowly(*pieces)) as place:
        worker = place.worker()
        path = await sandbox(worker, "a/0")
        _, writer = await asyncio.open_unix_connection(path)
        writer.write(ask(stream=True))
        await until(lambda: place.providers["anthropic"].asked == 1)
        await asyncio.sleep(0.1)
        writer.close()
        await until(lambda: not worker.sandboxes["a/0"].connections)
        counts = await counted(place, worker)
        assert counts.get("anthropic", (0, 0)) == (0, 0)
        assert reasons(worker) == ["client-closed"]


@pytest.mark.parametrize("reads", [True, False])
async def test_what_tears_while_its_client_does_not_read_is_no_failure(
    tmp_path: Path, reads: bool
) -> None:
    """A provider gives up on a reader that is slow, and any agent can be one."""
    begun = event("content_block_start", index=0, content_block={"type": "text", "text": ""})
    text = {"type": "text_delta", "text": "x" * 60_000}
    more = event("content_block_delta", index=0, delta=text) * 20
    torn = Slowly(SSE + START + begun, *[more] * (1 if reads else 40), rest=0.0)
    async with opened(tmp_path, torn) as place:
        worker = place.worker()
        reader, writer = await asyncio.open_unix_connection(await sandbox(worker, "a/0"))
        writer.write(ask(stream=True))
        if not reads:
            reader._transport.pause_reading()  # type: ignore[attr-defined]
            await asyncio.sleep(1.2)
            reader._transport.resume_reading()  # type: ignore[attr-defined]
        with contextlib.suppress(OSError):
            while await asyncio.wait_for(reader.read(1 << 20), 9):
                pass
        writer.close()
        counts = await counted(place, worker)
        assert reasons(worker) == ["upstream-closed"]
        assert counts["anthropic"][1] == (1 if reads else 0)


async def test_an_error_about_the_request_is_the_clients(tmp_path: Path) -> None:
    """Whatever an agent can bring about as often as it likes is neither repeated nor counted."""
    error = event("error", error={"type": "invalid_request_error", "message": "too long"})
    async with opened(tmp_path, Provider(otherwise=SSE + START + error + b"0\r\n\r\n")) as place:
        worker = place.worker()
        got = await asked(await sandbox(worker, "a/0"))
        assert got.startswith(b"HTTP/1.1 200")
        assert b"too long" in got
        assert place.providers["anthropic"].asked == 1
        assert (await counted(place, worker)).get("anthropic", (0, 0)) == (0, 0)


async def test_a_limit_that_is_told_in_the_stream_is_one(tmp_path: Path) -> None:
    """It shuts the lane, as a 429 does, and no breaker hears of it."""
    error = event("error", error={"type": "rate_limit_error", "message": "x"})
    async with opened(tmp_path, Provider(SSE + START + error + b"0\r\n\r\n")) as place:
        worker = place.worker()
        heard, told = list[ModelHeard](), worker.desk.heard

        def hear(notice: Any) -> None:
            heard.extend([notice] if isinstance(notice, ModelHeard) else [])
            told(notice)

        worker.desk.heard = hear  # type: ignore[method-assign]
        assert b"Hi." in await asked(await sandbox(worker, "a/0"))
        assert reasons(worker) == ["model-throttled", ""]
        assert [each.status for each in heard] == [429]
        assert await counted(place, worker) == {"anthropic": (1, 0)}


@pytest.mark.parametrize(
    ("answer", "failed"),
    [
        (OVERLOADED % b"x-should-retry: false\r\n", 1),
        (b"HTTP/1.1 200 X\r\ncontent-type: application/json\r\ncontent-length: 1\r\n\r\n[", 1),
        (b"HTTP/1.1 200 X\r\ncontent-encoding: br\r\ncontent-length: 1\r\n\r\n[", 1),
        (b"HTTP/1.1 400 X\r\ncontent-length: 2\r\n\r\n{}", 0),
        (b"HTTP/1.1 429 X\r\nx-should-retry: false\r\ncontent-length: 2\r\n\r\n{}", 0),
    ],
    ids=["529", "malformed", "encoded", "400", "429"],
)
async def test_a_breaker_is_told_what_came(tmp_path: Path, answer: bytes, failed: int) -> None:
    """And not whether it may be repeated, as those of a broken shape are: none is well."""
    async with opened(tmp_path, Provider(answer)) as place:
        worker = place.worker()
        path = await sandbox(worker, "a/0")
        again = b"Hi." in await asked(path)
        assert (await counted(place, worker)).get("anthropic", (0, 0)) == (int(again), failed)
        assert again == (b" 200 X" in answer)
        assert b"Hi." in await asked(path)
        assert (await counted(place, worker))["anthropic"] == (1 + again, failed)


async def test_a_login_that_ran_out_is_not_the_providers_fault(tmp_path: Path) -> None:
    """One more try with what was had anew; a second time it is as good as it will be."""
    old = (
        b"HTTP/1.1 403 X\r\nx-amzn-errortype: ExpiredTokenException\r\ncontent-length: 2\r\n\r\n{}"
    )
    async with opened(tmp_path, Provider(otherwise=old), Provider()) as place:
        first = place.providers["anthropic"]
        models = {"claude-sonnet-5": MODEL_ID}
        cloud = {"kind": "bedrock", "region": "eu-central-1", "models": models, "renews": True}
        first.config = first.config.model_copy(update=cloud)
        worker = place.worker()
        assert b"Hi." in await asked(await sandbox(worker, "a/0", rules(("second", None))))
        assert first.asked == 2
        assert reasons(worker) == ["provider-credential-expired"] * 2 + [""]
        assert (await counted(place, worker)).get("anthropic", (0, 0)) == (0, 0)


@pytest.mark.parametrize("elsewhere", [True, False])
async def test_a_leg_that_cannot_be_asked_leaves_it_to_another(
    tmp_path: Path, elsewhere: bool
) -> None:
    async with opened(tmp_path, Provider(), Provider()) as place:
        first = place.providers["anthropic"]
        models = {"claude-sonnet-5": "claude-sonnet-5"}
        first.config = ProviderConfig(
            base_url=first.config.base_url, credential=None, kind="vertex", models=models
        )
        worker = place.worker()
        path = await sandbox(worker, "a/0", rules(("second", None)) if elsewhere else RULES)
        got = await asked(path)
        assert (b"Hi." in got) is elsewhere
        assert (b"provider-project-missing" in got) is not elsewhere
        assert first.asked == 0
        assert (await counted(place, worker)).get("anthropic", (0, 0)) == (0, 0)


class Fitting(Aside):
    """Judges here: only what a leg's model takes is read there."""

    async def judge(self, body: bytes, rules: ModelRules) -> Judged:
        return judge(body, rules)


@contextlib.asynccontextmanager
async def fitting(*, alive: bool) -> AsyncIterator[Aside]:
    async with aside() as (made, process):
        if not alive:
            process.kill()
            process.wait()
        yield Fitting(made._zygote)


@pytest.mark.parametrize("alive", [True, False])
async def test_a_body_that_is_hard_to_read_is_fitted_aside(tmp_path: Path, alive: bool) -> None:
    """And when it cannot be, nothing stays reserved."""
    many = [{"role": "user", "content": "[,{" * 25_000}]
    assert heavy(json.dumps(many).encode())
    down, haiku = Provider(otherwise=OVERLOADED % b""), Provider(otherwise=GOOD)
    async with opened(tmp_path, down, haiku) as place, fitting(alive=alive) as made:
        worker = place.worker()
        worker.shared = replace(worker.shared, aside=made)
        path = await sandbox(worker, "a/0", rules(("second", "claude-haiku-4-5")))
        got = await asked(path, messages=many, temperature=1)
        assert (b"Hi." in got) is alive
        assert (b"body-too-complex" in got) is not alive
        sent = [{"model": each["model"], "t": "temperature" in each} for each in haiku.bodies]
        assert sent == ([{"model": "claude-haiku-4-5", "t": False}] if alive else [])
        await counted(place, worker)
        assert worker.sandboxes["a/0"].run._reserved == {}
        assert worker.turns._slots == {}


@pytest.mark.parametrize(
    ("named", "priced"),
    [
        ("claude-haiku-4-5", "claude-sonnet-5"),
        ("claude-sonnet-5", "claude-sonnet-5"),
        ("claude-opus-4-1", "claude-opus-4-1"),
    ],
)
async def test_an_answer_does_not_set_its_own_price(
    tmp_path: Path, named: str, priced: str
) -> None:
    """The dearer of what was asked and what answered; the record names both."""
    async with opened(tmp_path, Provider(message(model=named))) as place:
        worker = place.worker()
        assert b" 200 " in await asked(await sandbox(worker, "a/0"), stream=False)
        (answered,) = worker.recorder.of("model.answered")
        (requested,) = worker.recorder.of("model.requested")
        into, out = price(priced) or (0.0, 0.0)
        assert answered["cost_usd"] == pytest.approx((5 * into + 7 * out) / 1e6)
        assert (requested["model"], answered["model"]) == ("claude-sonnet-5", named)
