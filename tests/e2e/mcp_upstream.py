"""A real MCP server (the official SDK) behind TLS on loopback. A process of its own, so that its
event loop and warnings are none of the tests'.

Usage: python mcp_upstream.py LEAF.PEM SEEN.JSONL [TOOL]. Prints its port. It has one tool, `add` or
`find`: an agent may be offered no other than its policy grants.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from pathlib import Path

import uvicorn
from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.server.transport_security import TransportSecuritySettings

SECURITY = TransportSecuritySettings(allowed_hosts=["mcp.example.com"], allowed_origins=[])
server = MCPServer("notes")


def add(a: int, b: int) -> str:
    """Add two numbers."""
    return f"the sum is {a + b}"


def find(name: str) -> str:
    """Find somebody; not while a file says that what is behind it is away."""
    if Path(f"{sys.argv[2]}.down").exists():
        raise ToolError("the directory is away")
    return f"{name} is found"


def seen(app: object) -> object:
    async def wrapped(scope, receive, send) -> None:
        if scope["type"] == "http":
            headers = {name.decode(): value.decode() for name, value in scope["headers"]}
            with open(sys.argv[2], "a") as file:
                file.write(json.dumps({"method": scope["method"], "headers": headers}) + "\n")
            if headers.get("authorization") != "Bearer mcp-secret-value-0123456789":
                await send({"type": "http.response.start", "status": 403, "headers": []})
                await send({"type": "http.response.body", "body": b"no"})
                return
        await app(scope, receive, send)  # type: ignore[operator]

    return wrapped


async def main() -> None:
    server.add_tool({"add": add, "find": find}[sys.argv[3]])
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    config = uvicorn.Config(
        seen(server.streamable_http_app(transport_security=SECURITY)),  # type: ignore[arg-type]
        ssl_certfile=sys.argv[1],
        log_level="critical",
        lifespan="on",
    )
    await uvicorn.Server(config).serve(sockets=[listener])


if __name__ == "__main__":
    asyncio.run(main())
