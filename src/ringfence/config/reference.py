"""References: where the value of a credential lies, as the operator's settings write it. PURE.

A policy names a credential, never a reference: whoever can edit a policy or a workspace must not be
able to point at another secret of the organisation.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

FORMS = {
    "sealed": "sealed://NAME",
    "keyring": "keyring://SERVICE/USER",
    "vault": "vault://MOUNT/PATH#FIELD",
    "vault-lease": "vault-lease://MOUNT/PATH#FIELD",
    "aws-sm": "aws-sm://NAME or aws-sm://NAME#FIELD",
    "gcp-sm": "gcp-sm://PROJECT/NAME, with /VERSION and #FIELD where they are needed",
    "file": "file:///PATH",
    "credential": "credential://NAME",
}
"""What may be written, by scheme: `vault-lease` is a dynamic secret, `credential` a file of
systemd's $CREDENTIALS_DIRECTORY."""

SERVICES = {"vault": "vault", "vault-lease": "vault", "aws-sm": "aws", "gcp-sm": "gcp"}
"""Schemes of which a section of the settings says where the service is."""

_FIELDED, _FIELD_NEEDED = {"vault", "vault-lease", "aws-sm", "gcp-sm"}, {"vault", "vault-lease"}
# nothing that a URL would need to encode, so that a path is one in every spelling
_PATH = re.compile(r"[A-Za-z0-9_.@:+=-]+(?:/[A-Za-z0-9_.@:+=-]+)*\Z")
_FIELD = re.compile(r"[A-Za-z0-9_.-]{1,128}\Z")


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """One place. path: without a slash at its ends, but for files, where it is absolute; field: of
    a value that is an object; empty takes the value whole.
    """

    scheme: str
    path: str
    field: str = ""

    def __str__(self) -> str:
        """As it was written."""
        return f"{self.scheme}://{self.path}" + (f"#{self.field}" if self.field else "")


def parse(text: str) -> Reference:
    """Read one. Raises ValueError that says what to write."""
    scheme, found, rest = text.partition("://")
    if not found or scheme not in FORMS:
        raise ValueError(f"write one of {', '.join(name + '://' for name in FORMS)}")
    path, hashed, field = rest.partition("#")
    form = f"write {FORMS[scheme]}"
    if hashed and (scheme not in _FIELDED or not _FIELD.match(field)):
        raise ValueError(form)
    if scheme in _FIELD_NEEDED and not field:
        raise ValueError(form)
    if not _PATH.match(path.removeprefix("/") if scheme == "file" else path) or len(path) > 1024:
        raise ValueError(f"{form}, of letters, digits and . _ @ : + = - /")
    parts = path.split("/")
    if any(part in {".", ".."} for part in parts) or not _fits(scheme, parts):
        raise ValueError(form)
    return Reference(scheme=scheme, path=path, field=field)


def _fits(scheme: str, parts: list[str]) -> bool:
    if scheme == "file":
        return parts[0] == ""
    if scheme in {"sealed", "credential"}:
        return len(parts) == 1
    if scheme == "gcp-sm":
        return len(parts) in {2, 3}
    if scheme == "keyring":
        return len(parts) == 2
    return len(parts) >= 2 if scheme in _FIELD_NEEDED else True
