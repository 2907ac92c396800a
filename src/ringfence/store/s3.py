"""Objects in an S3 bucket, with conditional writes (If-Match, If-None-Match).

Made by obstore: one wheel without dependencies, where the vendor's client is 32 MB. Its retries
can repeat a conditional write that was carried out and whose answer was lost; the repetition is
then refused. Who uses a condition must read what is there and know its own again.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any, cast
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError
from obstore.store import S3Store

from ringfence.config import S3Settings
from ringfence.errors import CallerError, UnavailableError
from ringfence.store.blobs import Stored

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_PREFIX = re.compile(r"(?:[A-Za-z0-9_-][A-Za-z0-9._-]*(?:/[A-Za-z0-9_-][A-Za-z0-9._-]*)*)?")
_TIMEOUT = timedelta(seconds=20)
_BATCH = 1000
"""Keys of one DeleteObjects (S3 API reference)."""


class ConflictError(Exception):
    """Another write was there first; nothing was changed."""


class S3Objects:
    """See `store.blobs.Objects`, which it is, and conditions on top."""

    def __init__(self, url: str, settings: S3Settings) -> None:
        bucket, prefix = parse_url(url)
        config: dict[str, Any] = {"region": settings.region, "conditional_put": "etag"}
        if settings.endpoint is not None:
            config["endpoint"] = settings.endpoint
        if settings.access_key_id is not None and settings.secret_access_key is not None:
            config["access_key_id"] = settings.access_key_id
            config["secret_access_key"] = settings.secret_access_key.get_secret_value()
        self._store = S3Store(
            bucket,
            prefix=prefix or None,
            config=cast("Any", config),
            client_options={
                "timeout": _TIMEOUT,
                "connect_timeout": timedelta(seconds=5),
                "allow_http": (settings.endpoint or "").startswith("http://"),
            },
            retry_config={"max_retries": 4, "retry_timeout": _TIMEOUT},
        )

    def get(self, key: str, limit: int) -> bytes:
        """See Objects."""
        return self.read(key, limit)[0]

    def read(self, key: str, limit: int) -> tuple[bytes, str]:
        """An object and its entity tag. Raises FileNotFoundError, `blob-damaged`."""
        with _faults():
            found = obstore.get(self._store, key)
            if found.meta["size"] > limit:
                raise UnavailableError("blob-damaged", f"a stored object is too large: {key}")
            return bytes(found.bytes()), found.meta["e_tag"] or ""

    def put(self, key: str, data: bytes) -> None:
        """See Objects."""
        with _faults(), _no_bucket():
            obstore.put(self._store, key, data, use_multipart=False)

    def swap(self, key: str, data: bytes, *, tag: str | None) -> str:
        """Write where the object still has this entity tag; None: where there is none. Returns
        the new tag.

        Raises:
            ConflictError: it has not.
        """
        mode: Any = "create" if tag is None else {"e_tag": tag}
        # If-Match where there is nothing is 404 with some servers, 412 with others
        absent = contextlib.nullcontext() if tag is not None else _no_bucket()
        try:
            with _faults(), absent:
                done = obstore.put(self._store, key, data, mode=mode, use_multipart=False)
                return done["e_tag"] or ""
        except (AlreadyExistsError, PreconditionError, FileNotFoundError):
            raise ConflictError from None

    def find(self, key: str) -> Stored | None:
        """See Objects."""
        try:
            with _faults():
                return _stored(obstore.head(self._store, key))
        except FileNotFoundError:
            return None

    def list(self, prefix: str) -> Iterator[Stored]:
        """See Objects."""
        with _faults(), _no_bucket():
            for page in obstore.list(self._store, prefix):
                yield from map(_stored, page)

    def delete(self, keys: Iterable[str]) -> None:
        """See Objects."""
        for batch in _batches(keys):
            with _faults(), contextlib.suppress(FileNotFoundError):
                obstore.delete(self._store, batch)


def parse_url(url: str) -> tuple[str, str]:
    """Bucket and prefix of `s3://bucket/prefix`. Raises CallerError `settings-invalid`."""
    parts = urlsplit(url)
    prefix = parts.path.strip("/")
    if (
        parts.scheme != "s3"
        or not _BUCKET.fullmatch(parts.netloc)
        or not _PREFIX.fullmatch(prefix)
        or parts.query
        or parts.fragment
    ):
        raise CallerError(
            "settings-invalid",
            "a bucket is not written as it should be",
            hint="write s3://bucket/prefix; keys belong into RINGFENCE_S3__…",
        )
    return parts.netloc, prefix


def _batches(keys: Iterable[str]) -> Iterator[list[str]]:
    rest = iter(keys)
    while batch := list(itertools.islice(rest, _BATCH)):
        yield batch


def _stored(meta: Any) -> Stored:
    return Stored(key=meta["path"], size=meta["size"], modified=meta["last_modified"].timestamp())


@contextlib.contextmanager
def _no_bucket() -> Iterator[None]:
    """What is made needs nothing but the bucket."""
    try:
        yield
    except FileNotFoundError as error:
        raise _away(error) from error


@contextlib.contextmanager
def _faults() -> Iterator[None]:
    """What the server is, not what was asked. Messages hold addresses and no credentials."""
    try:
        yield
    except (FileNotFoundError, AlreadyExistsError, PreconditionError):
        raise
    except (BaseError, OSError) as error:
        raise _away(error) from error


def _away(error: Exception) -> UnavailableError:
    return UnavailableError(
        "store-unavailable",
        f"the bucket does not answer ({type(error).__name__})",
        hint="see RINGFENCE_S3__ENDPOINT, the keys' rights, and that the bucket exists",
    )
