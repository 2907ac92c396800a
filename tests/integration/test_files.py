"""Files through the official client and around it, on both databases."""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anthropic
import httpx2
import pytest
from anthropic import Anthropic

from gateway_rig import Rig, caller
from ringfence.config import GatewaySettings
from ringfence.control import files
from ringfence.control.platform import keeping
from ringfence.control.tenancy import Caller
from ringfence.errors import CallerError, DeniedError, RingfenceError, UnavailableError
from ringfence.store.database import Database
from ringfence.worker.brought import files_of

MB = 1 << 20
FORM = {"content-type": "multipart/form-data; boundary=b"}


@pytest.fixture(scope="module")
def rig(place: Any) -> Rig:
    settings = GatewaySettings(
        max_file_mb=3, file_quota_mb=8, session_files_mb=1, body_seconds=5.0, file_seconds=120.0
    )
    return Rig(place=place, settings=settings)


@pytest.fixture(scope="module")
def base(rig: Rig) -> Iterator[str]:
    with rig.serving() as url:
        yield url


@pytest.fixture
def client(rig: Rig, base: str, request: pytest.FixtureRequest) -> Iterator[Anthropic]:
    """A tenant of the test's own: quotas and lists are its alone."""
    key = rig.key(own_name(request)).text
    with Anthropic(base_url=base, api_key=key, max_retries=0) as made:
        yield made


def own_name(request: pytest.FixtureRequest) -> str:
    return hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:16]


def raw(rig: Rig, base: str, request: pytest.FixtureRequest) -> httpx2.Client:
    return caller(base, rig.key(own_name(request)).text)


def on_disk(rig: Rig, tenant: str) -> list[Path]:
    directory = rig.state / "platform" / "files" / tenant
    return sorted(directory.iterdir()) if directory.exists() else []


def tenant_of(rig: Rig, request: pytest.FixtureRequest) -> str:
    return rig.key(own_name(request)).row.tenant_id


def test_a_file_goes_up_comes_down_and_goes(
    rig: Rig, client: Anthropic, request: pytest.FixtureRequest
) -> None:
    content = os.urandom(2 * MB + 17)
    made = client.beta.files.upload(file=("report.csv", content, "text/csv"))
    assert (made.type, made.filename, made.mime_type) == ("file", "report.csv", "text/csv")
    assert (made.size_bytes, made.downloadable, made.scope) == (len(content), True, None)
    assert made.expires_at is None
    assert client.beta.files.retrieve_metadata(made.id) == made
    assert client.beta.files.download(made.id).read() == content
    (path,) = on_disk(rig, tenant_of(rig, request))
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    gone = client.beta.files.delete(made.id)
    assert (gone.id, gone.type) == (made.id, "file_deleted")
    assert on_disk(rig, tenant_of(rig, request)) == []
    with pytest.raises(anthropic.NotFoundError) as caught:
        client.beta.files.download(made.id)
    assert caught.value.error_code == "file_not_found"


def test_an_empty_file_is_a_file(client: Anthropic) -> None:
    made = client.beta.files.upload(file=("empty", b""))
    assert made.size_bytes == 0
    assert client.beta.files.download(made.id).read() == b""


def test_lists_by_page_by_id_and_by_scope(client: Anthropic) -> None:
    made = [client.beta.files.upload(file=(f"{n}.txt", b"x")).id for n in range(5)]
    assert [one.id for one in client.beta.files.list(limit=2)] == made[::-1]
    page = client.beta.files.list(ids=[made[1], made[3], made[1], "file_no"])
    assert [one.id for one in page.data] == [made[3], made[1]]
    assert page.next_page is None
    assert client.beta.files.list(scope_id="sesn_x").data == []
    for wrong in (
        {"ids": made, "limit": 2},
        {"ids": [str(n) for n in range(101)]},
        {"limit": 1001},
    ):
        with pytest.raises(anthropic.BadRequestError):
            client.beta.files.list(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ("../../etc/passwd", "passwd"),
        ("C:\\Users\\me\\notes.txt", "notes.txt"),
        ("a/b/", "unnamed.txt"),
        ("..", "unnamed.txt"),
        ("grüße 漢.txt", "grüße 漢.txt"),
        ("x" * 255, "x" * 255),
    ],
)
def test_names_are_made_safe(client: Anthropic, sent: str, kept: str) -> None:
    made = client.beta.files.upload(file=(sent, b"x", "text/plain"))
    assert (made.filename, made.mime_type) == (kept, "text/plain")


