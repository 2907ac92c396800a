"""Bodies that are hard to read are read beside the loop, with limits, and with the same verdict."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import uvloop

sys.path.insert(0, str(Path(__file__).parent))
from egress_rig import RULES, Rig, ask, message

from ringfence.channel.link import EgressLink
from ringfence.channel.messages import Configure
from ringfence.channel.spawn import EgressProcess
from ringfence.egress.aside import Aside, _call, _written, heavy
from ringfence.egress.model import Admitted, Facts, Refusal, judge
from ringfence.egress.model.carry import fit
from ringfence.egress.model.dialects import Asked, Call, Form, Unserved
from ringfence.egress.model.dialects import made as requested
from ringfence.policy.compiled import ModelRules

# nothing can be imported there, as under a uid that may not read the interpreter's directories
ZYGOTE = (
    "import socket, sys; from ringfence.egress.aside import zygote; "
    "from ringfence.egress.process import preload; preload(); "
    "sys.meta_path.clear(); sys.path_importer_cache.clear(); "
    "zygote(socket.socket(fileno=int(sys.argv[1])))"
)
MODEL = ModelRules(tools=("Bash", "Read"), models=("m",))


def body(**more: Any) -> bytes:
    honest = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]}
    return json.dumps(honest | more).encode()


RESULTS = [
    {"type": "tool_result", "tool_use_id": "t1", "content": "x"},
    {"type": "tool_result", "tool_use_id": "t2", "is_error": True, "content": "\u20ac"},
]
BODIES = {
    "honest": body(stream=True),
    "results": body(messages=[{"role": "user", "content": RESULTS}]),
    "large": body(system="\u20ac" * 3_000_000),
    "a duplicate key": b'{"model":"m","model":"n"}',
    "no JSON": b"{" * 100,
    "another tool": body(tools=[{"name": "WebFetch"}]),
    "another model": body(model="n"),
    "a url": body(messages=[{"role": "user", "content": [{"type": "image", "source": {"type": "url"}}]}]),
}  # fmt: skip


def bomb(megabytes: int) -> bytes:
    """Empty objects without end."""
    many = b"{}," * (megabytes * 349_525)
    return b'{"model":"claude-sonnet-5","max_tokens":9,"messages":[' + many + b"{}]}"


@asynccontextmanager
async def aside() -> AsyncIterator[tuple[Aside, subprocess.Popen[bytes]]]:
    ours, theirs = socket.socketpair()
    process = subprocess.Popen(
        [sys.executable, "-c", ZYGOTE, str(theirs.fileno())], pass_fds=[theirs.fileno()]
    )
    theirs.close()
    made = Aside(ours)
    try:
        yield made, process
    finally:
        made.close()
        assert await asyncio.to_thread(process.wait, 30) in {0, -9}


@pytest.mark.parametrize("name", BODIES)
def test_the_verdict_is_the_same(name: str) -> None:
    async def test() -> None:
        async with aside() as (made, _):
            there, here = await made.judge(BODIES[name], MODEL), judge(BODIES[name], MODEL)
            assert there == here
            assert isinstance(there, Facts if name in {"honest", "results", "large"} else Refusal)

    uvloop.run(test())


@pytest.mark.parametrize("kind", ["bedrock", "vertex", "anthropic"])
def test_a_request_is_made_as_it_would_be_here(kind: str) -> None:
    """With a beta flag, text that escapes make longer, and a model that is not there."""
    form = Form(kind=kind, models={"m": "anthropic.claude-m"}, project="acme-prod", region="eu")
    asked = Asked(
        path_and_query="/v1/messages",
        headers=((b"anthropic-beta", b"effort-2025-11-24"), (b"x-app", b"\xe9")),
        body=body(system="\u20ac" * 1_000_000, stream=True, diagnostics={}),
        model="m",
        own_model="n",
        streaming=True,
        counts_only=False,
    )

    async def test() -> None:
        async with aside() as (one, process):
            there = await one.make(asked, form)
            assert there == requested(asked, form)
            assert isinstance(there, Call)
            none = replace(form, models={})
            assert await one.make(asked, none) == requested(asked, none)
            many = replace(asked, body=bomb(8))
            process.kill()
            process.wait()
            assert await one.make(many, form) == Unserved(413, "body-too-complex")

    uvloop.run(test())


@pytest.mark.parametrize(("model", "mixed"), [("claude-haiku-4-5", False), ("m", True)])
def test_a_request_is_fitted_as_it_would_be_here(model: str, mixed: bool) -> None:
    called = {"type": "tool_use", "id": "t1", "name": "Bash", "input": {"command": "\u20ac"}}
    said = [{"role": "assistant", "content": [called]}, {"role": "user", "content": RESULTS[:1]}]
    admitted = Admitted(
        headers=((b"anthropic-beta", b"effort-2025-11-24"), (b"x-app", b"\xe9")),
        body=body(messages=said, thinking={"type": "enabled"}, max_tokens=90_000),
        path_and_query="/v1/messages",
        model="m",
        streaming=True,
        counts_only=False,
        max_tokens=90_000,
        worst_usd=1.5,
    )

    async def test() -> None:
        async with aside() as (one, process):
            there = await one.fit(admitted, model, mixed=mixed)
            assert there == fit(admitted, model, mixed=mixed)
            assert isinstance(there, Admitted)
            assert b"thinking" not in there.body
            process.kill()
            process.wait()
            assert await one.fit(admitted, model, mixed=mixed) == Refusal(413, "body-too-complex")

    uvloop.run(test())


def test_a_tree_of_nothing_is_refused_and_the_loop_goes_on() -> None:
    """8 MB that would be 220, and half a second or more, in the loop."""

    async def test() -> None:
        async with aside() as (made, _):
            turns, over = 0, asyncio.Event()

            async def others() -> None:
                nonlocal turns
                while not over.is_set():
                    turns += 1
                    await asyncio.sleep(0.005)

            task = asyncio.ensure_future(others())
            assert await made.judge(bomb(8), MODEL) == Refusal(413, "body-too-complex")
            over.set()
            await task
            assert turns > 5  # in the loop it would be one
            assert isinstance(await made.judge(BODIES["honest"], MODEL), Facts)

    assert heavy(bomb(1))
    uvloop.run(test())


def test_without_a_reader_it_is_refused() -> None:
    async def test() -> None:
        async with aside() as (made, process):
            process.kill()
            process.wait()
            assert await made.judge(BODIES["honest"], MODEL) == Refusal(413, "body-too-complex")

    uvloop.run(test())


def test_who_hangs_up_keeps_its_place_until_the_reader_has_ended() -> None:
    async def test() -> None:
        async with aside() as (made, _):
            task = asyncio.ensure_future(made.judge(bomb(2), MODEL))
            while not made._reading:
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert made._reading
            assert made._turns._value == 3
            while made._reading:
                await asyncio.sleep(0.01)
            assert made._turns._value == 4

    uvloop.run(test())


def test_what_is_easy_to_read_is_read_at_once() -> None:
    code = "def f(a, b):\n    return [a, {b}]\n" * 2000
    assert not heavy(body(system=code))
    assert not heavy(body(system="x" * (3 << 20)))
    assert heavy(body(system="x" * (5 << 20)))
    assert heavy(body(system=[{}] * 60_000))
    assert heavy(body(system="\n" * 60_000))


def wire(test: Callable[[Rig], Any]) -> None:
    async def answer(_: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await rig.request(reader)
        writer.write(message())
        await writer.drain()

    async def run() -> None:
        nonlocal rig
        async with aside() as (made, _), Rig(answer, RULES) as rig:
            rig.state.shared = replace(rig.state.shared, aside=made)
            await test(rig)

    rig: Rig
    uvloop.run(run())


def test_on_the_wire() -> None:
    async def test(rig: Rig) -> None:
        many = [{"role": "user", "content": "[,{" * 25_000}]
        assert heavy(json.dumps(many).encode())
        assert (await rig.exchange(ask(messages=many))).startswith(b"HTTP/1.1 200")
        refused = await rig.exchange(ask(messages=many, tools=[{"name": "WebFetch"}]))
        assert refused.startswith(b"HTTP/1.1 403")
        assert b"x-ringfence-reason: tool-not-granted" in refused
        assert [r["reason"] for r in rig.recorder.of("egress.refused")] == ["tool-not-granted"]
        assert len(rig.arrived) == 1

    wire(test)


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def held(pid: int) -> list[str]:
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found.append(os.readlink(entry))
        except OSError:
            continue
    return found


@pytest.mark.root
def test_the_zygote_holds_one_socket_has_the_uid_and_ends_with_egress(tmp_path: Path) -> None:
    process = EgressProcess.start()
    recorder, theirs = socket.socketpair()

    async def configure() -> int:
        link = EgressLink(process.connection, lambda _: None)
        # a recorder that greets is all that it waits for
        key = json.dumps({"k": "00" * 32}).encode()
        recorder.send(len(key).to_bytes(4, "big") + key)
        await link.request(
            Configure, descriptors=[theirs.fileno()], providers={}, drop_to_uid=1_999_998
        )
        (zygote,) = children(process.pid)
        status: dict[str, str] = {}
        async with asyncio.timeout(10):  # it is told, and does not answer
            while status.get("Uid", "").split() != ["1999998"] * 4:
                await asyncio.sleep(0.01)
                lines = Path(f"/proc/{zygote}/status").read_text().splitlines()
                status = dict(line.split(":\t", 1) for line in lines)
        assert set(status["Gid"].split()) == {"1999998"}
        assert status["NoNewPrivs"] == "1"
        assert int(status["CapEff"], 16) == 0
        assert sum(name.startswith("socket:") for name in held(zygote)) == 1
        await link.close()
        return zygote

    zygote = asyncio.run(configure())
    recorder.close()
    theirs.close()
    process.close()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{zygote}/status").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert (
        not Path(f"/proc/{zygote}").exists()
        or "Z" in (Path(f"/proc/{zygote}/status").read_text().splitlines()[2])
    )


def test_half_an_answer_is_none() -> None:
    """Of a reader that was ended while it wrote: what is left of a body is never sent."""
    call = Call("/v1/messages", ((b"x", b"y"),), b'{"model": "m"}')
    whole = _written(call)
    assert _call(whole) == call
    for end in range(len(whole)):
        assert _call(whole[:end]) == Unserved(413, "body-too-complex"), end
    refused = Unserved(403, "model-not-at-provider")
    assert _call(_written(refused)) == refused
