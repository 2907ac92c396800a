"""S3SessionStore against the contract of session stores, on an S3 endpoint; and S3 as blob store."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ringfence.errors import CallerError, UnavailableError
from ringfence.record import sessions_s3
from ringfence.record.sessions_s3 import S3SessionStore
from ringfence.store.blobs import BlobStore
from ringfence.store.s3 import ConflictError, S3Objects
from ringfence.testing.session_store_contract import KEY, SID, SessionStoreContract, entry
from ringfence.worker.workspaces import WorkspaceStore
from session_places import opening, s3


@pytest.fixture(scope="module")
def bucket() -> Iterator[Any]:
    pytest.importorskip("moto.server")
    with s3() as bucket:
        yield bucket


class TestS3SessionStore(SessionStoreContract):
    @pytest.fixture
    def opened(self, bucket: Any) -> Iterator[Any]:
        with opening(lambda limits: S3SessionStore(*bucket, limits)) as opened:
            yield opened


def test_what_is_no_bucket(bucket: Any) -> None:
    for url in ("s3://", "s3://UPPER", "s3://bucket/../x", "http://bucket", "s3://user:p@bucket"):
        with pytest.raises(CallerError) as caught:
            S3SessionStore(url, bucket[1])
        assert caught.value.code == "settings-invalid"
        assert "p@" not in caught.value.message


def keys(bucket: Any, prefix: str) -> list[str]:
    return [stored.key for stored in S3Objects(*bucket).list(prefix)]


def test_few_chunks_and_no_rest(bucket: Any) -> None:
    store = S3SessionStore(*bucket)
    view = store.for_tenant("chunks")
    for number in range(30):
        view.add(KEY, [entry(number)])
    assert len(keys(bucket, "entries/chunks/")) == 1
    assert keys(bucket, "probes/") == []
    view.remove(SID)
    assert keys(bucket, "entries/chunks/") == []
    store.close()


def test_a_write_whose_answer_was_lost_is_known_again(
    bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client repeats it, and is refused by its own first try."""
    store, lost = S3SessionStore(*bucket), []
    real = S3Objects.swap

    def lossy(self: S3Objects, key: str, data: bytes, *, tag: str | None) -> str:
        done = real(self, key, data, tag=tag)
        if key.startswith("sessions/") and not lost:
            lost.append(key)
            return real(self, key, data, tag=tag)
        return done

    monkeypatch.setattr(S3Objects, "swap", lossy)
    view = store.for_tenant("lossy")
    view.add(KEY, [{"type": "no uuid"}])
    assert lost
    view.add(KEY, [{"type": "again"}])
    assert asyncio.run(view.load(KEY)) == [{"type": "no uuid"}, {"type": "again"}]
    store.close()


def test_what_no_head_came_to_name_is_swept_when_it_is_old(
    bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = S3SessionStore(*bucket)
    view = store.for_tenant("swept")
    view.add(KEY, [entry(1)])
    orphan = f"entries/swept/{KEY['project_key']}/{SID}/{'0' * 32}"
    S3Objects(*bucket).put(orphan, b"x")
    view.lease(SID, "run_1").release()
    assert len(keys(bucket, "entries/swept/")) == 2
    monkeypatch.setattr(sessions_s3, "_ORPHAN_SECONDS", -60.0)
    view.lease(SID, "run_1").release()
    assert len(keys(bucket, "entries/swept/")) == 1
    assert asyncio.run(view.load(KEY)) == [entry(1)]
    store.close()


@pytest.mark.parametrize("how", ["missing", "other", "cut", "head"])
def test_damage_is_an_error(bucket: Any, how: str) -> None:
    store, objects = S3SessionStore(*bucket), S3Objects(*bucket)
    view = store.for_tenant(f"damaged-{how}")
    view.add(KEY, [entry(1)])
    (chunk,) = keys(bucket, f"entries/damaged-{how}/")
    (head,) = keys(bucket, f"sessions/damaged-{how}/")
    if how == "missing":
        objects.delete([chunk])
    elif how == "other":
        objects.put(chunk, b"x")
    elif how == "cut":
        objects.put(chunk, objects.get(chunk, 1 << 20)[:-3])
    else:
        objects.put(head, objects.get(head, 1 << 20)[:-3])
    fresh = S3SessionStore(*bucket)
    for act in (
        lambda: asyncio.run(fresh.for_tenant(f"damaged-{how}").load(KEY)),
        lambda: fresh.for_tenant(f"damaged-{how}").add(KEY, [entry(2)]),
    ):
        with pytest.raises(UnavailableError) as caught:
            act()
        assert caught.value.code == ("blob-missing" if how == "missing" else "blob-damaged")
    fresh.close()
    store.close()


def test_a_store_without_conditions_is_refused(
    bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def careless(self: S3Objects, key: str, data: bytes, *, tag: str | None) -> str:
        self.put(key, data)
        return '"tag"'

    monkeypatch.setattr(S3Objects, "swap", careless)
    with pytest.raises(UnavailableError, match="conditions"):
        S3SessionStore(*bucket)


def test_a_bucket_that_is_not_there(bucket: Any) -> None:
    with pytest.raises(UnavailableError) as caught:
        S3SessionStore("s3://another", bucket[1])
    assert caught.value.code == "store-unavailable"


def test_conditions_hold(bucket: Any) -> None:
    objects = S3Objects(*bucket)
    first = objects.swap("conditions", b"1", tag=None)
    second = objects.swap("conditions", b"2", tag=first)
    for tag in (None, first):
        with pytest.raises(ConflictError):
            objects.swap("conditions", b"3", tag=tag)
    with pytest.raises(ConflictError):
        objects.swap("conditions-nowhere", b"3", tag=first)
    assert objects.read("conditions", 9) == (b"2", second)


def test_workspaces_in_a_bucket(bucket: Any, tmp_path: Path) -> None:
    whose = {"tenant": "tenant_a", "session": "sess_1"}
    objects = S3Objects(*bucket)
    store = WorkspaceStore(BlobStore(objects))
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "big").write_bytes(bytes(range(256)) * (5 << 12))
    (tree / "small").write_bytes(b"x")
    reference = asyncio.run(store.save(tree, **whose))
    assert asyncio.run(store.save(tree, **whose)) == reference
    asyncio.run(store.restore(reference, tmp_path / "again", **whose))
    for name in ("big", "small"):
        assert (tmp_path / "again" / name).read_bytes() == (tree / name).read_bytes()
    with pytest.raises(CallerError):
        asyncio.run(store.restore(reference, tmp_path / "b", tenant="tenant_b", session="s"))
    assert asyncio.run(store.collect("tenant_a", [reference], grace_seconds=-5)) == 0
    assert asyncio.run(store.collect("tenant_a", [], grace_seconds=-5)) >= 3
    assert keys(bucket, "blobs/") == []
