"""A program in the place of `claude` that lies: a script behind an executable of a few bytes.

The sandbox mounts `claude` so that it can be run and not read, which no interpreter's script
survives: so what is mounted is machine code that starts the workspace's script instead.
"""

from __future__ import annotations

import platform
import struct
from pathlib import Path

SCRIPT = "/workspace/.liar.py"

# execve("/usr/bin/python3", ["/usr/bin/python3", SCRIPT, *argv[1:]], envp): the slot of argc
# becomes argv[0]. Each {} is filled with the distance to a string behind the code.
_X86_64 = (
    "488b0c24 488d54cc10"  # rcx = argc; rdx = envp
    "488d3d{program} 48893c24"  # rdi = program; argv[0]
    "488d05{script} 4889442408"  # argv[1]
    "4889e6 b83b000000 0f05"  # rsi = argv; execve
)
_AARCH64 = (
    "e30340f9 e20300 91"  # x3 = argc; x2 = sp
    "420c038b 42400091"  # x2 += 8 * x3 + 16
    "{program} e00300f9 {script} e40700f9"
    "e1030091 a81b80d2 010000d4"
)

PRELUDE = r"""
import json, os, signal, sys, threading, time
session = next((a.partition("=")[2] for a in sys.argv if a.startswith("--session-id=")), "")
def send(value):
    data = (json.dumps(value) + "\n").encode()
    while data:
        data = data[os.write(1, data):]
def read():
    line = sys.stdin.readline()
    if not line:
        sys.exit(0)
    return json.loads(line)
def answer(message, **more):
    send({"type": "control_response", "response": {"subtype": "success",
          "request_id": message["request_id"], "response": more}})
def begin():
    answer(read(), hook_on_failure_supported=True, commands=[])
def prompt():
    while True:
        message = read()
        if message["type"] == "user":
            return message["message"]["content"]
        if message["type"] == "control_request":
            answer(message)
def result(**more):
    send({"type": "result", "subtype": "success", "duration_ms": 1, "duration_api_ms": 1,
          "is_error": False, "num_turns": 1, "session_id": session, "result": "done",
          "total_cost_usd": 0.0, "usage": {}} | more)
def text(words):
    return {"type": "assistant", "session_id": session, "message": {"role": "assistant",
            "model": "m", "content": [{"type": "text", "text": words}]}}
def hook(number, identity, name="Bash", tool_input=None, callback="hook_0"):
    send({"type": "control_request", "request_id": str(number), "request": {
        "subtype": "hook_callback", "callback_id": callback, "tool_use_id": identity,
        "input": {"tool_name": name, "tool_input": tool_input or {"command": "ls"}}}})
"""


def _code(machine: str, program: int, script: int) -> bytes:
    """Machine code; the strings are at these distances from its first byte."""
    if machine == "aarch64":

        def adr(register: int, at: int, target: int) -> str:
            distance = target - at
            word = 0x10000000 | (distance & 3) << 29 | (distance >> 2) << 5 | register
            return struct.pack("<I", word).hex()

        return bytes.fromhex(
            _AARCH64.format(program=adr(0, 16, program), script=adr(4, 24, script))
        )
    return bytes.fromhex(
        _X86_64.format(
            program=struct.pack("<i", program - 16).hex(),
            script=struct.pack("<i", script - 27).hex(),
        )
    )


def executable() -> bytes:
    """An ELF file of one segment."""
    machine = platform.machine()
    number = {"x86_64": 62, "aarch64": 183}[machine]
    base, start, room = 0x400000, 120, 64
    strings = [b"/usr/bin/python3\0", SCRIPT.encode() + b"\0"]
    code = _code(machine, room, room + len(strings[0]))
    body = code.ljust(room, b"\0") + b"".join(strings)
    size = start + len(body)
    header = b"\x7fELF\2\1\1".ljust(16, b"\0") + struct.pack(
        "<HHIQQQIHHHHHH", 2, number, 1, base + start, 64, 0, 0, 64, 56, 1, 0, 0, 0
    )
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, base, base, size, size, 4096)
    return header + segment + body


def install(workspace: Path, place: Path, script: str) -> str:
    """Write the liar; returns the path that RINGFENCE_CLAUDE takes."""
    (workspace / Path(SCRIPT).name).write_text(PRELUDE + script)
    path = place / "claude"
    path.write_bytes(executable())
    path.chmod(0o755)
    return str(path)
