"""Bringing a schema to this version, with Alembic, in the caller's transaction."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from alembic.util.exc import CommandError
from sqlalchemy.engine import Connection

from ringfence.errors import UnavailableError


def configuration(connection: Connection | None = None) -> Config:
    """Alembic's own, without a file; `connection` is what `env.py` runs on."""
    config = Config()
    place = Path(str(resources.files("ringfence.store"))) / "migrations"
    # Alembic's configuration has `%` as a sign of its own
    config.set_main_option("script_location", str(place).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


def newest() -> str:
    """The revision of this version."""
    head = ScriptDirectory.from_config(configuration()).get_current_head()
    assert head is not None  # noqa: S101  shipped with the package, and tested
    return head


def upgrade(connection: Connection) -> None:
    """Apply what is new. Nothing is kept of a migration that fails.

    Raises:
        UnavailableError: `store-unavailable` when a newer version wrote the schema.
    """
    try:
        command.upgrade(configuration(connection), "head")
    except CommandError as error:
        raise UnavailableError(
            "store-unavailable",
            f"the platform's database has a schema that this version does not know: {error}",
            hint="install the version of ringfence that wrote it, or a newer one",
        ) from None
