"""Anchors: checkpoints that the recorder puts elsewhere, what a rewritten log shows against them,
and what happens where they cannot be put.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from ringfence.config import AnchorSettings
from ringfence.errors import UnavailableError
from ringfence.record.anchoring import append, post
from ringfence.record.audit import AuditLog
from ringfence.record.client import RecorderClient, RecorderProcess
from ringfence.record.events import RunEnded, RunStarted
from ringfence.record.read import AuditReader
from ringfence.record.verify import Report, verify
from ringfence.testing.upstream import make_chain

STARTED = RunStarted(
    run_id="run_1",
    kind="claude",
    policy_digest="d",
    role="default",
    permission_mode="default",
    workspace_mode="review",
    prompt_hmac="h",
)
ENDED = RunEnded(run_id="run_1", status="succeeded", exit_code=0, duration_ms=1.0)
Body = Callable[[RecorderClient], Awaitable[None]]
SCRIPT = (
    "import sys; import ringfence.record.anchor as anchor; import ringfence.record.process as p;"
    "anchor._RETRY_SECONDS = 0.1; anchor._SILENCE_SECONDS = {silence};"
    "sys.exit(p.main(sys.argv[1:]))"
)


def recorded(audit: Path, body: Body, *, silence: float = 25.0, **settings: Any) -> tuple[int, str]:
    """Run `body` with a worker's connection; returns exit status and standard error."""
    ours, theirs = socket.socketpair()
    anchor = AnchorSettings(**settings).model_dump_json()
    process = subprocess.Popen(
        [
            *(sys.executable, "-c", SCRIPT.format(silence=silence)),
            *(str(audit), f"worker:{theirs.fileno()}"),
        ],
        env={**os.environ, "RINGFENCE_ANCHOR": anchor},
        pass_fds=[theirs.fileno()],
        stderr=subprocess.PIPE,
        text=True,
    )
    theirs.close()

    async def run() -> None:
        worker = RecorderClient(ours)
        try:
            await worker.ready()
            await body(worker)
        finally:
            await worker.close()

    try:
        asyncio.run(run())
    finally:
        _, errors = process.communicate(timeout=60)
    return process.returncode, errors


async def one_run(worker: RecorderClient) -> None:
    await worker.append(STARTED)
    await worker.append(ENDED)


async def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


def kinds(audit: Path) -> list[str]:
    with AuditReader(audit) as reader:
        return [str(record["type"]) for record in reader.events(limit=100_000)]


def checked(audit: Path, *anchors: Path) -> Report:
    texts = [path.read_text() for path in anchors]
    return verify(audit / "log.sqlite", (audit / "public.key").read_text(), texts)


def covered(anchor: Path) -> int:
    """How many records the last checkpoint in a file covers."""
    if not anchor.exists():
        return -1
    lines = anchor.read_text().split("\n")
    sizes = [int(lines[at + 1]) for at, line in enumerate(lines) if line == "ringfence/audit"]
    return sizes[-1] if sizes else -1


@pytest.fixture
def audit(tmp_path: Path) -> Path:
    return tmp_path / "audit"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "elsewhere").mkdir()
    return tmp_path / "elsewhere" / "checkpoints"


def test_a_log_that_was_cut_or_written_anew_is_found_by_its_anchor(
    audit: Path, place: Path, tmp_path: Path
) -> None:
    """By whoever has the key and all of the state directory: nothing there tells."""
    assert recorded(audit, one_run, file=place)[0] == 0
    older = tmp_path / "older"
    shutil.copytree(audit, older)

    assert recorded(audit, one_run, file=place)[0] == 0
    with AuditReader(audit) as reader:
        ends = [r["index"] for r in reader.events() if r["type"] == "run.ended"]
    assert covered(place) > ends[-1]
    assert checked(audit, place).ok
    assert "log.anchor_failed" not in kinds(audit)

    assert checked(older, older / "head").ok
    cut = checked(older, place)
    assert not cut.ok
    assert cut.reason.startswith("truncated")

    anew = AuditLog(older)
    while anew.size <= covered(place):
        anew.append([{"type": "run.started", "source": "worker", "run_id": "another"}])
    anew.close()
    assert checked(older, older / "head").ok
    rewritten = checked(older, place)
    assert not rewritten.ok
    assert "altered" in rewritten.reason


