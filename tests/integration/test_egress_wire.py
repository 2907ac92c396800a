"""What clients and upstreams may do to one another through egress: hang up, stall, lie, hurry."""

from __future__ import annotations

import asyncio
import gc
import json
import sys
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from egress_rig import JSON, RULES, SSE, Rig, ask, event, message, until

from ringfence.config.secrets import CredentialSettings
from ringfence.egress.credentials import Credentials
from ringfence.egress.keeping import Given
from ringfence.egress.lifetime import Ages
from ringfence.egress.redact import Needles
from ringfence.egress.resolving import Resolving
from ringfence.egress.upstream import Pool, Upstream

Reader, Writer = asyncio.StreamReader, asyncio.StreamWriter


def budget(**limits: Any) -> Any:
    return replace(RULES, model=replace(RULES.model, **limits))


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    uvloop.run(test())


def answering(*answers: bytes) -> Callable[..., Any]:
    """Each request on each connection gets the next answer; the last one stands."""
    left = list(answers)

    async def script(_: int, reader: Reader, writer: Writer) -> None:
        while True:
            await rig_of[script].request(reader)
            writer.write(left.pop(0) if len(left) > 1 else left[0])
            await writer.drain()

    return script


rig_of: dict[Any, Rig] = {}


def rig(script: Any, rules: Any = RULES) -> Rig:
    rig_of[script] = made = Rig(script, rules)
    return made


def test_the_allowed_twin() -> None:
    async def test() -> None:
        async with rig(answering(message())) as r:
            answer = await r.exchange(ask())
            assert answer.startswith(b"HTTP/1.1 200 OK")
            assert r.state.run.spent.output_tokens == 7
            assert [a["status"] for a in r.recorder.of("model.answered")] == [200]

    run(test)


def test_counting_tokens_uses_nothing_and_is_recorded() -> None:
    async def test() -> None:
        counted = JSON % (19, b'{"input_tokens": 9}')
        async with rig(answering(counted)) as r:
            assert b"input_tokens" in await r.exchange(ask("/v1/messages/count_tokens"))
            assert r.state.run.spent.requests == 0
            assert r.recorder.of("model.requested")[0]["path"] == "/v1/messages/count_tokens"
            ends = r.recorder.of("model.answered")
            assert [(end["status"], end["billed"]) for end in ends] == [(200, False)]

    run(test)


def test_nothing_is_sent_for_a_client_that_has_gone() -> None:
    """It hung up while the write-ahead was on its way to the disk."""

    async def test() -> None:
        async with rig(answering(message())) as r:
            r.recorder.gate.clear()
            _, writer = await r.dial()
            writer.write(ask())
            await until(lambda: bool(r.recorder.of("model.requested")))
            writer.close()
            await until(lambda: not r.state.connections)
            r.recorder.gate.set()
            await asyncio.sleep(0.1)
            assert r.connections == 0
            assert r.recorder.of("model.answered")[0]["reason"] == "client-closed"
            assert r.state.run.spent.requests == 0

    run(test)


def test_nothing_is_sent_after_the_witnesses_disagreed() -> None:
    """Not even what was admitted before, and waited for the disk."""

    async def test() -> None:
        async with rig(answering(message())) as r:
            r.recorder.gate.clear()
            reader, writer = await r.dial()
            writer.write(ask())
            await until(lambda: bool(r.recorder.of("model.requested")))
            forged = {"type": "tool_result", "tool_use_id": "t", "content": "x"}
            refused = await r.exchange(ask(messages=[{"role": "user", "content": [forged]}]))
            assert b"tool-result-never-asked" in refused
            r.recorder.gate.set()
            assert b"witness-violated" in await reader.read(4096)
            assert not r.arrived
            writer.close()

    run(test)


def test_nothing_is_sent_after_a_sandbox_is_closed() -> None:
    async def test() -> None:
        async with rig(answering(message())) as r:
            r.recorder.gate.clear()
            _, writer = await r.dial()
            writer.write(ask())
            await until(lambda: bool(r.recorder.of("model.requested")))
            working = r.state.close()
            assert len(working) == 1
            await asyncio.wait(working, timeout=2)
            r.recorder.gate.set()
            await asyncio.sleep(0.1)
            assert r.connections == 0
            writer.close()

    run(test)


