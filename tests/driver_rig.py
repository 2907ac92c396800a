"""A `claude` that is a list of frames, for tests of its driver."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from ringfence.policy.compiled import ToolGrants

SESSION = "11111111-2222-4333-8444-555555555555"
PLACE = f"/home/agent/.claude/projects/ringfence/{SESSION}"
GRANTS = ToolGrants(offered=("Read", "Bash"), preapproved=("Read",))


def hook(identity: str, tool: str, use: str) -> dict[str, Any]:
    told = {"hook_event_name": "PreToolUse", "tool_name": tool, "tool_input": {"file_path": "a"}}
    request = {"subtype": "hook_callback", "callback_id": "hook_0", "tool_use_id": use}
    return {"type": "control_request", "request_id": identity, "request": {**request, "input": told}}  # fmt: skip


def asks(identity: str, tool: str) -> dict[str, Any]:
    request = {"subtype": "can_use_tool", "tool_name": tool, "input": {"command": "ls"}}
    return {"type": "control_request", "request_id": identity, "request": request | {"tool_use_id": "t2"}}  # fmt: skip


USE = {"type": "tool_use", "id": "t1", "name": "Read", "input": {"file_path": "a"}}
RESULT = {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "x"}]}
ENTRY = {"type": "user", "uuid": "u", "message": {"role": "user", "content": [RESULT]}}
HONEST: list[dict[str, Any]] = [
    {"type": "system", "subtype": "init", "session_id": SESSION, "tools": ["Read"], "uuid": "a"},
    {"type": "assistant", "message": {"role": "assistant", "model": "m", "content": [USE]},
     "parent_tool_use_id": None, "session_id": SESSION, "uuid": "b"},
    hook("h1", "Read", "t1"),
    {"type": "user", "message": {"role": "user", "content": [RESULT]}, "session_id": SESSION},
    hook("h2", "Bash", "t2"),
    asks("c1", "Bash"),
    {"type": "transcript_mirror", "filePath": f"{PLACE}.jsonl", "entries": [ENTRY]},
    {"type": "stream_event", "uuid": "c", "session_id": SESSION, "event": {"type": "message_stop"}},
    {"type": "control_cancel_request", "request_id": "c1"},
    {"type": "rate_limit_event", "rate_limit_info": {"status": "allowed"}, "uuid": "e", "session_id": SESSION},
    {"type": "result", "subtype": "success", "is_error": False, "num_turns": 1, "result": "done",
     "duration_ms": 1, "duration_api_ms": 1, "session_id": SESSION, "uuid": "d", "total_cost_usd": 0.1},
]  # fmt: skip


class Process:
    """Answers its initialisation, and writes its lines once it has been given a prompt."""

    def __init__(self, lines: list[bytes]) -> None:
        self._lines, self._out = lines, asyncio.Queue[bytes]()
        self._ended = asyncio.Event()
        self.returncode: int | None = None

    async def write(self, data: bytes) -> None:
        for line in data.splitlines():
            sent = json.loads(line)
            if sent.get("type") == "control_request":
                answer = {"subtype": "success", "request_id": sent["request_id"]}
                answer["response"] = {"hook_on_failure_supported": True}
                self._put({"type": "control_response", "response": answer})
            elif sent.get("type") == "user":
                for each in self._lines:
                    self._out.put_nowait(each)
                self._out.put_nowait(b"")

    def _put(self, frame: dict[str, Any]) -> None:
        self._out.put_nowait(json.dumps(frame).encode() + b"\n")

    async def read(self, _: int) -> bytes:
        return b"" if self._ended.is_set() else await self._out.get()

    async def close_stdin(self) -> None:
        pass

    async def stderr(self) -> bytes:
        return b""

    async def wait(self) -> int:
        self.returncode = self.returncode or 0
        return self.returncode

    async def kill(self) -> None:
        self.returncode = -9
        self._ended.set()
        self._out.put_nowait(b"")


class Place:
    def __init__(self, process: Process) -> None:
        self._process = process

    async def exec(self, *_: Any, **__: Any) -> Process:
        return self._process

    async def stop(self) -> None:
        await self._process.kill()


def dumped(frames: list[dict[str, Any]]) -> list[bytes]:
    return [json.dumps(frame).encode() + b"\n" for frame in frames]
