"""The whole model route beside LiteLLM's proxy and nginx: what a model request costs through each.

`python -m benchmarks.model_route [seconds per window] [windows]`

One upstream, which speaks no TLS and answers at once; every way sets the key. ringfence judges the
request, records it durably before it leaves, meters the answer; with limits it asks its worker,
which asks the store, and settles. LiteLLM translates and meters, with neither keys nor a database;
nginx passes bytes. Rows take turns, and of several windows the best counts.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import uvloop

from benchmarks import limits, proxies
from benchmarks.egress import Row, Running, measure, show, upstream
from benchmarks.load import Way
from benchmarks.proxies import KEY, PEERS, Place, Start
from ringfence.channel.link import EgressLink
from ringfence.channel.messages import Configure, OpenSandbox, ProviderConfig
from ringfence.channel.spawn import EgressProcess
from ringfence.config import LimitSettings
from ringfence.limits.sqlite import SqliteLimits
from ringfence.policy.codec import egress_to_json
from ringfence.policy.compiled import EgressRules, ModelRules
from ringfence.record.client import RecorderClient, RecorderProcess
from ringfence.worker.desk import Desk
from ringfence.worker.prepare import listen
from ringfence.worker.station import NoticeBoard

MODEL = "claude-sonnet-4-5"
# limits that are never reached: what they cost is measured, not what they hold back
LIMITS = {"rates": {"all": {"requests": 1e9, "input_tokens": 1e12, "output_tokens": 1e12}}}
BASE = ("no proxy", "-")
TARGET = 0.1


@asynccontextmanager
async def direct(place: Place) -> AsyncIterator[proxies.Running]:
    """No proxy: the baseline."""
    yield proxies.Running(Way(port=place.port, model=True), None)


def nginx(place: Place) -> AbstractAsyncContextManager[proxies.Running]:
    """Reverse proxy on a unix socket; sets the key, checks nothing of the request."""
    unix, config = place.directory / "nginx.sock", place.directory / "nginx.conf"
    config.write_text(
        f"""daemon off; worker_processes 1; pid {place.directory}/nginx.pid; error_log stderr crit;
events {{ worker_connections 256; }}
http {{
  access_log off;
  upstream up {{ server 127.0.0.1:{place.port}; keepalive 32; keepalive_requests 100000000; }}
  server {{
    listen unix:{unix}; keepalive_requests 100000000;
    location / {{
      proxy_pass http://up; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_set_header x-api-key {KEY};
    }}
  }}
}}
"""
    )
    argv = [proxies.program("nginx"), "-p", str(place.directory), "-c", str(config)]
    return proxies.process(argv, Way(unix=str(unix), model=True))


def litellm(place: Place) -> AbstractAsyncContextManager[proxies.Running]:
    """Its proxy, with one worker, on the path that Claude Code asks it on."""
    port, config = proxies.free_port(), place.directory / "litellm.yaml"
    config.write_text(
        f"""model_list:
  - model_name: {MODEL}
    litellm_params:
      model: anthropic/{MODEL}
      api_base: http://127.0.0.1:{place.port}
      api_key: {KEY}