def test_a_run_that_must_be_anchored_has_ended_when_its_end_is(audit: Path, place: Path) -> None:
    async def body(worker: RecorderClient) -> None:
        await worker.append(STARTED)
        assert await worker.append(ENDED) < covered(place)

    assert recorded(audit, body, file=place, required=True, run_end=False)[0] == 0
    assert checked(audit, place).ok
    assert kinds(audit)[:3] == ["log.opened", "log.anchored", "run.started"]


def test_a_place_that_is_away_is_told_recorded_and_tried_again(audit: Path, place: Path) -> None:
    place.parent.rmdir()

    async def body(worker: RecorderClient) -> None:
        await until(lambda: "log.anchor_failed" in kinds(audit))
        await one_run(worker)
        place.parent.mkdir()
        await until(lambda: "log.anchored" in kinds(audit))

    code, errors = recorded(audit, body, file=place)
    assert code == 0
    assert errors.count("warning: the audit log cannot be anchored: No such file") == 1
    assert errors.count("anchored again") == 1
    assert kinds(audit).count("log.anchor_failed") == 1
    assert checked(audit, place).ok


def test_no_run_starts_where_it_must_be_anchored_and_cannot(audit: Path, place: Path) -> None:
    place.parent.rmdir()
    with pytest.raises(UnavailableError) as caught:
        recorded(audit, one_run, file=place, required=True)
    assert caught.value.code == "audit-anchor-failed"
    assert caught.value.hint
    assert kinds(audit) == ["log.opened", "log.anchor_failed"]


def test_a_run_that_cannot_be_anchored_any_more_is_ended(audit: Path, place: Path) -> None:
    async def body(worker: RecorderClient) -> None:
        await worker.append(STARTED)
        place.unlink()
        place.mkdir()  # root writes where it may not, too; this is no file for anyone
        with pytest.raises(UnavailableError) as caught:
            await worker.append(ENDED)
        assert caught.value.code == "audit-anchor-failed"
        await worker.ended()

    assert recorded(audit, body, file=place, required=True, patience_seconds=0)[0] == 1
    assert kinds(audit)[-2:] == ["run.ended", "log.anchor_failed"]
    assert checked(audit).ok


def test_runs_that_go_on_are_lost_then(audit: Path, place: Path) -> None:
    async def body(worker: RecorderClient) -> None:
        await worker.append(STARTED)
        place.unlink()
        place.mkdir()
        await worker.ended()

    settings: dict[str, Any] = {"required": True, "patience_seconds": 0, "every_seconds": 1}
    assert recorded(audit, body, file=place, **settings)[0] == 1
    with AuditReader(audit) as reader:
        (last,) = reader.last(1)
    assert (last["type"], last["reason"]) == ("run.lost", "audit-anchor-failed")


class Place:
    """An HTTP server of one answer, that keeps what it was sent."""

    def __init__(self, status: int = 204, seconds: float = 0.0) -> None:
        self.status, self.got = status, []
        self.went_on = threading.Event()
        self.answered = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"])).decode()
                outer.got.append((self.path, self.headers.get("authorization"), body))
                outer.went_on.wait(seconds)
                outer.answered += 1
                with contextlib.suppress(OSError):
                    self.send_response(outer.status)
                    self.send_header("location", "/elsewhere")
                    self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.got: list[tuple[str, str | None, str]]
        self.server = HTTPServer(("127.0.0.1", 0), Handler)

    @contextlib.contextmanager
    def serving(self, chain: Path | None = None) -> Iterator[str]:
        if chain is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(chain)
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        thread.start()
        scheme = "https" if chain is not None else "http"
        try:
            yield f"{scheme}://localhost:{self.server.server_port}/checkpoints?log=1"
        finally:
            self.went_on.set()
            self.server.shutdown()
            thread.join()
            self.server.server_close()


