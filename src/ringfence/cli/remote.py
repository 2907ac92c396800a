"""A small client of a gateway, for the commands that talk to one. Shapes are the public API's."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Self

import typer

from ringfence.config.plain import refuse_plain
from ringfence.errors import CODES, CallerError, DeniedError, RingfenceError, UnavailableError
from ringfence.policy import yamldoc
from ringfence.policy.problems import PolicyInvalidError

Url = Annotated[
    str,
    typer.Option("--url", envvar="RINGFENCE_URL", help="The gateway."),
]
DEFAULT_URL = "http://127.0.0.1:8470"
KEY = "RINGFENCE_API_KEY"
"""The environment's variable with the API key: on a command line every user of the host sees it."""

_TIMEOUT_SECONDS = 30.0
_SILENT_SECONDS = 120.0
"""A stream that says nothing for so long is opened again; the gateway pings in between."""
_MOST_SILENCE = 30


class Gateway:
    """One gateway, one key. Use as a context.

    Every method raises UnavailableError `gateway-unavailable` when it does not answer, and what it
    answers as an error under the code that it gives: CallerError, DeniedError or UnavailableError.
    """

    def __init__(self, url: str, key: str) -> None:
        # a tenth of a second, which commands that talk to no gateway need not wait for
        import httpx2

        self._http = httpx2.Client(
            base_url=url, headers={"x-api-key": key}, timeout=_TIMEOUT_SECONDS, trust_env=False
        )

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close its connections."""
        self._http.close()

    def call(self, method: str, path: str, body: Any = None, **query: Any) -> dict[str, Any]:
        """One request; the answer's JSON."""
        with _clear():
            answer = self._http.request(
                method, path, params=query, **({} if body is None else {"json": body})
            )
            if answer.is_error:
                raise refusal(answer.status_code, answer.content)
            value = answer.json()
        if not isinstance(value, dict):
            raise UnavailableError("gateway-unavailable", "it does not speak the public API")
        return value

    def pages(self, path: str, **query: Any) -> Iterator[dict[str, Any]]:
        """Every entry of a list."""
        page: dict[str, Any] = {}
        while True:
            found = self.call("GET", path, limit=100, **query, **page)
            yield from found.get("data") or ()
            if not found.get("next_page"):
                return
            page = {"page": found["next_page"]}

    def events(self, session: str) -> Iterator[dict[str, Any]]:
        """Events of a session: all there are, then as they come; each once, across reconnects.

        Ends when the stream does, after a break that a new connection does not mend.
        """
        seen: set[str] = set()
        failures = 0
        while True:
            try:
                for event in self._connected(session):
                    failures = 0
                    if event.get("id") not in seen:
                        seen.add(str(event.get("id")))
                        yield event
            except UnavailableError:
                failures += 1
                if failures > _MOST_SILENCE:
                    raise
            if failures:
                _pause(min(5.0, 0.2 * 2**failures))

    def _connected(self, session: str) -> Iterator[dict[str, Any]]:
        """The stream is opened first and the list read then: nothing falls between the two."""
        import httpx2

        path = f"/v1/sessions/{session}/events"
        limits = httpx2.Timeout(_TIMEOUT_SECONDS, read=_SILENT_SECONDS)
        with _clear(), self._http.stream("GET", f"{path}/stream", timeout=limits) as answer:
            if answer.is_error:
                raise refusal(answer.status_code, answer.read())
            yield from self.pages(path, order="asc")
            for line in answer.iter_lines():
                name, _, data = line.partition(":")
                if name == "data" and data.strip():
                    event = json.loads(data)
                    if isinstance(event, dict) and "type" in event:
                        yield event