litellm_settings: {{ telemetry: false }}
"""
    )
    argv = [str(PEERS / "litellm/bin/litellm"), "--config", str(config), "--port", str(port)]
    environment = {
        # prices that it would fetch from the net otherwise
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LITELLM_LOG": "ERROR",
        # it need not look keys up: what it would cost is left out in its favour
        "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
    }
    way = Way(port=port, model=True)
    return proxies.process([*argv, "--host", "127.0.0.1"], way, environment, seconds=180)


def ringfence(*, limited: bool, wait_for_audit: bool = True) -> Start:
    """Recorder, egress and desk as a worker has them."""

    @asynccontextmanager
    async def start(place: Place) -> AsyncIterator[proxies.Running]:
        state = place.directory / f"ours-{limited:d}{wait_for_audit:d}"
        (state / "socket").mkdir(parents=True, mode=0o700)
        state.chmod(0o700)
        async with AsyncExitStack() as stack:
            recorder = RecorderProcess.start(state / "audit")
            stack.push_async_callback(asyncio.to_thread, recorder.close)
            egress = EgressProcess.start()
            stack.push_async_callback(asyncio.to_thread, egress.close)
            worker = RecorderClient(recorder.sockets["worker"])
            stack.push_async_callback(worker.close)
            notices = NoticeBoard()
            link = EgressLink(egress.connection, notices.post)
            stack.push_async_callback(link.close)
            await worker.ready()
            if limited:
                desk = _desk(state, worker, link, notices)
                stack.push_async_callback(desk.close)
            url = f"http://127.0.0.1:{place.port}"
            await link.request(
                Configure,
                descriptors=[recorder.sockets["egress"].fileno()],
                providers={"anthropic": ProviderConfig(base_url=url, credential="environment")},
                environment_credential=KEY,
                state_dir=str(state),
                ca_dir=str(state / "ca"),
                wait_for_audit=wait_for_audit,
                asks_for_turns=limited,
            )
            recorder.sockets["egress"].close()
            worker.quota("sb_bench", 1 << 40)
            unix = await _sandbox(link, state / "socket")
            yield proxies.Running(Way(unix=unix, model=True), egress.pid)

    return start


def _desk(state: Path, worker: Any, link: EgressLink, notices: NoticeBoard) -> Desk:
    desk = Desk(
        LimitSettings.model_validate(LIMITS),
        SqliteLimits(state / "limits" / "limits.sqlite"),
        worker,
        reply=link.tell,
        post=notices.post,
        name="desk_bench",
    )
    notices.desk = desk.heard
    return desk


async def _sandbox(link: EgressLink, directory: Path) -> str:
    listener = listen(directory / "egress.sock")
    await link.request(
        OpenSandbox,
        descriptors=[listener.fileno()],
        sandbox_id="sb_bench",
        run_id="run_bench",
        session_id="",
        rules=egress_to_json(EgressRules(model=ModelRules(tools=("Bash",)))),
    )
    listener.close()
    return str(directory / "egress.sock")


ROWS: tuple[tuple[str, str, str, Start], ...] = (
    (*BASE, "", direct),
    ("nginx", "reverse", "nginx", nginx),
    ("ringfence", "durable", "", ringfence(limited=False)),
    ("ringfence, limits", "durable", "", ringfence(limited=True)),
    ("ringfence", "no wait", "", ringfence(limited=False, wait_for_audit=False)),
    ("ringfence, limits", "no wait", "", ringfence(limited=True, wait_for_audit=False)),
    ("LiteLLM", "proxy", "litellm", litellm),
)


async def run(seconds: float, windows: int) -> dict[tuple[str, str], Row]:
    """The table, and the ratios that the targets name."""
    with tempfile.TemporaryDirectory(prefix="ringfence-bench-") as scratch:
        Path(scratch).chmod(0o755)
        async with AsyncExitStack() as stack:
            port = stack.enter_context(upstream(Path(scratch), tls=False))
            place = Place(Path(scratch), port)
            running: Running = {}
            for name, kind, peer, start in ROWS:
                if peer and (mend := proxies.missing(peer)):
                    print(f"{name}: not installed: {mend}", file=sys.stderr)
                    continue
                running[name, kind] = await stack.enter_async_context(start(place))
            results = await measure(running, seconds, windows)
    print(f"{'way':26} {'kind':11} +p50 µs  +p99 µs     req/s  ratio   CPU µs")
    for (name, kind), row in results.items():
        show(name, kind, row, results[BASE])
    _targets(results)
    return results


def _targets(results: dict[tuple[str, str], Row]) -> None:
    base, theirs = results[BASE]["p50_us"], results.get(("LiteLLM", "proxy"))
    if theirs is None:
        return
    for (name, kind), row in results.items():
        if name.startswith("ringfence"):
            ratio = (row["p50_us"] - base) / (theirs["p50_us"] - base)
            print(f"{name}, {kind}: {ratio:.3f}x LiteLLM's added p50 (target {TARGET})")


def main(arguments: list[str]) -> None:
    """Entry."""
    seconds = float(arguments[0]) if arguments else 2.0
    windows = int(arguments[1]) if len(arguments) > 1 else 3
    print(f"load of the host before: {os.getloadavg()[0]:.1f}")
    uvloop.run(run(seconds, windows))
    print("what admission costs by itself:")
    limits.main(["sqlite", "postgresql", "redis"])
    print(f"load of the host after: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main(sys.argv[1:])