@pytest.mark.parametrize("name", ["a\u202egnp.exe", "x" * 256, "a\u0085b"])
def test_names_that_lie_are_refused_and_leave_nothing(
    rig: Rig, client: Anthropic, request: pytest.FixtureRequest, name: str
) -> None:
    with pytest.raises(anthropic.BadRequestError):
        client.beta.files.upload(file=(name, b"x", "text/plain"))
    assert on_disk(rig, tenant_of(rig, request)) == []


def test_a_download_is_never_what_a_browser_would_act_on(
    rig: Rig, base: str, client: Anthropic, request: pytest.FixtureRequest
) -> None:
    made = client.beta.files.upload(file=("a.html", b"<script>", "text/html"))
    with raw(rig, base, request) as plain:
        answer = plain.get(f"/v1/files/{made.id}/content")
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["content-disposition"] == "attachment"
    assert answer.headers["x-content-type-options"] == "nosniff"


def part(name: str, value: bytes, *more: bytes) -> bytes:
    head = b'--b\r\ncontent-disposition: form-data; name="%b"' % name.encode()
    return head + b"".join(more) + b"\r\n\r\n" + value + b"\r\n"


FILE = part("file", b"x", b'; filename="a"')
END = b"--b--\r\n"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        END,
        FILE,
        FILE + FILE + END,
        FILE + part("other", b"x") + END,
        FILE + part("expires_in_seconds", b"3599") + END,
        FILE + part("expires_in_seconds", b"7776001") + END,
        FILE + part("expires_in_seconds", b"soon") + END,
        FILE + part("expires_in_seconds", b"4000", b"\r\ncontent-disposition: x") + END,
        FILE + part("expires_in_seconds", b"9" * 4000) + END,
        part("file", b"x", b'; filename="\xff"') + END,
        b"--c\r\nnothing",
        b"--b\r\n" + b"x" * 20_000,
    ],
)
def test_a_malformed_form_is_a_400_and_leaves_nothing(
    rig: Rig, base: str, request: pytest.FixtureRequest, body: bytes
) -> None:
    with raw(rig, base, request) as plain:
        answer = plain.post("/v1/files", content=body, headers=FORM)
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["type"] == "invalid_request_error"
        assert on_disk(rig, tenant_of(rig, request)) == []
        # the allowed twin
        good = FILE + part("expires_in_seconds", b"3600") + END
        made = plain.post("/v1/files", content=good, headers=FORM)
        assert made.status_code == 200
        assert made.json()["expires_at"] is not None


def test_a_file_over_the_limit_stated_or_not(
    rig: Rig, base: str, client: Anthropic, request: pytest.FixtureRequest
) -> None:
    with pytest.raises(anthropic.APIStatusError) as caught:
        client.beta.files.upload(file=("big", b"x" * (3 * MB + 1)))
    assert (caught.value.status_code, caught.value.error_code) == (413, "request_too_large")

    def chunks() -> Iterator[bytes]:
        yield FILE[:-3]
        for _ in range(64):
            yield b"x" * 65_536

    with raw(rig, base, request) as plain:
        answer = plain.post("/v1/files", content=chunks(), headers=FORM)
    assert answer.status_code == 413
    assert on_disk(rig, tenant_of(rig, request)) == []
    assert client.beta.files.upload(file=("fits", b"x" * 3 * MB)).size_bytes == 3 * MB


def test_a_tenants_quota_is_its_own(
    rig: Rig, base: str, client: Anthropic, request: pytest.FixtureRequest
) -> None:
    made = [client.beta.files.upload(file=(f"{n}", b"x" * 3 * MB)).id for n in range(2)]
    with pytest.raises(anthropic.BadRequestError) as caught:
        client.beta.files.upload(file=("over", b"x" * (2 * MB + 1)))
    assert caught.value.error_code == "storage_quota_exceeded"
    assert len(on_disk(rig, tenant_of(rig, request))) == 2
    with Anthropic(base_url=base, api_key=rig.key("quota twin").text) as other:
        assert other.beta.files.upload(file=("fine", b"x" * 3 * MB)).id
    client.beta.files.delete(made[0])
    assert client.beta.files.upload(file=("now", b"x" * (2 * MB + 1))).id