def gateway(url: str) -> Gateway:
    """With the key of the environment.

    Raises:
        CallerError: `usage` without one, for an address that is none, or for plain http to another
            machine.
    """
    key = os.environ.get(KEY, "").strip()
    if not key:
        raise CallerError(
            "usage",
            f"no API key: {KEY} is not set",
            hint="`ringfence up` prints one when it starts first; others: ringfence keys create",
        )
    if not re.match(r"(?i)https?://[^/\s]", url):
        # no fault of a gateway's, which is never asked
        raise CallerError(
            "usage",
            f"the gateway's address is http://… or https://…, not {url[:64]!r}",
            hint="--url, or RINGFENCE_URL in the environment",
        )
    refuse_plain(url, os.environ)
    return Gateway(url, key)


_MENDS = {
    "api-key-invalid": f"{KEY} holds a key of this gateway; on its host: ringfence keys list",
    "agent-not-found": "see: ringfence agents list",
    "environment-not-found": "see: ringfence environments list",
    "session-not-found": "see: ringfence sessions remote list; those of `ringfence run` on this "
    "host: ringfence sessions list",
}
"""What the one at the command line can do; a gateway's own words name no command."""


def refusal(status: int, content: bytes) -> RingfenceError:
    """A gateway's error as ours: same code, same words."""
    try:
        error = json.loads(content)["error"]
        message = str(error["message"])
        code = str((error.get("details") or {}).get("error_code", "")).replace("_", "-")
    except (ValueError, KeyError, TypeError, AttributeError):
        message, code = f"HTTP {status}", ""
    hint = _MENDS.get(code, "")
    if status >= 500 or status == 429:
        return UnavailableError(
            code if code in CODES else "gateway-unavailable", message, hint=hint
        )
    family = DeniedError if status in {401, 403} else CallerError
    return family(code if code in CODES else "request-invalid", message, hint=hint)


@contextmanager
def _clear() -> Iterator[None]:
    import httpx2

    try:
        yield
    except (httpx2.HTTPError, httpx2.InvalidURL, ValueError) as error:
        why = re.sub(r"\[Errno -?\d+\] ", "", str(error)) or type(error).__name__
        raise UnavailableError(
            "gateway-unavailable",
            f"the gateway does not answer: {why}",
            hint="see that `ringfence up` or `ringfence serve` runs, and --url (RINGFENCE_URL)",
        ) from None


def _pause(seconds: float) -> None:
    import time

    time.sleep(seconds)


def definition(file: Path) -> dict[str, Any]:
    """The mapping of a YAML file, read as policies are: no duplicate keys, no implicit types.

    Raises:
        CallerError: `request-invalid`, with the place.
    """
    try:
        with file.open("rb") as opened:
            value = yamldoc.parse(opened.read(yamldoc.MAX_BYTES + 1))
    except PolicyInvalidError as error:
        # without its hint, which is about policies
        where = error.located({}, str(file)).message
        raise CallerError("request-invalid", where) from None
    except OSError as error:
        raise CallerError(
            "request-invalid",
            f"{file} cannot be read: {error.strerror or error}",
            hint="-f names a YAML file: docs/how-to/platform.md",
        ) from None
    if not isinstance(value, dict):
        raise CallerError("request-invalid", f"{file}: a definition is a mapping")
    return value


def named(gateway: Gateway, kind: str, text: str) -> dict[str, Any]:
    """One of `agents` or `environments`, by its id or its name.

    Raises:
        CallerError: `agent-not-found`, `environment-not-found`; `usage` for a name that several
            have.
    """
    prefix = "agent_" if kind == "agents" else "env_"
    if text.startswith(prefix):
        return gateway.call("GET", f"/v1/{kind}/{text}")
    found = [one for one in gateway.pages(f"/v1/{kind}") if one.get("name") == text]
    if len(found) > 1:
        ids = ", ".join(str(one["id"]) for one in found[:5])
        raise CallerError("usage", f"several {kind} are called {text!r}", hint=f"name one: {ids}")
    if not found:
        code = "agent-not-found" if kind == "agents" else "environment-not-found"
        raise CallerError(
            code,
            f"there is no {kind.removesuffix('s')} called {text!r}",
            hint=f"see: ringfence {kind} list",
        )
    return found[0]
