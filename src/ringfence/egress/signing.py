"""Signature version 4, by botocore: the one library of AWS that runs where sandboxes are served.

It signs with what the keeper gave, and asks nobody: credentials are found, roles assumed and tokens
had in the keeper. Loaded only where a provider is on Bedrock (20 MB, a sixth of a second), and
before ids are dropped, since its files may then be out of reach.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

Lines = Sequence[tuple[bytes, bytes]]
SERVICE = "bedrock"


def sign(
    url: str, headers: Lines, body: bytes, region: str, fields: Mapping[str, str]
) -> tuple[tuple[bytes, bytes], ...]:
    """The lines to add to a POST, whose `host` and content type are signed with its body.

    `fields`: `key`, `secret` and, of a session, `token`.
    """
    signed = {"content-type", "host"}
    request = AWSRequest(
        method="POST",
        url=url,
        data=body,
        headers={n.decode(): v.decode("latin-1") for n, v in headers if n.decode() in signed},
    )
    who = Credentials(fields["key"], fields["secret"], fields.get("token") or None)
    SigV4Auth(who, SERVICE, region).add_auth(request)
    return tuple(
        (name.lower().encode(), str(value).encode())
        for name, value in request.headers.items()
        if name.lower() not in signed
    )


def warm() -> None:
    """Sign once: what it imports late it imports now."""
    sign("https://localhost/model", (), b"", "us-east-1", {"key": "k", "secret": "s", "token": "t"})
