"""The guest's kernel and first file system, from what the distribution ships: no registry.

The kernel is Debian's cloud kernel, unpacked beside the system or installed in it; the initramfs
holds this host's own interpreter, `ringfence.inside`, and the modules that a virtual machine needs.
Both are kept below the state directory, named by the hash of their content.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import os
import secrets
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ringfence.inside
from ringfence.errors import UnavailableError

PLACES = (Path("/var/cache/ringfence/microvm"), Path("/"))
"""Where `boot/` and `lib/modules/` of the cloud kernel's package are looked for."""
_HINT = (
    "mkdir -p /var/cache/ringfence/microvm; cd /var/cache/ringfence/microvm; apt-get download "
    "$(apt-cache depends linux-image-cloud-amd64 | awk '/Depends/ {print $2; exit}'); "
    "dpkg -x linux-image-*.deb ."
)
_MODULES = (
    *("virtio_ring", "virtio", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci"),
    *("virtio_console", "fuse", "virtiofs", "overlay"),
)
"""In the order in which they are loaded: each after what it needs."""
_IMPORTS = (
    *("__future__", "ctypes", "errno", "fcntl", "json", "os", "resource", "select", "signal"),
    *("socket", "stat", "struct", "time", "warnings", "encodings.utf_8"),
)
_FILES = (
    "\nimport json, sys\nsys.stdout.write(json.dumps([[m.__file__ for m in sys.modules.values() "
    "if getattr(m, '__file__', None)], open('/proc/self/maps').read()]))"
)
_LOADER = "lib64/ld-linux-x86-64.so.2"


@dataclass(frozen=True, slots=True)
class Image:
    """What a machine boots. `digest` is over the content of both."""

    kernel: Path
    initramfs: Path
    digest: str


def build(directory: Path) -> Image:
    """Make what is missing. Takes a second the first time.

    Raises:
        UnavailableError: `isolation-unavailable`; `state-refused` for a directory that others can
            write, because what lies there is run.
    """
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    status = directory.stat()
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise UnavailableError(
            "state-refused",
            f"others can write {directory}, and what lies there is what guests run",
            hint="set RINGFENCE_MACHINES to a directory of your own with mode 0700, or leave it",
        )
    packed, modules = _kernel_package()
    kernel = directory / f"vmlinux-{_digest(packed.read_bytes())[:24]}"
    if not kernel.exists():
        _keep(kernel, vmlinux(packed.read_bytes()))
    archive = initramfs(modules)
    first = directory / f"initramfs-{_digest(archive)[:24]}"
    if not first.exists():
        _keep(first, archive)
    return Image(kernel, first, _digest(kernel.read_bytes() + archive))


def check_kernel() -> None:
    """Raise UnavailableError `isolation-unavailable` where the guest's kernel is not here."""
    _kernel_package()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _keep(path: Path, data: bytes) -> None:
    """Whole or not at all. Readable: the machine's own uid opens it through a mount of it."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(6)}.part")
    try:
        temporary.write_bytes(data)
        temporary.chmod(0o444)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _kernel_package() -> tuple[Path, Path]:
    for place in PLACES:
        for kernel in sorted(place.glob("boot/vmlinuz-*-cloud-amd64"), reverse=True):
            modules = place / "lib/modules" / kernel.name.removeprefix("vmlinuz-")
            if modules.is_dir():
                return kernel, modules
    raise UnavailableError(
        "isolation-unavailable", "the guest's kernel is not here", hint=f"as root: {_HINT}"
    )


def vmlinux(packed: bytes) -> bytes:
    """The kernel proper out of a bzImage (Documentation/arch/x86/boot.rst): to unpack itself takes
    it longer under emulation than all the rest of its start.

    Raises:
        UnavailableError: `isolation-unavailable` for a form that nothing here unpacks.
    """
    sectors = packed[0x1F1]
    offset, length = struct.unpack_from("<II", packed, 0x248)
    start = (sectors + 1) * 512 + offset
    payload = packed[start : start + length]
    if payload[:2] == b"\x1f\x8b":
        data = gzip.decompress(payload[:-4])
    elif payload[:6] == b"\xfd7zXZ\0":
        data = lzma.decompress(payload[:-4])
    elif payload[:4] == b"\x02\x21\x4c\x18":
        data = _filter("lz4", ["-dc"], payload[:-4])
    elif payload[:4] == b"\x28\xb5\x2f\xfd":
        data = _filter("zstd", ["-dc"], payload[:-4])
    else:
        data = b""
    if data[:4] != b"\x7fELF":
        raise UnavailableError("isolation-unavailable", "the guest's kernel cannot be unpacked")
    return data


def _filter(tool: str, options: list[str], data: bytes) -> bytes:
    if shutil.which(tool) is None:
        raise UnavailableError(
            "isolation-unavailable",
            f"{tool} is missing, and the guest's kernel is packed with it",
            hint=f"apt-get install {tool}",
        )
    return subprocess.run([tool, *options], input=data, capture_output=True, check=False).stdout


def initramfs(modules: Path) -> bytes:
    """A cpio archive, the same for the same content."""
    files = dict(interpreter(f"import {', '.join(_IMPORTS)}"))
    order = []
    for name in _MODULES:
        data = _module(modules, name)
        files[f"modules/{name}.ko"] = (data, 0o444)
        order.append(f"{name}.ko")
    files["modules/order"] = ("\n".join(order).encode(), 0o444)
    inside = Path(ringfence.inside.__file__).parent
    files["mux.py"] = ((inside / "mux.py").read_bytes(), 0o444)
    start = f"#!{os.path.realpath(sys.executable)} -IS\n".encode()
    files["init"] = (start + (inside / "guest.py").read_bytes(), 0o555)
    return archive(files)


def _module(modules: Path, name: str) -> bytes:
    for path in modules.rglob(f"{name}.ko*"):
        data = path.read_bytes()
        return lzma.decompress(data) if path.suffix == ".xz" else data
    raise UnavailableError("isolation-unavailable", f"the guest's kernel has no module {name}")


def interpreter(statement: str) -> Iterator[tuple[str, tuple[bytes, int]]]:
    """This interpreter, what it maps, and the modules that a statement imports: asked of itself.
    Path without its first slash, content, mode.
    """
    python = os.path.realpath(sys.executable)
    done = subprocess.run(
        [python, "-IS", "-c", statement + _FILES],
        capture_output=True,
        text=True,
        check=True,
        env={},
    )
    sources, maps = json.loads(done.stdout)
    mapped = {line.split(None, 5)[5] for line in maps.splitlines() if line.count("/") > 1}
    for path in sorted({python, *sources, *(one for one in mapped if ".so" in one)}):
        data = Path(path).read_bytes()
        yield path.lstrip("/"), (data, 0o555)
        if "/ld-linux" in path:
            yield _LOADER, (data, 0o555)
        elif "/python" not in path and ".so" in path:
            # a program names its libraries by links to them, which the loader looks for in its
            # own directories
            stem = Path(path).name.split(".so")[0]
            for link in sorted(Path(path).parent.glob(f"{stem}.so*")):
                if os.path.realpath(link) == path:
                    yield f"usr/lib/x86_64-linux-gnu/{link.name}", (data, 0o555)


def archive(files: dict[str, tuple[bytes, int]]) -> bytes:
    """The `newc` form of cpio (Documentation/driver-api/early-userspace/buffer-format.rst)."""
    directories = {str(parent) for name in files for parent in Path(name).parents} - {"."}
    entries = [(name, 0o040755, b"") for name in directories]
    entries += [(name, 0o100000 | mode, data) for name, (data, mode) in files.items()]
    out = bytearray()
    for number, (name, mode, data) in enumerate(sorted(entries), 1):
        out += _entry(number, name, mode, data)
    out += _entry(0, "TRAILER!!!", 0, b"")
    return bytes(out)


def _entry(number: int, name: str, mode: int, data: bytes) -> bytes:
    label = name.encode() + b"\0"
    fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(label), 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + label
    head += bytes(-len(head) % 4)
    return head + data + bytes(-len(data) % 4)