@pytest.mark.parametrize("half", [False, True], ids=["closed", "half closed"])
def test_a_client_that_does_not_wait_pays_for_what_it_asked(half: bool) -> None:
    """It hung up before a byte of the answer: the provider charges the input all the same."""

    async def test() -> None:
        gone = asyncio.Event()

        async def script(_: int, reader: Reader, writer: Writer) -> None:
            await rig_of[script].request(reader)
            assert not await reader.read(1)  # the upstream is cut off with its client
            gone.set()

        async with rig(script, budget(max_budget_usd=1.0)) as r:
            _, writer = await r.dial()
            writer.write(ask(messages=[{"role": "user", "content": "x" * 30_000}]))
            await until(lambda: bool(r.arrived))
            if half:
                writer.write_eof()
            else:
                writer.close()
            await asyncio.wait_for(gone.wait(), 5)
            await until(lambda: bool(r.recorder.of("model.answered")))
            spent = r.state.run.spent
            assert spent.requests == 1
            assert spent.input_tokens > 10_000
            assert spent.cost_usd is not None
            assert spent.cost_usd > 0.03
            writer.close()

    run(test)


def test_a_torn_stream_is_paid_for_as_far_as_it_came() -> None:
    """The final count comes last: a client that leaves before it would write for nothing."""

    async def test() -> None:
        async def script(_: int, reader: Reader, writer: Writer) -> None:
            await rig_of[script].request(reader)
            usage = {"input_tokens": 11, "output_tokens": 1}
            writer.write(SSE + event("message_start", message={"model": "m", "usage": usage}))
            text = {"type": "text_delta", "text": "y" * 3000}
            writer.write(event("content_block_delta", index=0, delta=text))
            await reader.read(1)

        async with rig(script, budget(max_output_tokens=900)) as r:
            reader, writer = await r.dial()
            writer.write(ask())
            await reader.readuntil(b"yyy")
            writer.close()
            await until(lambda: bool(r.recorder.of("model.answered")))
            assert r.state.run.spent.input_tokens == 11
            assert r.state.run.spent.output_tokens >= 1000
            refused = await r.exchange(ask())
            assert b"budget-exhausted-max-output-tokens" in refused

    run(test)


def test_errors_of_the_provider_cost_nothing() -> None:
    async def test() -> None:
        error = b"HTTP/1.1 529 Overloaded\r\ncontent-length: 2\r\n\r\n{}"
        async with rig(answering(error)) as r:
            assert b"529" in await r.exchange(ask())
            assert r.state.run.spent.requests == 0

    run(test)


def test_parallel_requests_wait_for_the_budget() -> None:
    """Both fit one after the other; together their worst cases do not. Neither is refused."""

    async def test() -> None:
        let = asyncio.Event()

        async def script(_: int, reader: Reader, writer: Writer) -> None:
            while True:
                await rig_of[script].request(reader)
                await let.wait()
                writer.write(message())

        async with rig(script, budget(max_budget_usd=0.02)) as r:
            work = asyncio.gather(*(r.exchange(ask()) for _ in range(3)))
            await until(lambda: len(r.arrived) == 1)
            await asyncio.sleep(0.1)
            assert len(r.arrived) == 1
            let.set()
            answers = await work
            assert all(answer.startswith(b"HTTP/1.1 200") for answer in answers)
            assert r.state.run.spent.requests == 3

    run(test)


