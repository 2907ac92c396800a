"""mitmproxy addon: one host, a header set, the upstream on loopback. Env: BENCH_PORT."""

import os

HOST = "api.bench.test"


def server_connect(data):
    data.server.address = ("127.0.0.1", int(os.environ["BENCH_PORT"]))


def request(flow):
    if flow.request.pretty_host != HOST:
        flow.kill()
    flow.request.headers["x-api-key"] = "sk-bench"
