"""The manifest of a snapshot: one spelling, and nothing hostile gets past its reader."""

from __future__ import annotations

import json
import os

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ringfence.errors import CallerError, UnavailableError
from ringfence.worker.snapshot import (
    LARGE_BYTES,
    PIECE_BYTES,
    Blob,
    Cutter,
    Entry,
    Manifest,
    encode,
    parse,
    parse_reference,
    reference_of,
)

SHA = "0" * 64
ONE = Manifest(
    (Entry(b"a", "d", mode=0o755), Entry(b"a/b", "f", 0o644, 5, 3), Entry(b"l", "l", target=b"/")),
    (Blob(SHA, 3),),
)


def spelled(*entries: object, blobs: object = (), **more: object) -> bytes:
    return json.dumps({"format": 1, "blobs": blobs, "entries": entries, **more}).encode()


def test_what_is_written_is_read() -> None:
    assert parse(encode(ONE)) == ONE


def test_names_that_are_no_text_survive() -> None:
    manifest = Manifest((Entry(b"\xff\xfe\n", "l", target=b"\x80"),), ())
    assert parse(encode(manifest)) == manifest


@pytest.mark.parametrize(
    "bad",
    [
        b"",
        b"[]",
        b"[" * 100_000,
        b'{"format":' + b"9" * 10_000 + b"}",
        spelled(format=2),
        spelled(format=True),
        spelled(more=1),
        spelled(["../x", "l", "t"]),
        spelled(["/etc/x", "l", "t"]),
        spelled(["a//b", "l", "t"]),
        spelled(["a/./b", "l", "t"]),
        spelled(["", "d", 493]),
        spelled(["a\0b", "l", "t"]),
        spelled(["\ud800", "l", "t"]),
        spelled(["a" * 256, "l", "t"]),
        spelled(["a", "l", "t"], ["a", "d", 493]),
        spelled(["a", "l", "/etc"], ["a/b", "l", "t"]),
        spelled(["a/b", "l", "t"]),
        spelled(["b", "l", "t"], ["a", "l", "t"]),
        spelled(["a", "l", ""]),
        spelled(["a", "d", 0o4755]),
        spelled(["a", "d", -1]),
        spelled(["a", "d", True]),
        spelled(["a", "p", 420]),
        spelled(["a", "f", 420, 0, -1]),
        spelled(["a", "f", 420, 0, 1]),
        spelled(["a", "f", 420, 0, 1.0], blobs=[[SHA, 1]]),
        spelled(["a", "f", 420, 0, 1 << 60], blobs=[[SHA, 1]]),
        spelled(blobs=[[SHA, 1]]),
        spelled(["a", "f", 420, 0, 0], blobs=[[SHA, 0]]),
        spelled(["a", "f", 420, 0, 1], blobs=[["../" + SHA[3:], 1]]),
        spelled(["a", "f", 420, 0, PIECE_BYTES + 1], blobs=[[SHA, PIECE_BYTES + 1]]),
    ],
)
def test_what_no_manifest_says_is_refused(bad: bytes) -> None:
    with pytest.raises(UnavailableError) as caught:
        parse(bad)
    assert caught.value.code == "blob-damaged"


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=5),
    max_leaves=12,
)
_ROW = st.one_of(
    _JSON,
    st.tuples(st.sampled_from(["a", "a/b", "..", "b"]), st.sampled_from("dlf"), _JSON),
    st.tuples(st.just("a"), st.just("f"), st.integers(), st.integers(), st.integers()),
)


@given(
    st.binary(max_size=200)
    | st.builds(lambda rows, blobs: spelled(*rows, blobs=blobs), st.lists(_ROW, max_size=5), _JSON)
    | st.builds(
        lambda at, byte: encode(ONE)[:at] + bytes([byte]) + encode(ONE)[at + 1 :],
        st.integers(0, len(encode(ONE))),
        st.integers(0, 255),
    )
)
@example(encode(ONE))
@settings(max_examples=150)
def test_any_bytes_are_a_safe_manifest_or_refused(data: bytes) -> None:
    try:
        manifest = parse(data)
    except UnavailableError as error:
        assert error.code == "blob-damaged"
        return
    seen = {b""}
    for entry in manifest.entries:
        assert not os.path.isabs(entry.path)
        assert os.path.normpath(entry.path) == entry.path
        assert not entry.path.startswith(b"..")
        assert entry.path.rpartition(b"/")[0] in seen
        assert entry.path not in seen
        assert 0 <= entry.mode <= 0o777
        seen |= {entry.path} if entry.kind == "d" else set()
    assert parse(encode(manifest)) == manifest


@pytest.mark.parametrize(
    "text",
    *[
        [
            "",
            "ws1",
            f"ws1.{SHA}.0",
            f"ws1.{SHA.upper()}x.1",
            f"ws1.{SHA}.1\n",
            f"ws1.{SHA}.999999999",
        ]
    ],
)
def test_what_is_no_reference(text: str) -> None:
    with pytest.raises(CallerError) as caught:
        parse_reference(text)
    assert caught.value.code == "snapshot-unknown"
    assert parse_reference(reference_of(SHA, 7)) == Blob(SHA, 7)


def cut(files: dict[bytes, bytes]) -> list[bytes]:
    kept: list[bytes] = []
    cutter = Cutter(kept.append)
    for path, data in sorted(files.items()):
        pieces = [data[at : at + PIECE_BYTES] for at in range(0, len(data), PIECE_BYTES)]
        cutter.add(path, len(data), pieces)
    cutter.finish()
    assert b"".join(kept) == b"".join(data for _, data in sorted(files.items()))
    assert [blob.size for blob in cutter.blobs] == [len(data) for data in kept]
    return kept


def test_a_change_touches_few_blobs() -> None:
    files = {b"d/%05d" % n: b"%d" % n * 50 for n in range(5000)}
    files[b"big"] = os.urandom(3 * PIECE_BYTES + 7)
    before = cut(files)
    assert 4 + 5000 / 64 < len(before) < 4 + 5000 / 16
    for change in (
        {b"d/02500": b"other"},
        {b"d/02500x": b"new"},
        {b"big": files[b"big"] + b"appended"},
        {b"large": b"x" * LARGE_BYTES},
    ):
        after = cut({**files, **change})
        assert 1 <= len(set(after) - set(before)) <= 3
    del files[b"d/02500"]
    assert len(set(cut(files)) - set(before)) <= 2