def _half(rig: Rig, base: str, request: pytest.FixtureRequest) -> socket.socket:
    host, port = base.removeprefix("http://").split(":")
    made = socket.create_connection((host, int(port)), timeout=30)
    head = (
        b"POST /v1/files HTTP/1.1\r\nhost: x\r\ncontent-type: multipart/form-data; boundary=b\r\n"
        b"content-length: 1000000\r\nx-api-key: "
        + rig.key(own_name(request)).text.encode()
        + b"\r\n\r\n"
    )
    made.sendall(head + FILE[:-3] + b"x" * 500_000)
    return made


def _settled(rig: Rig, tenant: str) -> list[Path]:
    for _ in range(400):
        if not on_disk(rig, tenant):
            break
        time.sleep(0.02)
    return on_disk(rig, tenant)


def test_half_an_upload_leaves_nothing(rig: Rig, base: str, request: pytest.FixtureRequest) -> None:
    tenant = tenant_of(rig, request)
    half = _half(rig, base, request)
    for _ in range(400):
        if on_disk(rig, tenant):
            break
        time.sleep(0.02)
    # it was under way, so that its absence means something
    assert on_disk(rig, tenant)
    half.close()
    assert _settled(rig, tenant) == []


def test_a_body_that_stops_arriving_is_a_408_and_leaves_nothing(
    rig: Rig, base: str, request: pytest.FixtureRequest
) -> None:
    with _half(rig, base, request) as half:
        answer = b"".join(iter(lambda: half.recv(65_536), b""))
    assert answer.startswith(b"HTTP/1.1 408")
    assert _settled(rig, tenant_of(rig, request)) == []


def test_an_idempotency_key_has_one_file(
    rig: Rig, client: Anthropic, request: pytest.FixtureRequest
) -> None:
    keyed = {"Idempotency-Key": "one"}
    first = client.beta.files.upload(file=("a", b"x"), extra_headers=keyed)
    again = client.beta.files.upload(file=("a", b"x"), extra_headers=keyed)
    assert first == again
    assert len(on_disk(rig, tenant_of(rig, request))) == 1
    with pytest.raises(anthropic.UnprocessableEntityError):
        client.beta.files.upload(file=("a", b"y"), extra_headers=keyed)
    assert len(on_disk(rig, tenant_of(rig, request))) == 1


@pytest.mark.parametrize("size", [10, 2 * MB])
def test_a_content_that_was_changed_on_the_disk_never_arrives_whole(
    rig: Rig, base: str, client: Anthropic, request: pytest.FixtureRequest, size: int
) -> None:
    made = client.beta.files.upload(file=("a", b"x" * size))
    (path,) = on_disk(rig, tenant_of(rig, request))
    path.write_bytes(b"y" * size)
    with raw(rig, base, request) as plain:
        try:
            answer = plain.get(f"/v1/files/{made.id}/content")
        except httpx2.RemoteProtocolError:
            assert size > MB
        else:
            assert answer.status_code == 503
            assert answer.json()["error"]["details"]["error_code"] == "file_damaged"
    path.write_bytes(b"x" * (size - 1))
    with pytest.raises(anthropic.InternalServerError) as caught:
        client.beta.files.download(made.id)
    assert caught.value.error_code == "file_damaged"


def test_a_download_has_its_time_in_all(
    rig: Rig, client: Anthropic, request: pytest.FixtureRequest
) -> None:
    """A time that is over when the second chunk goes out stands for a reader that dawdles."""
    made = client.beta.files.upload(file=("a", b"x" * 3 * MB))
    hasty = Rig(place=rig.place, settings=GatewaySettings(file_seconds=1e-6))
    with hasty.serving() as url, raw(rig, url, request) as plain:
        with pytest.raises(httpx2.RemoteProtocolError):
            plain.get(f"/v1/files/{made.id}/content")
    assert len(client.beta.files.download(made.id).read()) == 3 * MB