def test_a_spent_budget_refuses_who_waited() -> None:
    async def test() -> None:
        let = asyncio.Event()
        dear = message(usage={"input_tokens": 5, "output_tokens": 10_000_000})

        async def script(_: int, reader: Reader, writer: Writer) -> None:
            await rig_of[script].request(reader)
            await let.wait()
            writer.write(dear)
            await reader.read(1)

        async with rig(script, budget(max_budget_usd=0.02)) as r:
            work = asyncio.gather(*(r.exchange(ask()) for _ in range(3)))
            await until(lambda: len(r.arrived) == 1)
            let.set()
            answers = b"".join(await work)
            assert answers.count(b"budget-exhausted-max-budget-usd") == 4  # header and body
            assert len(r.arrived) == 1

    run(test)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (SSE.replace(b"200 OK", b"201 Created"), b"answer-status"),
        (SSE.replace(b"200 OK", b"203 X"), b"answer-status"),
        (SSE.replace(b"chunked", b"gzip, chunked"), b"answer-encoded"),
        (SSE.replace(b"\r\n\r\n", b"\r\ncontent-encoding: br\r\n\r\n"), b"answer-encoded"),
        (JSON % (4, b"[{}]"), b"answer-malformed"),
        (JSON % (2, b"{,"), b"answer-malformed"),
        (message(content=[{"type": "tool_use", "id": "t", "name": "Evil", "input": {}}]), b"tool-use-not-granted"),
        (message(usage={"output_tokens": -5}), b"answer-malformed"),
        (message(usage={"output_tokens": 1 << 60}), b"answer-malformed"),
        (message(usage={"output_tokens": "9"}), b"answer-malformed"),
        (SSE + event("content_block_start", index=0, content_block={"type": "tool_use", "id": "t", "name": "Evil"}), b"tool-use-not-granted"),
        (b"HTTP/1.1 101 Switching\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n", b"upstream-upgrade"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\nabc", b"upstream-malformed"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\nab", b"upstream-malformed"),
    ],
)  # fmt: skip
def test_answers_that_cannot_be_read_do_not_pass(answer: bytes, reason: bytes) -> None:
    """And say so in clear: nothing of them has gone in yet."""

    async def test() -> None:
        body = event("ping", note="MARK")
        async with rig(answering(answer + (body if answer.startswith(SSE[:9]) else b""))) as r:
            refused = await r.exchange(ask())
            assert refused.split(b"\r\n")[0].split(b" ")[1] in {b"403", b"502"}
            assert b"x-ringfence-reason: " + reason in refused
            assert b"MARK" not in refused
            assert b"Evil" not in refused

    run(test)


@pytest.mark.parametrize("code", [b"100 Continue", b"103 Early Hints"])
@pytest.mark.parametrize("split", [False, True])
def test_informational_answers_are_swallowed(code: bytes, split: bool) -> None:
    async def test() -> None:
        async def script(_: int, reader: Reader, writer: Writer) -> None:
            await rig_of[script].request(reader)
            writer.write(b"HTTP/1.1 %b\r\nlink: x\r\n\r\n" % code)
            if split:
                await writer.drain()
                await asyncio.sleep(0.05)
            writer.write(message())
            await reader.read(1)

        async with rig(script) as r:
            answer = await r.exchange(ask())
            assert answer.startswith(b"HTTP/1.1 200 OK")
            assert b"link" not in answer

    run(test)


def test_a_second_answer_reaches_nobody() -> None:
    """Response splitting: the connection that brought it is not used again."""

    async def test() -> None:
        evil = message(model="evil")
        async with rig(answering(message() + evil, message())) as r:
            for _ in range(3):
                answer = await r.exchange(ask())
                assert answer.startswith(b"HTTP/1.1 200 OK")
                assert b"evil" not in answer
            assert r.connections == 2  # the first was dropped, the second kept

    run(test)


def test_a_connection_kept_after_a_slow_reader_still_reads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The answer ended in the very read that filled the client's buffer."""
    monkeypatch.setattr("ringfence.egress.upstream._READ", 1 << 20)

    async def test() -> None:
        big = b"HTTP/1.1 500 X\r\ncontent-length: 400000\r\n\r\n" + b"z" * 400_000
        async with rig(answering(big, message())) as r:
            reader, writer = await r.dial()
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            writer.write(ask())
            await until(lambda: bool(r.recorder.of("model.answered")))
            assert (await r.exchange(ask())).startswith(b"HTTP/1.1 200 OK")
            assert r.connections == 1
            writer.close()
            del reader

    run(test)


