"""The platform's database: SQLite on one host, PostgreSQL for several; SQLAlchemy Core, async.

One transaction is one connection: `reading()` for queries, `writing()` for all that changes. On
SQLite a writer takes the lock when it begins, so that two read-then-write transactions follow
each other instead of failing at the end; on PostgreSQL a row that is read to be changed is locked
(`with_for_update`), and waits are bounded.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sqlalchemy import event, exc, make_url, text
from sqlalchemy.engine import URL, Connection
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import ConnectionPoolEntry

from ringfence.errors import CallerError, UnavailableError, words
from ringfence.store.migrate import upgrade
from ringfence.store.sqlite import make_private_directory, make_private_file

_WAIT = 5.0
"""Seconds that a statement waits for another writer, a connection for a free place."""
_IDLE = 5
"""Connections that are kept when nobody needs them."""

_STATEMENT_MS = 20_000
_ANSWER_SECONDS = 25.0
"""For the server's answer to anything, counted here: the server ends a statement before that, and
one whose host or network is gone ends nothing."""
_CLOSE_SECONDS = 30.0
_PASSING = ("08", "40", "53", "55", "57", "58")
"""Classes of SQLSTATE that speak of the server, not of the statement (PostgreSQL, appendix A)."""


def now() -> int:
    """Microseconds since 1970, UTC."""
    return time.time_ns() // 1000


class Database:
    """Connections to one database. Every method raises UnavailableError `store-unavailable`, which
    names the `setting` that says where it is.
    """

    def __init__(self, engine: AsyncEngine, setting: str = "database") -> None:
        self._engine, self._setting = engine, setting

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that changes nothing."""
        with _clear_faults(self._setting):
            async with self._engine.connect() as connection, connection.begin():
                yield connection

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that is kept whole when the block ends, and not at all when it raises."""
        with _clear_faults(self._setting):
            async with self._engine.connect() as connection:
                await connection.execution_options(writes=True)
                async with connection.begin():
                    yield connection

    @asynccontextmanager
    async def single(self) -> AsyncIterator[AsyncConnection]:
        """Each statement is a transaction, which holds its locks for no round trip more. Of
        PostgreSQL.
        """
        with _clear_faults(self._setting):
            async with self._engine.connect() as connection:
                await connection.execution_options(isolation_level="AUTOCOMMIT")
                yield connection

    async def migrate(self) -> None:
        """Bring the schema to this version. Several processes may do so at once."""
        async with self.writing() as connection:
            if connection.dialect.name == "postgresql":
                # any number; it is ours alone, and the transaction's end gives it back
                await connection.execute(text("SELECT pg_advisory_xact_lock(7233150901)"))
            await connection.run_sync(upgrade)

    async def ping(self) -> None:
        """Whether it answers."""
        async with self.reading() as connection:
            await connection.execute(text("SELECT 1"))

    async def close(self) -> None:
        """End all connections. One is told after the other; what nobody answers is dropped."""
        try:
            async with asyncio.timeout(_CLOSE_SECONDS):
                await self._engine.dispose()
        except TimeoutError:
            await self._engine.dispose(close=False)


def open_sqlite(path: Path) -> Database:
    """The database in a file, 0600 in a 0700 directory on a local disk.

    Raises:
        UnavailableError: `store-unavailable`.
    """
    try:
        make_private_directory(path.parent)
        make_private_file(path)
    except OSError as error:
        raise UnavailableError(
            "store-unavailable", f"{path} cannot be used: {words(error)}"
        ) from None
    # a file that somebody removed is away; an empty one in its place would lose all in silence
    url = URL.create(
        "sqlite+aiosqlite",
        database=f"file:{quote(str(path))}",
        query={"mode": "rw", "uri": "true"},
    )
    engine = create_async_engine(
        url, connect_args={"timeout": _WAIT}, pool_timeout=_WAIT, hide_parameters=True
    )
    event.listen(engine.sync_engine, "connect", _prepare_sqlite)
    event.listen(engine.sync_engine, "begin", _begin_sqlite)
    _keep_to_file(engine, path)
    return Database(engine)


def _keep_to_file(engine: AsyncEngine, path: Path) -> None:
    """Use a pooled connection only while its file is the one at `path`.

    Through a connection made earlier, a removed or replaced file (a backup that was put back) still
    answers: what it is told is gone when the process ends.
    """

    def made(_connection: object, record: ConnectionPoolEntry) -> None:
        record.info["file"] = _identity(path)

    def taken(_connection: object, record: ConnectionPoolEntry, _proxy: object) -> None:
        now = _identity(path)
        if now is None or now != record.info["file"]:
            raise exc.DisconnectionError

    event.listen(engine.sync_engine, "connect", made)
    event.listen(engine.sync_engine, "checkout", taken)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _prepare_sqlite(connection: Any, _record: object) -> None:
    # transactions are ours to begin: Python's own would begin them late, as readers
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in (
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
        "trusted_schema=OFF",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get("writes")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def open_postgresql(text_url: str, setting: str = "database", *, connections: int = 15) -> Database:
    """The database of a `postgresql://` URL, the value of a setting. Nothing is connected yet, and
    never more than `connections`.

    Raises:
        CallerError: `settings-invalid`, without the URL, which holds a password.
    """
    hint = f"set {_variable(setting)} to postgresql://user:password@host/database?ssl=verify-full"
    try:
        url = make_url(text_url)
    except (exc.ArgumentError, ValueError):
        raise CallerError("settings-invalid", f"{setting} is not a URL", hint=hint) from None
    if url.drivername not in {"postgresql", "postgres"}:
        raise CallerError(
            "settings-invalid",
            f"{setting}: {url.drivername} is not known; there are SQLite, which needs no setting, "
            "and postgresql",
            hint=hint,
        )
    query = {("ssl" if key == "sslmode" else key): value for key, value in url.query.items()}
    engine = create_async_engine(
        url.set(drivername="postgresql+asyncpg", query=query),
        pool_timeout=_WAIT,
        pool_size=min(_IDLE, connections),
        max_overflow=max(0, connections - _IDLE),
        # whoever waited for a row's lock sees what was written meanwhile (run_places counts under
        # one); a server's own default may be another
        isolation_level="READ COMMITTED",
        # a server that was restarted is met by the next request, not by an error of the last one
        pool_pre_ping=True,
        # an error that is logged would else hold what tenants wrote
        hide_parameters=True,
        connect_args={
            "timeout": _WAIT,
            "command_timeout": _ANSWER_SECONDS,
            "server_settings": {
                "application_name": "ringfence",
                "lock_timeout": f"{_WAIT * 1000:.0f}",
                "statement_timeout": str(_STATEMENT_MS),
                "idle_in_transaction_session_timeout": str(_STATEMENT_MS),
            },
        },
    )
    return Database(engine, setting)


def _variable(setting: str) -> str:
    return "RINGFENCE_" + setting.upper().replace(".", "__")


@contextmanager
def _clear_faults(setting: str) -> Iterator[None]:
    """A database that is away, full or locked is no defect of the statement."""
    try:
        yield
    except (exc.TimeoutError, OSError, TimeoutError) as error:
        raise _unavailable(setting, type(error).__name__) from error
    except exc.DBAPIError as error:
        if not _is_passing(error):
            raise
        raise _unavailable(setting, type(error.orig).__name__) from error
    except Exception as error:
        # what asyncpg raises while it connects is not wrapped
        if type(error).__module__.partition(".")[0] != "asyncpg":
            raise
        raise _unavailable(setting, type(error).__name__) from error


def _is_passing(error: exc.DBAPIError) -> bool:
    if error.connection_invalidated or isinstance(
        error, exc.OperationalError | exc.InterfaceError | exc.InternalError
    ):
        return True
    return str(getattr(error.orig, "sqlstate", None) or "")[:2] in _PASSING


def _unavailable(setting: str, why: str) -> UnavailableError:
    which = "the platform's database" if setting == "database" else f"the database of {setting}"
    return UnavailableError(
        "store-unavailable",
        f"{which} does not answer ({why})",
        hint=f"see that it runs, that its disk is not full, and {_variable(setting)}",
    )
