"""An image as one tar stream that podman and docker take: `tar`, `docker-archive`, `oci`.

Written from the manifest, not from the disk: the same image gives the same bytes, whoever built or
exports it. A layer's digest stands before the layer, so that the tree is read twice, the first time
into a hash; a file that changed in between is refused.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, cast

from ringfence.errors import UnavailableError
from ringfence.images.image import Image
from ringfence.images.tree import AGENT, EPOCH, Entry, parse

PATH = "/opt/ringfence/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_CREATED = "2000-01-01T00:00:00Z"
_TYPES = {"d": tarfile.DIRTYPE, "f": tarfile.REGTYPE, "l": tarfile.SYMTYPE}
_LAYER = "application/vnd.oci.image.layer.v1.tar"
_CONFIG = "application/vnd.oci.image.config.v1+json"
_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_BLOCK = 1 << 20


class Sink(Protocol):
    """What a tar is written to; a pipe is one."""

    def write(self, data: bytes, /) -> object:
        """Take all of it."""
        ...


class _Measure:
    """A sink that keeps size and hash, and passes on to another."""

    def __init__(self, onward: Sink | None = None) -> None:
        self.size = 0
        self._hash = hashlib.sha256()
        self._onward = onward

    def write(self, data: bytes) -> int:
        self.size += len(data)
        self._hash.update(data)
        if self._onward is not None:
            self._onward.write(data)
        return len(data)

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()


class _Checked(io.RawIOBase):
    """A file of the tree that must be what the manifest says, judged when it has been read."""

    def __init__(self, path: Path, entry: Entry) -> None:
        super().__init__()
        self._file = path.open("rb")
        self._entry = entry
        self._hash = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._hash.update(data)
        return data

    def close(self) -> None:
        self._file.close()
        super().close()

    def judge(self) -> None:
        """Raise `image-damaged` unless all of the manifest's bytes went by, and no others."""
        if self._hash.hexdigest() != self._entry.content:
            raise UnavailableError(
                "image-damaged",
                f"/{self._entry.path} is not what the manifest says",
                hint="ringfence image build --rebuild",
            )


def write_tar(image: Image, sink: Sink) -> None:
    """The root file system as one tar, owners as inside: for `podman import`, and for a layer.

    Raises:
        UnavailableError: `image-damaged`.
    """
    entries = parse(image.entries_file.read_bytes())
    with _stream(sink) as tar:
        for entry in entries:
            _add_entry(tar, image.rootfs, entry)


def _stream(sink: Sink) -> tarfile.TarFile:
    # a cast: its stub asks for more than the write that a stream uses
    file = cast("IO[bytes]", sink)
    return tarfile.open(mode="w|", fileobj=file, format=tarfile.PAX_FORMAT, bufsize=_BLOCK)


def _add_entry(tar: tarfile.TarFile, root: Path, entry: Entry) -> None:
    info = _info(entry.path, size=entry.size, mode=entry.mode, kind=_TYPES[entry.kind])
    info.uid, info.gid = entry.uid, entry.gid
    if entry.kind == "l":
        info.linkname = entry.content
    if entry.kind != "f":
        tar.addfile(info)
        return
    try:
        with _Checked(root / entry.path, entry) as file:
            tar.addfile(info, file)
            file.judge()
    except OSError as error:
        raise UnavailableError("image-damaged", f"/{entry.path} cannot be read: {error}") from None


def _info(
    name: str, *, size: int = 0, mode: int = 0o644, kind: bytes = tarfile.REGTYPE
) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime, info.type = size, mode, EPOCH, kind
    return info


@dataclass(frozen=True, kw_only=True, slots=True)
class _Blob:
    """A file of an archive: bytes, or what writes them when they are many."""

    name: str
    size: int
    write: Callable[[Sink], None]


def _small(name: str, content: bytes) -> _Blob:
    def write(sink: Sink) -> None:
        sink.write(content)

    return _Blob(name=name, size=len(content), write=write)


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), sort_keys=True).encode()


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def measure(image: Image) -> tuple[str, int]:
    """Hex SHA-256 and size of the layer. Raises as `write_tar` does."""
    sink = _Measure()
    write_tar(image, sink)
    return sink.digest, sink.size


