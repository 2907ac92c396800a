"""The keeper: the part of egress that knows the way to secrets, in a process of its own.

Egress parses what hostile programs send, and gives up its rights to files before it hears of the
first. So it cannot read a mounted file again, and holds neither tokens nor roles that open a vault.
The keeper does, and reads nothing but what egress asks: one of the credentials that the settings
name, by name. It keeps no value that its source did not hand out for a time, and ends with egress.

A message is four bytes of length and JSON; an answer is four bytes of length, four
of the value's length, JSON, and the value.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ringfence.config.reference import SERVICES, Reference, parse
from ringfence.config.secrets import SecretSettings
from ringfence.errors import RingfenceError, UnavailableError
from ringfence.vault.login import Login, LoginFactory, bases, order
from ringfence.vault.source import Resolved, SecretSource, unreachable

REQUEST, ANSWER = struct.Struct(">I"), struct.Struct(">II")
MAX_MESSAGE, MAX_VALUE = 1 << 20, 8192
_THREADS = 4
"""Of one source: one that hangs holds up no other."""
_CLOSE_SECONDS = 5
_GRACE_SECONDS = 5.0
"""Beyond a source's own time limit: a keyring that asks its user has none."""

Factory = Callable[[SecretSettings, Path], SecretSource]
"""Makes a source; Path is the state directory."""
Reply = Callable[[dict[str, Any], bytes], None]


def patience(timeout: float) -> float:
    """Seconds that egress waits for an answer, where each try of a source has so many."""
    return timeout * 2 + _GRACE_SECONDS


class Keeper:
    """Sources, each made when it is first asked.

    `withheld`: names of what logins begin with, which no asker is told.
    `tells` False gives versions and leases alone: what `ringfence vault sources check` may know.
    """

    def __init__(
        self,
        settings: SecretSettings,
        factory: Callable[[str], SecretSource],
        *,
        tells: bool,
        withheld: frozenset[str] = frozenset(),
    ) -> None:
        self._factory, self._tells = factory, tells
        self._withheld = withheld
        self._patience = patience(settings.timeout_seconds)
        self._made_by: dict[str, Callable[[], Login]] = {}
        self._logins: dict[str, Login] = {}
        self._references = {
            name: credential.reference for name, credential in settings.credentials.items()
        }
        self._sources: dict[str, SecretSource] = {}
        self._pools: dict[str, ThreadPoolExecutor] = {}
        self._making = threading.Lock()

    def logs_in(self, name: str, make: Callable[[], Login]) -> None:
        """One more credential: what a login gives, which is made when it is first asked for."""
        self._made_by[name] = make

    def submit(self, name: str, reply: Reply, *, doubted: bool = False) -> None:
        """Resolve a credential in a thread of its source; `reply` is called there. doubted: an
        upstream refused the value that was given last.
        """
        if name in self._made_by:
            # one at a time, and none for an asker that has gone: a service that hangs would be
            # asked once more for each who gave up
            until = time.monotonic() + self._patience
            ask = partial(self._log_in, name, until)
            self._pool(name, 1).submit(self._answer, name, ask, reply)
            return
        reference = self._references.get(name)
        if reference is None or (self._tells and name in self._withheld):
            reply(_failed(UnavailableError("credential-missing", f"no {name[:64]!r}")), b"")
            return
        ask = partial(self.value, reference, doubted=doubted)
        self._pool(_kind(reference)).submit(self._answer, str(reference), ask, reply)

    def _pool(self, kind: str, threads: int = _THREADS) -> ThreadPoolExecutor:
        if kind not in self._pools:
            self._pools[kind] = ThreadPoolExecutor(threads, thread_name_prefix=kind)
        return self._pools[kind]

    def value(self, reference: Reference, *, doubted: bool = False) -> Resolved:
        """What a source gives. Raises UnavailableError."""
        return self._source(_kind(reference)).resolve(reference, doubted=doubted)

    def named(self, name: str) -> bytes:
        """A credential's value for a login: where the settings place it, or sealed in the vault.
        Raises UnavailableError.
        """
        return self.value(self._references.get(name) or parse(f"sealed://{name}")).value

    def _log_in(self, name: str, until: float) -> Resolved:
        if time.monotonic() > until:
            raise unreachable(name, "the question before took all the time there was")
        with self._making:
            login = self._logins.get(name) or self._made_by[name]()
            self._logins[name] = login
        return login.resolve()

    def _answer(self, about: str, ask: Callable[[], Resolved], reply: Reply) -> None:
        try:
            resolved = ask()
        except RingfenceError as error:
            reply(_failed(error), b"")
        except Exception as error:  # noqa: BLE001  its words may hold what it read
            failure = UnavailableError("secret-unreachable", f"{about}: {type(error).__name__}")
            reply(_failed(failure), b"")
        else:
            if len(resolved.value) > MAX_VALUE:
                failure = UnavailableError(
                    "secret-unfit",
                    f"{about}: it is longer than {MAX_VALUE} bytes",
                    hint="see what the source gives; no header takes so much",
                )
                reply(_failed(failure), b"")
                return
            reply(_told(resolved), resolved.value if self._tells else b"")

    def _source(self, kind: str) -> SecretSource:
        with self._making:
            if kind not in self._sources:
                self._sources[kind] = self._factory(kind)
            return self._sources[kind]

    def close(self) -> None:
        """Give back what sources handed out."""
        for pool in self._pools.values():
            pool.shutdown(wait=False, cancel_futures=True)
        made: list[SecretSource | Login] = [*self._sources.values(), *self._logins.values()]
        for each in made:
            each.close()