def test_a_url_gets_each_checkpoint_and_the_token(audit: Path, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("t0ken\n")
    server = Place()
    with server.serving() as url:
        assert recorded(audit, one_run, url=url, token_file=token, required=True)[0] == 0
    path, authorization, _ = server.got[0]
    assert (path, authorization) == ("/checkpoints?log=1", "Bearer t0ken")
    notes = tmp_path / "notes"
    notes.write_text("".join(body for _, _, body in server.got))
    assert covered(notes) > 2
    assert checked(audit, notes).ok


def test_a_url_that_does_not_answer_holds_nothing_up_and_has_failed(audit: Path) -> None:
    server = Place(seconds=120)

    async def body(worker: RecorderClient) -> None:
        await until(lambda: bool(server.got))
        await one_run(worker)
        assert server.answered == 0
        await until(lambda: "log.anchor_failed" in kinds(audit))

    with server.serving() as url:
        code, errors = recorded(audit, body, silence=1.0, url=url)
    assert code == 0
    assert "no answer" in errors


@pytest.mark.parametrize("status", [302, 403, 500])
def test_what_a_url_does_not_take_has_failed(status: int) -> None:
    server = Place(status)
    with server.serving() as url, pytest.raises(OSError, match=f"localhost answers {status}"):
        post({"url": url}, b"note\n")
    assert len(server.got) == 1  # a redirect is not followed: the token is for one place


def test_a_url_is_who_it_says(tmp_path: Path) -> None:
    chain, server = make_chain(tmp_path, ["localhost"]), Place(200)
    ca = next(path for path in (tmp_path / "ca.pem", chain) if path.exists())
    with server.serving(chain) as url:
        post({"url": url, "ca_file": str(ca)}, b"note\n")
        with pytest.raises(ssl.SSLCertVerificationError):
            post({"url": url}, b"note\n")
    assert [body for _, _, body in server.got] == ["note\n"]


def test_no_token_goes_where_none_is(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("two words\n")
    with pytest.raises(OSError, match="holds no token"):
        post({"url": "http://localhost:9/", "token_file": str(tmp_path / "token")}, b"")


def test_a_file_is_appended_to_and_nothing_else_is(tmp_path: Path) -> None:
    path = tmp_path / "file"
    append(str(path), b"one\n")
    with path.open("ab") as torn:
        torn.write(b"half a li")
    append(str(path), b"two\n")
    assert path.read_bytes() == b"one\nhalf a li\ntwo\n"
    link = tmp_path / "link"
    link.symlink_to(path)
    os.mkfifo(tmp_path / "fifo")
    for other in (link, tmp_path, tmp_path / "fifo"):
        with pytest.raises(OSError):
            append(str(other), b"three\n")
    assert b"three" not in path.read_bytes()


def test_a_part_that_was_written_is_left_and_with_it_what_came_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"

    def short(descriptor: int, data: bytes) -> int:
        monkeypatch.undo()
        written = os.write(descriptor, data[:4])
        append(str(path), b"another's\n")
        return written

    append(str(path), b"one\n")
    monkeypatch.setattr("ringfence.record.anchoring.os.write", short)
    with pytest.raises(OSError, match="took a part of it"):
        append(str(path), b"two, and more\n")
    assert path.read_bytes() == b"one\ntwo,\nanother's\n"


async def test_no_command_line_tells_where_it_is_anchored(audit: Path, tmp_path: Path) -> None:
    """Every user of the host can read those."""
    place = tmp_path / "a-capability"
    settings = AnchorSettings(file=place, required=True).model_dump_json()
    process = RecorderProcess.start(audit, ("worker",), settings)
    worker = RecorderClient(process.sockets["worker"])
    await worker.ready()
    told = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            told.append(entry.read_bytes())
    await worker.close()
    await asyncio.to_thread(process.close)
    assert any(b"ringfence.record.anchoring" in line for line in told)
    assert not any(b"a-capability" in line for line in told)
    assert covered(place) > 0


def test_settings(tmp_path: Path) -> None:
    for wrong in (
        {"file": "relative"},
        {"url": "http://example.com/"},
        {"url": "https://user:pw@example.com/"},
        {"required": True},
        {"file": "/x", "token_file": tmp_path / "none"},
    ):
        with pytest.raises(ValueError, match="1 validation error"):
            AnchorSettings(**wrong)
    assert not AnchorSettings().places
    good = AnchorSettings(url="https://example.com/notes", required=True)
    assert json.loads(good.model_dump_json())["required"] is True