def config_of(image: Image, layer: str) -> bytes:
    """OCI image configuration; docker reads the same."""
    return _json(
        {
            "architecture": image.manifest["architecture"],
            "os": "linux",
            "created": _CREATED,
            "config": {
                "User": f"{AGENT}:{AGENT}",
                "WorkingDir": "/workspace",
                "Env": [f"PATH={PATH}", "LANG=C.UTF-8", "HOME=/home/agent"],
                "Cmd": ["/bin/bash"],
                "Labels": {"ringfence.image.digest": image.digest},
            },
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{layer}"]},
            "history": [{"created": _CREATED, "created_by": "ringfence image build"}],
        }
    )


def write_docker_archive(image: Image, tag: str, sink: Sink) -> None:
    """What `docker load` and `podman load` take. Raises as `write_tar` does."""
    layer, size = measure(image)
    config = config_of(image, layer)
    manifest = [{"Config": f"{_sha(config)}.json", "RepoTags": [tag], "Layers": [f"{layer}.tar"]}]
    blobs = [
        _small("manifest.json", _json(manifest)),
        _small(f"{_sha(config)}.json", config),
        _layer(image, f"{layer}.tar", layer, size),
    ]
    _write(blobs, sink)


def write_oci_archive(image: Image, tag: str, sink: Sink) -> None:
    """An OCI layout in a tar, which `podman load` and `skopeo` take. Raises as `write_tar` does."""
    layer, size = measure(image)
    config = config_of(image, layer)
    manifest = _json(
        {
            "schemaVersion": 2,
            "mediaType": _MANIFEST,
            "config": _descriptor(_CONFIG, _sha(config), len(config)),
            "layers": [_descriptor(_LAYER, layer, size)],
        }
    )
    index = {
        "schemaVersion": 2,
        "manifests": [
            {
                **_descriptor(_MANIFEST, _sha(manifest), len(manifest)),
                "annotations": {"org.opencontainers.image.ref.name": tag},
            }
        ],
    }
    blobs = [
        _small("oci-layout", _json({"imageLayoutVersion": "1.0.0"})),
        _small("index.json", _json(index)),
        _small(f"blobs/sha256/{_sha(manifest)}", manifest),
        _small(f"blobs/sha256/{_sha(config)}", config),
        _layer(image, f"blobs/sha256/{layer}", layer, size),
    ]
    _write(blobs, sink)


def _descriptor(kind: str, digest: str, size: int) -> dict[str, object]:
    return {"mediaType": kind, "digest": f"sha256:{digest}", "size": size}


def _layer(image: Image, name: str, digest: str, size: int) -> _Blob:
    def write(sink: Sink) -> None:
        measured = _Measure(sink)
        write_tar(image, measured)
        if (measured.digest, measured.size) != (digest, size):
            raise UnavailableError("image-damaged", "the image changed while it was written")

    return _Blob(name=name, size=size, write=write)


def _write(blobs: Sequence[_Blob], sink: Sink) -> None:
    """A tar of blobs that stream: tarfile only takes what it can read from."""
    total = 0
    for blob in blobs:
        header = _info(blob.name, size=blob.size).tobuf(tarfile.PAX_FORMAT)
        sink.write(header)
        blob.write(sink)
        padding = -blob.size % tarfile.BLOCKSIZE
        sink.write(b"\0" * padding)
        total += len(header) + blob.size + padding
    end = 2 * tarfile.BLOCKSIZE
    sink.write(b"\0" * (end + -(total + end) % tarfile.RECORDSIZE))


WRITERS: dict[str, Callable[[Image, str, IO[bytes]], None]] = {
    "tar": lambda image, _tag, sink: write_tar(image, sink),
    "docker-archive": write_docker_archive,
    "oci": write_oci_archive,
}
"""Form to what writes it."""