def _kind(reference: Reference) -> str:
    """What serves it: one service has one login, whatever the schemes of its references."""
    return SERVICES.get(reference.scheme, reference.scheme)


def _told(resolved: Resolved) -> dict[str, Any]:
    return {
        "version": resolved.version,
        "lease_seconds": resolved.lease_seconds,
        "hosts": list(resolved.hosts),
    }


def _failed(error: RingfenceError) -> dict[str, Any]:
    return {"error": error.to_json()}


def serve(
    connection: socket.socket,
    about: Mapping[str, Any],
    factories: Mapping[str, Factory],
    logins: Mapping[str, LoginFactory] = MappingProxyType({}),
) -> None:
    """Answer until egress is gone. about: what there is, as `receive` gave it to the starter."""
    settings = SecretSettings.model_validate(about["settings"])
    state_dir = Path(about["state_dir"])
    keeper = Keeper(
        settings,
        lambda kind: factories[kind](settings, state_dir),
        tells=about["tells"] is True,
        withheld=bases(about.get("logins", {})),
    )
    for name, told in about.get("logins", {}).items():
        keeper.logs_in(name, partial(_login, logins, told, settings, keeper.named))
    writing = threading.Lock()
    try:
        while (asked := receive(connection)) is not None:
            number = int(asked["id"])

            def reply(told: dict[str, Any], value: bytes, number: int = number) -> None:
                words = json.dumps({"id": number, **told}).encode()
                with writing:
                    connection.sendall(ANSWER.pack(len(words), len(value)) + words + value)

            keeper.submit(str(asked["name"]), reply, doubted=asked.get("doubted") is True)
    finally:
        # a source that hangs now keeps nobody: nothing may outlive egress
        signal.alarm(_CLOSE_SECONDS)
        keeper.close()
        os._exit(0)  # threads that wait for a source are not waited for


def _login(
    factories: Mapping[str, LoginFactory],
    told: Mapping[str, Any],
    settings: SecretSettings,
    named: Callable[[str], bytes],
) -> Login:
    name = told["login"].get("credential")
    made = order(told, settings.timeout_seconds, lambda: named(name))
    return factories[made.kind](made)


def receive(connection: socket.socket) -> dict[str, Any] | None:
    """The next message; None when the other end is gone or talks nonsense."""
    head = _exactly(connection, REQUEST.size)
    if head is None:
        return None
    size = REQUEST.unpack(head)[0]
    data = _exactly(connection, size) if size <= MAX_MESSAGE else None
    return None if data is None else dict(json.loads(data))


def _exactly(connection: socket.socket, size: int) -> bytes | None:
    data = bytearray()
    while len(data) < size:
        try:
            got = connection.recv(size - len(data))
        except OSError:
            return None
        if not got:
            return None
        data += got
    return bytes(data)
