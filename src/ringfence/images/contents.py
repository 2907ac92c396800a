"""What is installed in a tree, read from the records of dpkg, pip and npm; and as CycloneDX."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from email.parser import HeaderParser
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ringfence.images.host import read_status_versions

Packages = dict[str, dict[str, str]]
"""`apt`, `pip` and `npm`, each name to version."""


def packages_in(root: Path) -> Packages:
    """Everything that is installed, by kind, sorted by name."""
    return {
        "apt": dict(sorted(_debian(root))),
        "pip": dict(sorted(_python(root))),
        "npm": dict(sorted(_node(root))),
    }


def _debian(root: Path) -> Iterator[tuple[str, str]]:
    status = root / "var/lib/dpkg/status"
    if status.is_file():
        yield from read_status_versions(status.read_text("utf-8", "replace"))


def _python(root: Path) -> Iterator[tuple[str, str]]:
    """Of /usr/local alone: what lies in /usr/lib is a Debian package's."""
    for path in root.glob("usr/local/lib/python3*/*-packages/*.dist-info/METADATA"):
        headers = HeaderParser().parsestr(path.read_text("utf-8", "replace"), headersonly=True)
        yield headers["Name"].lower().replace("_", "-"), headers["Version"]


def _node(root: Path) -> Iterator[tuple[str, str]]:
    for path in root.glob("usr/local/lib/node_modules/**/package.json"):
        inner = path.parent.parent
        if inner.name != "node_modules" and inner.parent.name != "node_modules":
            continue  # a folder inside a package, not a package
        try:
            value = json.loads(path.read_bytes())
        except ValueError:
            continue
        if isinstance(value, dict) and {"name", "version"} <= value.keys():
            yield str(value["name"]), str(value["version"])


def cyclonedx(digest: str, manifest: dict[str, Any]) -> dict[str, Any]:
    """Bill of materials (CycloneDX 1.5, JSON) of an image. PURE: the same image, the same bytes."""
    packages: Packages = manifest["packages"]
    distribution = manifest.get("distribution", "debian")
    kinds = (("apt", f"deb/{distribution}"), ("pip", "pypi"), ("npm", "npm"))
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, digest)}",
        "version": 1,
        "metadata": {
            "component": {
                "type": "container",
                "bom-ref": digest,
                "name": "ringfence-image",
                "version": digest,
            }
        },
        "components": [
            _component(f"pkg:{purl}/{quote(name, safe='/')}@{quote(version)}", name, version)
            for kind, purl in kinds
            for name, version in packages[kind].items()
        ],
    }


def _component(purl: str, name: str, version: str) -> dict[str, str]:
    return {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}
