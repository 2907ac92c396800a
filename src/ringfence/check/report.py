"""A check as a document, and as a signed file: what was run where, when, and what it found.

The file is a C2SP signed note over one line of JSON, under the key of the audit log, but under
a name of its own: by its first line no signature of a report can pose as one of a checkpoint.
"""

from __future__ import annotations

import base64
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ringfence.check.finding import Finding, by_kind, count, exit_status
from ringfence.errors import CallerError, DeniedError
from ringfence.record.keys import encode_public, load_keys, read_keys, signed_note
from ringfence.record.verify import Key, Note, UsageError, parse_key
from ringfence.store.files import write_whole

FORMAT, ORIGIN = "ringfence check report v1", "ringfence/check"
_MAX_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Tried:
    """One isolation of a check.

    Attributes:
        available: it could start here; otherwise `why` says what to install or set.
        engine: which program makes its sandboxes, where there is more than one that could.
        start_seconds: until its first sandbox had started; None when it was not attacked.
    """

    name: str
    available: bool
    why: str = ""
    engine: str = ""
    start_seconds: float | None = None
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One whole check.

    Attributes:
        time: RFC 3339, UTC, when it began. policy: SHA-256 of the canonical policy.
    """

    time: str
    seconds: float
    policy: str
    policy_source: str
    isolations: tuple[Tried, ...]
    findings: tuple[Finding, ...]

    @property
    def status(self) -> int:
        """Exit status."""
        return exit_status(self.findings)

    def to_json(self) -> dict[str, Any]:
        """Shape of a check in JSON output and in a report."""
        return {
            "format": FORMAT,
            "time": self.time,
            "seconds": round(self.seconds, 3),
            "host": host_facts(),
            "versions": _versions(),
            "policy": {"sha256": self.policy, "source": self.policy_source},
            "isolations": [
                {
                    "name": tried.name,
                    "available": tried.available,
                    "why": tried.why,
                    "engine": tried.engine,
                    "start_seconds": tried.start_seconds,
                    "seconds": round(tried.seconds, 3),
                }
                for tried in self.isolations
            ],
            "outcomes": count(self.findings),
            "outcomes_by_kind": by_kind(self.findings),
            "exit_status": self.status,
            "findings": [finding.to_json() for finding in self.findings],
        }


def host_facts() -> dict[str, Any]:
    """What a result holds for: another kernel, another result."""
    facts = platform.uname()
    return {
        "name": facts.node,
        "system": facts.system,
        "kernel": f"{facts.release} {facts.version}",
        "machine": facts.machine,
        "machine_id": _machine_id(),
        "distribution": _distribution(),
        "euid": os.geteuid(),
        "cpus": os.cpu_count(),
    }


def _machine_id() -> str:
    try:
        return Path("/etc/machine-id").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


def _distribution() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", "")
    except OSError:
        return ""


def _versions() -> Mapping[str, str]:
    from ringfence import __version__
    from ringfence.check.versions import data

    python = ".".join(str(part) for part in sys.version_info[:3])
    return {"ringfence": __version__, "python": python, "holes_of": str(data()["date"])}


def sign(result: Result, audit_directory: Path) -> tuple[str, str]:
    """The text of a report file, and the public key that it verifies with.

    Raises:
        UnavailableError: `audit-key-refused`.
    """
    audit_directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    keys = load_keys(audit_directory)
    line = json.dumps(result.to_json(), separators=(",", ":"), sort_keys=True)
    return signed_note(f"{ORIGIN}\n{line}\n", keys, name=ORIGIN), encode_public(keys.public)


def write(path: Path, text: str) -> None:
    """Put the report in place, whole.

    Raises:
        CallerError: `report-refused` when it cannot be written.
    """
    try:
        write_whole(path, text.encode())
    except OSError as error:
        raise CallerError("report-refused", f"{path} cannot be written: {error.strerror}") from None


def own_keys(audit_directory: Path) -> list[str]:
    """Public keys of this state directory's log; empty when there is none.

    Raises:
        UnavailableError: `audit-key-refused`.
    """
    keys = read_keys(audit_directory / "key")
    return [encode_public(keys.public)] if keys is not None else []


def verify(data: bytes, keys: Sequence[str]) -> dict[str, Any]:
    """The document of a report that one of the keys signed.

    Raises:
        CallerError: `report-invalid` for what is no report, or no key.
        DeniedError: `report-forged` when none of the keys signed exactly these bytes.
    """
    note, line = _parse(data)
    if not any(note.signed_by(key) for key in map(_key, keys)):
        raise DeniedError(
            "report-forged",
            "none of the given keys signed this report, or it was changed since",
            hint="name the public key of the host that made it: --public-key FILE",
        )
    document = json.loads(line)
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise CallerError("report-invalid", "the signed text is no report of a check")
    return document


def _parse(data: bytes) -> tuple[Note, str]:
    refusal = CallerError("report-invalid", "this is no report of `ringfence check --report`")
    if len(data) > _MAX_BYTES:
        raise refusal
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise refusal from None
    body, separator, tail = text.rpartition("\n\n")
    lines = body.split("\n")
    if not separator or len(lines) != 2 or lines[0] != ORIGIN or not tail.endswith("\n"):
        raise refusal
    return Note(body + "\n", 0, b"", tuple(_signatures(tail, refusal))), lines[1]


def _signatures(tail: str, refusal: CallerError) -> list[tuple[str, bytes]]:
    found = []
    for line in tail.removesuffix("\n").split("\n"):
        dash, _, rest = line.partition(" ")
        name, _, encoded = rest.partition(" ")
        try:
            raw = base64.b64decode(encoded, validate=True)
        except ValueError:
            raise refusal from None
        # the bits that base64 leaves unused must be what they would be: no byte may be free
        if dash != "\u2014" or not name or base64.b64encode(raw).decode() != encoded:
            raise refusal
        found.append((name, raw))
    return found


def _key(text: str) -> Key:
    """The log's key under the name of reports."""
    try:
        return Key(ORIGIN, parse_key(text).material)
    except UsageError as error:
        raise CallerError("report-invalid", str(error)) from None