def test_pipelined_requests_of_a_client_that_does_not_read_hold_their_upstream() -> None:
    """The second answer begins while the first one still fills the buffer; it has no end."""

    async def test() -> None:
        sent = 0

        async def script(_: int, reader: Reader, writer: Writer) -> None:
            nonlocal sent
            await rig_of[script].request(reader)
            writer.write(b"HTTP/1.1 500 X\r\ncontent-length: 400000\r\n\r\n" + b"z" * 400_000)
            await rig_of[script].request(reader)
            writer.write(b"HTTP/1.1 500 X\r\ncontent-length: 999999999\r\n\r\n")
            while sent < 64 << 20:
                writer.write(b"z" * 65536)
                await writer.drain()
                sent += 65536

        async with rig(script) as r:
            _, writer = await r.dial()
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            writer.write(ask() + ask())
            await asyncio.sleep(1.0)
            assert sent < 32 << 20
            writer.close()

    run(test)


class _Transport:
    closed = False

    def write(self, _: bytes) -> None:
        """Goes nowhere."""

    def abort(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def resume_reading(self) -> None:
        """Nothing is paused."""


class _Sink:
    def __init__(self) -> None:
        self.ends: list[str] = []

    def answer_head(self, status: int, headers: Any) -> None:
        assert 200 <= status <= 999

    def answer_body(self, data: bytes) -> None:
        assert not self.ends

    def answer_flush(self) -> None:
        """Nothing is held."""

    def answer_end(self) -> None:
        self.ends.append("end")

    def answer_failed(self, reason: str) -> None:
        self.ends.append(reason)


ANSWERISH = st.lists(
    st.one_of(
        st.sampled_from(
            [b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 100 C\r\n", b"HTTP/1.1 304 N\r\n", b"content-length: 2\r\n", b"\r\n",
             b"transfer-encoding: chunked\r\n", b"2\r\nok\r\n", b"0\r\n\r\n", b"ok", b"connection: close\r\n",
             b"upgrade: x\r\nconnection: upgrade\r\n", b"\n", b" folded\r\n", b"\x00"]
        ),
        st.binary(max_size=6),
    ),
    max_size=16,
)  # fmt: skip


@settings(max_examples=400)
@given(ANSWERISH, st.booleans())
def test_any_answer_ends_once_and_frees_once(parts: list[bytes], bodyless: bool) -> None:
    upstream, sink, freed = Upstream(), _Sink(), []
    transport = _Transport()
    upstream.connection_made(transport)  # type: ignore[arg-type]
    upstream.send(b"x", sink, freed.append, bodyless=bodyless)
    for part in parts:
        if part and not transport.closed and not freed:
            upstream.get_buffer(-1)[: len(part)] = part
            upstream.buffer_updated(len(part))
    upstream.connection_lost(None)
    assert len(sink.ends) == 1
    assert len(freed) <= 1
    if freed:
        assert sink.ends == ["end"]


def test_a_pool_holds_so_many_in_all() -> None:
    """Under a wildcard a sandbox can name thousands of hosts."""
    pool, transports = Pool(), []
    for number in range(200):
        upstream = Upstream()
        upstream.connection_made(_Transport())  # type: ignore[arg-type]
        transports.append(upstream.transport)
        pool.release((f"192.0.2.{number}", 443), f"h{number}", upstream)
    assert sum(not transport.is_closing() for transport in transports if transport) == 64
    pool.close()
    assert all(transport.is_closing() for transport in transports if transport)


class Turning:
    """A keeper whose value is changed; it asks for nothing else."""

    value = "cnry-turning-0-0123456789"

    async def ask(self, name: str, *, doubted: bool = False) -> Given:
        value = bytearray(self.value.encode())
        return Given(value=value, version=self.value[13], lease_seconds=None, hosts=())


def turning(r: Rig, keeper: Turning, moment: list[float]) -> Resolving:
    """The platform's credential, from a source."""
    placed = CredentialSettings(source="sealed://platform")
    resolving = Resolving(
        keeper,
        {"platform": placed},
        Ages(most=60, stale=0),
        lambda *_, **__: None,
        lambda: moment[0],
        r.state.forget_hidden,
    )
    r.state.credentials = Credentials({}, resolving)
    return resolving


def text_of(text: str) -> bytes:
    return event("content_block_delta", index=0, delta={"type": "text_delta", "text": text})


def test_a_value_that_changes_while_an_answer_streams_is_taken_out_of_it() -> None:
    keeper, moment, changed = Turning(), [1000.0], asyncio.Event()
    old, new = keeper.value, "cnry-turning-1-9876543210"

    async def script(_: int, reader: Reader, writer: Writer) -> None:
        seen = await rig_of[script].request(reader)
        assert old.encode() in seen
        usage = {"input_tokens": 1, "output_tokens": 1}
        writer.write(SSE + event("message_start", message={"model": "m", "usage": usage}))
        start = {"type": "text", "text": ""}
        writer.write(event("content_block_start", index=0, content_block=start))
        writer.write(text_of(f"before {old}."))
        await writer.drain()
        await changed.wait()
        writer.write(text_of(f"after {old} {new}.") + event("content_block_stop", index=0))
        writer.write(event("message_stop") + b"0\r\n\r\n")
        await writer.drain()

    async def test() -> None:
        async with rig(script) as r:
            resolving = turning(r, keeper, moment)
            reader, writer = await r.dial()
            writer.write(ask(stream=True))
            answer = await asyncio.wait_for(reader.readuntil(b"before [redacted]."), 10)
            keeper.value, moment[0] = new, moment[0] + 61
            # as the sandbox's next request does
            assert (await resolving.get("platform")).reveal() == new
            changed.set()
            answer += await asyncio.wait_for(reader.readuntil(b"message_stop"), 10)
            writer.close()
            assert b"after [redacted] [redacted]." in answer
            assert old.encode() not in answer
            assert new.encode() not in answer
            resolving.close()

    run(test)


def test_what_a_sandbox_looks_for_goes_when_the_value_goes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One that asks for nothing any more keeps no value that was overwritten."""
    monkeypatch.setattr("ringfence.egress.resolving.REDACT_SECONDS", 0.05)
    keeper, moment = Turning(), [1000.0]
    old, new = keeper.value, "cnry-turning-1-9876543210"
    gc.collect()  # other tests' rounds of references

    def kept(value: str) -> bool:
        found = [one for one in gc.get_objects() if isinstance(one, Needles)]
        return any(value.encode() in needles.values for needles in found)

    async def test() -> None:
        async with rig(answering(message())) as r:
            resolving = turning(r, keeper, moment)
            await r.exchange(ask())
            assert kept(old)
            keeper.value, moment[0] = new, moment[0] + 61
            await r.exchange(ask())
            assert kept(old)
            assert kept(new)
            await until(lambda: not any(secret.reveal() == old for secret in resolving.held(["platform"])))  # fmt: skip
            assert not kept(old)
            await r.exchange(ask())
            assert kept(new)
            resolving.close()
            assert not kept(new)

    run(test)


def test_what_may_be_tried_again_is_no_matter_of_permission() -> None:
    async def hangs_up(_: int, reader: Reader, writer: Writer) -> None:
        await rig_of[hangs_up].request(reader)

    def says(answer: bytes) -> tuple[int, str, bool]:
        head, _, body = answer.partition(b"\r\n\r\n")
        retried = b"x-should-retry: true" in head
        return int(head.split()[1]), json.loads(body)["error"]["type"], retried

    async def test() -> None:
        async with rig(hangs_up) as r:
            assert says(await r.exchange(ask())) == (502, "api_error", True)
            refused = await r.exchange(ask("/v1/files"))
            assert says(refused) == (403, "permission_error", False)
        async with rig(answering(SSE.replace(b"chunked", b"gzip, chunked"))) as r:
            # nobody's fault inside, and none that another try would mend
            assert says(await r.exchange(ask())) == (502, "api_error", False)
        async with rig(hangs_up) as r:
            for server in r._servers:
                server.close()
                await server.wait_closed()
            assert says(await r.exchange(ask())) == (502, "api_error", True)

    run(test)
