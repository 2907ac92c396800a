"""Running any program in the fence: the seed's `run_agent_in_sandbox` contract."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ringfence.agent.command_line import PLACEHOLDER, tool_environment
from ringfence.sandbox.protocol import INSIDE_PROXY_PORT, Sandbox

MAX_OUTPUT = 16 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class CommandResult:
    """What a program left. `truncated` says that its output went past the cap."""

    exit_code: int
    output: bytes
    errors: bytes
    truncated: bool


async def run_command(
    sandbox: Sandbox,
    argv: Sequence[str],
    *,
    task: str,
    environment: Mapping[str, str],
    model: str | None = None,
    on_output: Callable[[bytes], None] | None = None,
) -> CommandResult:
    """Start it with TASK in its environment, collect its output, wait for its end.

    `model` is the model it is meant to ask, empty for any, None when the policy opens no way to
    one: with it comes a key that is none, because clients refuse to start without.
    """
    asks = {"ANTHROPIC_API_KEY": PLACEHOLDER} if model is not None else {}
    if model:
        asks["ANTHROPIC_MODEL"] = model
    process = await sandbox.exec(
        argv,
        environment={
            **tool_environment(f"http://127.0.0.1:{INSIDE_PROXY_PORT}"),
            **asks,
            **environment,
            "TASK": task,
        },
    )
    output = bytearray()
    truncated = False
    try:
        await process.close_stdin()
        while chunk := await process.read():
            if on_output is not None:
                on_output(chunk)
            room = MAX_OUTPUT - len(output)
            output += chunk[:room]
            truncated = truncated or len(chunk) > room
        code = await process.wait()
    except asyncio.CancelledError:
        await process.kill()
        raise
    return CommandResult(
        exit_code=code, output=bytes(output), errors=await process.stderr(), truncated=truncated
    )
