"""Google Secret Manager over REST, with google-auth for who we are."""

from __future__ import annotations

import base64
import binascii
import json
from pathlib import Path
from typing import Any

from ringfence.config.reference import Reference
from ringfence.config.secrets import GcpService
from ringfence.vault.source import (
    Resolved,
    absent,
    denied,
    text_or_field,
    unfit,
    unreachable,
)
from ringfence.vault.sources import google_token, http

_NAME = "Google Secret Manager"


class GcpSource:
    """`gcp-sm://project/name`, with a version and a field where they are named."""

    def __init__(self, service: GcpService, timeout: float) -> None:
        self._service = service
        self._http = http.client(timeout, service.ca_file)
        self._tokens = google_token.Tokens(self._http, _NAME, self._found)

    def resolve(self, reference: Reference, *, doubted: bool = False) -> Resolved:  # noqa: ARG002  read anew each time
        """See SecretSource."""
        project, name, version = [*reference.path.split("/"), "latest"][:3]
        path = f"v1/projects/{project}/secrets/{name}/versions/{version}:access"
        answer = self._access(reference, f"{self._service.endpoint}/{path}")
        payload = answer.get("payload")
        try:
            raw = base64.b64decode(str(payload["data"]), validate=True) if payload else b""
        except (KeyError, TypeError, binascii.Error):
            raise unfit(reference, "its payload is not what the service sends") from None
        given = str(answer.get("name", "")).rpartition("/")[2]
        return Resolved(value=text_or_field(reference, raw), version=given[:32])

    def close(self) -> None:
        """See SecretSource."""
        self._http.close()

    def _access(self, reference: Reference, url: str) -> dict[str, Any]:
        for again in (False, True):
            token = self._token(anew=again)
            headers = {"authorization": f"Bearer {token}"}
            status, _, data = http.send(self._http, _NAME, "GET", url, headers)
            if status != 401:
                break
        if status == 200:
            return http.json_of(_NAME, data)
        if status in {400, 404}:  # 400: that version is disabled or destroyed
            raise absent(reference)
        if status in {401, 403}:
            raise denied(_NAME, f"{reference}: it answers {status}")
        raise unreachable(_NAME, f"it answers {status}")

    def _token(self, *, anew: bool) -> str:
        return str(self._tokens.get(anew=anew).token)

    def _found(self) -> Any:
        path = self._service.credentials_file
        if path is None:
            return google_token.host_credentials()
        return google_token.credentials_of(json.loads(Path(path).read_bytes()))