def test_uploads_may_be_for_mounting_only(rig: Rig) -> None:
    settings = GatewaySettings(download_uploads=False)
    with Rig(place=rig.place, settings=settings).serving() as url:
        with Anthropic(base_url=url, api_key=rig.key("mounting").text) as client:
            made = client.beta.files.upload(file=("a", b"x"))
            assert made.downloadable is False
            with pytest.raises(anthropic.BadRequestError) as caught:
                client.beta.files.download(made.id)
            assert caught.value.error_code == "file_not_downloadable"


def act(rig: Rig, work: Any) -> Any:
    """On the database of the rig, beside the gateway."""

    async def whole() -> Any:
        database = rig.place.open()
        try:
            async with database.writing() as connection:
                return await work(connection)
        finally:
            await database.close()

    return asyncio.run(whole())


def mount(rig: Rig, tenant: str, identity: str, directory: Path, path: str | None = None) -> str:
    contents = keeping(rig.state, rig.settings).contents
    row = act(rig, lambda tx: files.readable(tx, tenant, identity))
    return asyncio.run(
        files.materialise(contents, row, tenant=tenant, directory=directory, path=path)
    )


def test_a_file_is_mounted_where_the_resource_says_and_nowhere_else(
    rig: Rig, client: Anthropic, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    tenant, made = tenant_of(rig, request), client.beta.files.upload(file=("a", b"content")).id
    inside = mount(rig, tenant, made, tmp_path)
    assert inside == f"/mnt/session/uploads/{made}"
    copy = tmp_path / "uploads" / made
    assert copy.read_bytes() == b"content"
    assert copy.stat().st_mode & 0o777 == 0o444
    assert mount(rig, tenant, made, tmp_path, "/mnt/session/in/deep/data.bin")
    assert (tmp_path / "in/deep/data.bin").read_bytes() == b"content"
    before = sorted(tmp_path.rglob("*"))
    for wrong in (
        "/etc/passwd", "relative", "/mnt/session", "/mnt/session/", "/mnt/session/../x",
        "/mnt/session/a/../../x", "/mnt/session//x", "/mnt/session/a\x00b", "/mnt/session/./x",
        "/mnt/sessionx/a", "/mnt/session/outputs/x", "/mnt/session/a\nb", "/mnt/session/" + "x" * 256,
    ):  # fmt: skip
        with pytest.raises(CallerError) as caught:
            mount(rig, tenant, made, tmp_path, wrong)
        assert caught.value.code == "request-invalid"
    assert sorted(tmp_path.rglob("*")) == before


def test_a_link_that_a_session_left_leads_nowhere(
    rig: Rig, client: Anthropic, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    tenant, made = tenant_of(rig, request), client.beta.files.upload(file=("a", b"content")).id
    outside, root = tmp_path / "outside", tmp_path / "root"
    outside.mkdir()
    root.mkdir()
    (outside / "victim").write_text("mine")
    (root / "up").symlink_to(outside)
    (root / "victim").symlink_to(outside / "victim")
    (root / "taken").mkdir()
    with pytest.raises(DeniedError) as caught:
        mount(rig, tenant, made, root, "/mnt/session/up/x")
    assert caught.value.code == "path-escapes"
    with pytest.raises(DeniedError):
        mount(rig, tenant, made, root, "/mnt/session/taken")
    # a link in the file's own place is replaced, not followed
    mount(rig, tenant, made, root, "/mnt/session/victim")
    assert (outside / "victim").read_text() == "mine"
    assert sorted(path.name for path in outside.iterdir()) == ["victim"]
    assert (root / "victim").read_bytes() == b"content"
    assert not list(root.rglob("*.part"))


def test_what_is_mounted_is_the_tenants_own_and_undamaged(
    rig: Rig, client: Anthropic, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    tenant, made = tenant_of(rig, request), client.beta.files.upload(file=("a", b"content")).id
    with pytest.raises(CallerError) as caught:
        mount(rig, rig.key("rival").row.tenant_id, made, tmp_path)
    assert caught.value.code == "file-not-found"
    (path,) = on_disk(rig, tenant)
    path.write_bytes(b"CONTENT")
    with pytest.raises(UnavailableError) as damaged:
        mount(rig, tenant, made, tmp_path)
    assert damaged.value.code == "file-damaged"
    assert [one for one in tmp_path.rglob("*") if one.is_file()] == []


def test_files_of_a_session_are_weighed_together(
    rig: Rig, client: Anthropic, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    tenant = tenant_of(rig, request)
    one = client.beta.files.upload(file=("a", b"x" * 400)).id
    two = client.beta.files.upload(file=("b", b"y" * 200)).id

    def together(named: list[str], most: int) -> list[str]:
        rows = act(rig, lambda tx: files.together(tx, tenant, named, most))
        return [row.id for row in rows]

    # each time it is named it is copied
    assert together([one, two, one], 1000) == [one, two, one]
    assert together([], 1) == []
    for named in ([one, two, one], [one] * 100):
        with pytest.raises(CallerError) as caught:
            together(named, 999)
        assert caught.value.code == "request-too-large"
    with pytest.raises(CallerError) as missing:
        together([one, "file_none"], 1)
    assert missing.value.code == "file-not-found"


def test_a_session_that_names_too_much_is_refused(rig: Rig, client: Anthropic) -> None:
    """One file of 600 kB named twice is 1.2 MB on the worker's disk, more than the 1 MiB here."""
    file = client.beta.files.upload(file=("a", b"x" * 600_000)).id
    agent = client.beta.agents.create(name="a", model="m").id
    place = client.beta.environments.create(name="e").id

    def session(count: int) -> Any:
        resources: Any = [
            {"type": "file", "file_id": file, "mount_path": f"/mnt/session/{number}"}
            for number in range(count)
        ]
        return client.beta.sessions.create(agent=agent, environment_id=place, resources=resources)

    assert len(session(1).resources) == 1
    with pytest.raises(anthropic.APIStatusError, match="1200000 bytes together") as refused:
        session(2)
    assert refused.value.status_code == 413
    assert len(list(client.beta.sessions.list())) == 1


def test_a_worker_holds_the_bound_and_no_transaction(
    rig: Rig, client: Anthropic, request: pytest.FixtureRequest, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A session may be older than the bound; and a database ends what stands idle too long."""
    tenant = tenant_of(rig, request)
    small = client.beta.files.upload(file=("a", b"x" * 400)).id
    large = client.beta.files.upload(file=("c", b"z" * (MB // 2 + 1))).id
    config = SimpleNamespace(state_dir=tmp_path, gateway=rig.settings)
    open_at_copy: list[int] = []
    copy = files._copy

    def copied(*arguments: Any) -> None:
        open_at_copy.append(transactions.open)
        copy(*arguments)

    monkeypatch.setattr(files, "_copy", copied)
    transactions = _Counted()

    async def bring(named: list[str]) -> list[tuple[int, int]]:
        database, contents = rig.place.open(), keeping(rig.state, rig.settings).contents
        resources = [
            {"file_id": name, "mount_path": f"/mnt/session/{n}"} for n, name in enumerate(named)
        ]
        turn: Any = SimpleNamespace(tenant=tenant, resources=resources)
        station: Any = SimpleNamespace(config=config)
        try:
            async with AsyncExitStack() as stack:
                counted: Any = transactions.of(database)
                place = await files_of(counted, turn, contents, station, stack)
                assert place is not None
                return [(int(p.name), p.stat().st_size) for p in sorted(place.iterdir())]
        finally:
            await database.close()

    assert asyncio.run(bring([small, large, small])) == [(0, 400), (1, MB // 2 + 1), (2, 400)]
    assert open_at_copy == [0, 0, 0]
    with pytest.raises(CallerError) as brought:
        asyncio.run(bring([large, large]))
    assert brought.value.code == "request-too-large"
    assert list((tmp_path / "session-files").iterdir()) == []


class _Counted:
    """How many reading transactions of a database stand open."""

    open = 0

    def of(self, database: Database) -> Any:
        @asynccontextmanager
        async def reading() -> AsyncIterator[Any]:
            async with database.reading() as connection:
                self.open += 1
                try:
                    yield connection
                finally:
                    self.open -= 1

        return SimpleNamespace(reading=reading)


def test_an_expired_file_is_gone_and_makes_room(
    rig: Rig, client: Anthropic, request: pytest.FixtureRequest, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Time is moved in the row: nobody waits an hour."""
    from sqlalchemy import update

    from ringfence.store import file_rows
    from ringfence.store.tables import FILES

    tenant = tenant_of(rig, request)
    made = client.beta.files.upload(file=("a", b"x" * MB), expires_in_seconds=3600)
    kept = client.beta.files.upload(file=("b", b"x"))
    assert made.expires_at is not None
    assert 3590 < made.expires_at.timestamp() - time.time() < 3610
    act(rig, lambda tx: tx.execute(
        update(FILES).where(FILES.c.id == made.id).values(expires_at=1)
    ))  # fmt: skip
    with pytest.raises(anthropic.NotFoundError) as caught:
        client.beta.files.download(made.id)
    assert isinstance(caught.value, anthropic.NotFoundError)
    assert caught.value.error_code == "file_expired"
    with pytest.raises(RingfenceError):
        mount(rig, tenant, made.id, tmp_path)
    assert client.beta.files.retrieve_metadata(made.id).filename == "a"

    left = rig.state / "platform" / "files" / tenant / ".part-left"
    orphan = left.with_name("file_orphan")
    young = left.with_name("file_young")
    for path in (left, orphan, young):
        path.write_bytes(b"x")
    for path in (left, orphan, left.with_name(kept.id)):
        os.utime(path, (1, 1))

    async def tidy() -> int:
        database = rig.place.open()
        try:
            return await files.tidy(database, keeping(rig.state, rig.settings).contents)
        finally:
            await database.close()

    assert asyncio.run(tidy()) >= 3
    assert [path.name for path in on_disk(rig, tenant)] == sorted([kept.id, "file_young"])
    young.unlink()
    assert act(rig, lambda tx: file_rows.used(tx, tenant)) == 1
    assert client.beta.files.download(kept.id).read() == b"x"


def test_a_file_of_a_session_is_found_by_its_scope(
    rig: Rig, client: Anthropic, request: pytest.FixtureRequest
) -> None:
    """As a worker keeps what an agent has made."""
    tenant, keep = tenant_of(rig, request), keeping(rig.state, rig.settings)

    async def make(tx: Any) -> str:
        with keep.contents.begin(tenant) as writing:
            writing.write(b"made")
            identity = await files.put(keep.contents, tenant, writing)
        what = files.Described(filename="out", mime_type="text/plain", scope_id="sesn_1")
        digest = hashlib.sha256(b"made").hexdigest()
        await files.create(
            tx, tenant, what, identity=identity, size=4, sha256=digest, limits=keep.limits
        )
        return identity

    made = act(rig, make)
    client.beta.files.upload(file=("other", b"x"))
    (found,) = client.beta.files.list(scope_id="sesn_1")
    assert found.id == made
    assert found.scope is not None
    assert (found.scope.type, found.scope.id) == ("session", "sesn_1")
    assert client.beta.files.download(made).read() == b"made"


def test_many_uploads_at_once_are_refused(rig: Rig, base: str, request: Any) -> None:
    halves = [_half(rig, base, request) for _ in range(4)]
    try:
        for _ in range(400):
            if len(on_disk(rig, tenant_of(rig, request))) == 4:
                break
            time.sleep(0.01)
        with raw(rig, base, request) as plain:
            answer = plain.post("/v1/files", content=FILE + END, headers=FORM)
            assert answer.status_code == 429
            with caller(base, rig.key("calm").text) as other:
                assert other.post("/v1/files", content=FILE + END, headers=FORM).status_code == 200
    finally:
        for half in halves:
            half.close()
    assert _settled(rig, tenant_of(rig, request)) == []


def test_a_full_disk_is_a_503_and_leaves_nothing(
    rig: Rig, base: str, request: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error that a full disk gives; a real one would need a mount."""
    from ringfence.store import contents

    with monkeypatch.context() as patch:
        patch.setattr(contents.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "full")))
        with raw(rig, base, request) as plain:
            answer = plain.post("/v1/files", content=FILE + END, headers=FORM)
    assert answer.status_code == 503
    assert "retry-after" in answer.headers
    assert on_disk(rig, tenant_of(rig, request)) == []


def test_a_caller_is_all_that_a_rule_needs(rig: Rig) -> None:
    nobody = Caller(tenant="wrkspc_none", key_id="k", scopes=frozenset())
    with pytest.raises(CallerError):
        act(rig, lambda tx: files.retrieve(tx, nobody, "file_x"))
