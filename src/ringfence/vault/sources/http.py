"""JSON over HTTP to the operator's own services: verified, bounded, and never sent elsewhere.

A redirect is not followed: it would carry our token to whatever host the answer names.
"""

from __future__ import annotations

import json
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx2

from ringfence.vault.source import unreachable

_MAX_ANSWER = 1 << 20


def client(timeout: float, ca_file: Path | None = None) -> httpx2.Client:
    """One service's. The environment names no proxy and no roots to it."""
    context = ssl.create_default_context(cafile=str(ca_file) if ca_file else None)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return httpx2.Client(verify=context, timeout=timeout, follow_redirects=False, trust_env=False)


def send(
    http: httpx2.Client,
    source: str,
    method: str,
    url: str,
    headers: Mapping[str, str],
    body: bytes | None = None,
) -> tuple[int, dict[str, str], bytes]:
    """One request: status, headers in lower case, body.

    Raises:
        UnavailableError: `secret-unreachable`, also for a redirect.
    """
    try:
        with http.stream(method, url, headers=dict(headers), content=body) as answer:
            data = b""
            for chunk in answer.iter_bytes():
                data += chunk
                if len(data) > _MAX_ANSWER:
                    raise unreachable(source, "it answers with more than a secret")
            status = answer.status_code
            named = {name.lower(): value for name, value in answer.headers.items()}
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
        # its words may hold the URL, and nothing of the body; the kind says enough
        raise unreachable(source, type(error).__name__ + _tls(error)) from None
    if 300 <= status < 400:
        raise unreachable(
            source, f"it redirects ({status})", "name the host that answers itself in the settings"
        )
    return status, named, data


def _tls(error: BaseException) -> str:
    return ": its certificate is not trusted" if "CERTIFICATE_VERIFY" in str(error) else ""


def json_of(source: str, data: bytes) -> dict[str, Any]:
    """An object. Raises UnavailableError `secret-unreachable` for anything else."""
    try:
        value = json.loads(data or b"{}")
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise unreachable(source, "it does not answer with a JSON object")
    return value
