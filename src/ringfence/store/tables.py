"""The platform's tables, the same on SQLite and PostgreSQL.

The tenant is the first column of every primary key beside the tenants' own: a query that forgets
it reads no index, and a foreign key cannot lead from one tenant to another. Times are whole
microseconds since 1970, UTC. A body is canonical JSON text: what is stored is what is compared,
and no database has an opinion about it.
"""

from __future__ import annotations

import json
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Dialect,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    Table,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.types import TypeDecorator

METADATA = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)


class Json(TypeDecorator[Any]):
    """A JSON value as canonical text: sorted keys, no blanks, nothing that is not JSON."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:  # noqa: ARG002
        """Value to text. Raises ValueError for NaN and infinities."""
        return None if value is None else canonical(value)

    def process_result_value(self, value: Any, dialect: Dialect) -> Any:  # noqa: ARG002
        """Text to value."""
        return None if value is None else json.loads(value)


def canonical(value: Any) -> str:
    """One spelling of a JSON value."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def _live(table: str, *by: str) -> Index:
    """What is not archived, in the order of lists: however much is archived, a page is near."""
    live = text("archived_at IS NULL")
    return Index(
        "_".join(("ix", table, *by, "live")),
        *("tenant_id", *by, "created_at", "id"),
        sqlite_where=live,
        postgresql_where=live,
    )


TENANTS = Table(
    "tenants",
    METADATA,
    Column("id", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    PrimaryKeyConstraint("id"),
    UniqueConstraint("name"),
)

# `hash` is SHA-256 (hex) of the whole key, which is 256 random bits: nothing to guess, so nothing
# to make slow; `prefix` is what people see.
API_KEYS = Table(
    "api_keys",
    METADATA,
    Column("tenant_id", Text, nullable=False),
    Column("id", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("prefix", Text, nullable=False),
    Column("hash", Text, nullable=False),
    Column("scopes", Json, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger),
    Column("revoked_at", BigInteger),
    Column("replaced_by", Text),
    PrimaryKeyConstraint("tenant_id", "id"),
    UniqueConstraint("hash"),
    UniqueConstraint("id"),
    ForeignKeyConstraint(["tenant_id"], ["tenants.id"]),
)

AGENTS = Table(
    "agents",
    METADATA,
    Column("tenant_id", Text, nullable=False),
    Column("id", Text, nullable=False),
    Column("version", Integer, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("archived_at", BigInteger),
    PrimaryKeyConstraint("tenant_id", "id"),
    ForeignKeyConstraint(["tenant_id"], ["tenants.id"]),
    Index(None, "tenant_id", "created_at", "id"),
    _live("agents"),
)

AGENT_VERSIONS = Table(
    "agent_versions",
    METADATA,
    Column("tenant_id", Text, nullable=False),
    Column("agent_id", Text, nullable=False),
    Column("version", Integer, nullable=False),
    Column("body", Json, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    PrimaryKeyConstraint("tenant_id", "agent_id", "version"),
    ForeignKeyConstraint(["tenant_id", "agent_id"], ["agents.tenant_id", "agents.id"]),
)

ENVIRONMENTS = Table(
    "environments",
    METADATA,
    Column("tenant_id", Text, nullable=False),
    Column("id", Text, nullable=False),
    Column("body", Json, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("updated_at", BigInteger, nullable=False),
    Column("archived_at", BigInteger),
    PrimaryKeyConstraint("tenant_id", "id"),
    ForeignKeyConstraint(["tenant_id"], ["tenants.id"]),
    Index(None, "tenant_id", "created_at", "id"),
    _live("environments"),
)

# How many rows of a kind a tenant has: a cap is asked for with each new row, and counting them
# would take longer the more there are.
TENANT_COUNTS = Table(
    "tenant_counts",
    METADATA,
    Column("tenant_id", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("held", BigInteger, nullable=False),
    PrimaryKeyConstraint("tenant_id", "kind"),
    ForeignKeyConstraint(["tenant_id"], ["tenants.id"]),
)

# The answer to a request that carried an Idempotency-Key, written in the transaction of its
# effect: there is never an effect without its record, nor a record of what did not happen.
IDEMPOTENCY = Table(
    "idempotency",
    METADATA,
    Column("tenant_id", Text, nullable=False),
    Column("key", Text, nullable=False),
    Column("fingerprint", Text, nullable=False),
    Column("answer", Json),
    Column("created_at", BigInteger, nullable=False),
    PrimaryKeyConstraint("tenant_id", "key"),
    ForeignKeyConstraint(["tenant_id"], ["tenants.id"]),
    Index(None, "created_at"),
)

# The row is the state machine of one conversation; who moves it has it locked. `position` is that
# of the newest event; `attempt` the highest that claimed the turn, 0 before the first; `agent`
# the definition as it was resolved; `pending` the actions of the last stop, each with the event
# that answered it; `unqueued_at` since when the current turn waits to be handed to the queue,
# NULL when the queue has it or there is none; `wakes_at` when an idle session goes on by itself,
# because no answer has come for which its messages wait; `priority` that of its runs in the queue;
# `began_at` when the current turn was handed over, which nobody's later look changes; `held_at`
# since when it is held back because its environment's error budget is spent; `trace` the
# `traceparent` of the request that began the current turn, NULL when none did. The queue carries
# the id alone, so it is unique across tenants.
AT_WORK = text("status IN ('running', 'rescheduling')")
"""Sessions that the queue should know of: written out, because SQLite takes the index of these for
a query only when it reads the same words there."""

SESSIONS = Table(
    "sessions",
    METADATA,
    Column("tenant_id", Text, nullable=False),
    Column("id", Text, nullable=False),
    Column("agent_id", Text, nullable=False),
    Column("agent_version", Integer, nullable=False),
    Column("agent", Json, nullable=False),
    Column("environment_id", Text, nullable=False),
    Column("title", Text),
    Column("metadata", Json, nullable=False),
    Column("resources", Json, nullable=False),
    Column("vault_ids", Json, nullable=False),
    Column("budget", Json),
    Column("status", Text, nullable=False),
    Column("turn", Integer, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("unqueued_at", BigInteger),
    Column("wakes_at", BigInteger),
    Column("trace", Text),
    Column("position", BigInteger, nullable=False),
    Column("pending", Json, nullable=False),
    Column("transcript", Text, nullable=False),
    Column("transcript_begun", Boolean, nullable=False),
    Column("workspace", Text),
    Column("usage", Json, nullable=False),
    Column("active_us", BigInteger, nullable=False),
    Column("running_since", BigInteger),
    Column("created_at", BigInteger, nullable=False),
    Column("updated_at", BigInteger, nullable=False),
    Column("archived_at", BigInteger),
    Column("priority", Integer, nullable=False, server_default=text("3")),
    Column("began_at", BigInteger),
    Column("held_at", BigInteger),
    PrimaryKeyConstraint("tenant_id", "id"),
    UniqueConstraint("id"),
    ForeignKeyConstraint(["tenant_id"], ["tenants.id"]),
    ForeignKeyConstraint(
        ["tenant_id", "environment_id"], ["environments.tenant_id", "environments.id"]
    ),
    Index(None, "tenant_id", "created_at", "id"),
    Index(None, "tenant_id", "agent_id", "created_at", "id"),
    Index(None, "tenant_id", "environment_id"),
    Index(None, "unqueued_at"),
    Index(None, "wakes_at"),
    Index("ix_sessions_at_work", "id", sqlite_where=AT_WORK, postgresql_where=AT_WORK),
    Index(
        "ix_sessions_held",
        *("tenant_id", "environment_id"),
        sqlite_where=text("held_at IS NOT NULL"),
        postgresql_where=text("held_at IS NOT NULL"),
    ),
    _live("sessions"),
    _live("sessions", "agent_id"),
    _live("sessions", "agent_id", "status"),
    _live("sessions", "agent_id", "agent_version"),
    # that nothing is archived is one more equality here: a partial index beside the next one would
    # look no better to SQLite, and it would pass over all that is archived
    Index("ix_sessions_status", "tenant_id", "status", "archived_at", "created_at", "id"),
    Index(None, "tenant_id", "status", "created_at", "id"),
)

# Sessions that were deleted, while something of them lies elsewhere: the database is not the
# place of transcripts and snapshots, and no transaction spans both. `transcript` is null once it is
# removed; `snapshots`: whether there may be some.
DELETED_SESSIONS = Table(
    "deleted_sessions",
    METADATA,
    Column("tenant_id", Text, nullable=False),
    Column("session_id", Text, nullable=False),
    Column("transcript", Text),
    Column("snapshots", Boolean, nullable=False),
    Column("deleted_at", BigInteger, nullable=False),
    PrimaryKeyConstraint("tenant_id", "session_id"),
    ForeignKeyConstraint(["tenant_id"], ["tenants.id"]),
)

# Append-only: of a row only the moment and the turn that took it are filled in later. Positions of
# a session are 1, 2, 3…, given out under the session's lock, so that whoever has seen position n
# has seen all below it.
EVENTS = Table(
    "events",
    METADATA,
    Column("tenant_id", Text, nullable=False),
    Column("session_id", Text, nullable=False),
    Column("position", BigInteger, nullable=False),
    Column("id", Text, nullable=False),
    Column("type", Text, nullable=False),
    Column("body", Json, nullable=False),
    Column("turn", Integer),
    Column("created_at", BigInteger, nullable=False),
    Column("processed_at", BigInteger),
    PrimaryKeyConstraint("tenant_id", "session_id", "position"),
    UniqueConstraint("tenant_id", "session_id", "id"),
    ForeignKeyConstraint(["tenant_id", "session_id"], ["sessions.tenant_id", "sessions.id"]),
    Index(None, "tenant_id", "session_id", "turn", "type"),
)

# How a turn ended. The key is what makes it end once.
TURNS = Table(
    "turns",
    METADATA,
    Column("tenant_id", Text, nullable=False),
    Column("session_id", Text, nullable=False),
    Column("turn", Integer, nullable=False),
    Column("status", Text, nullable=False),
    Column("ended_at", BigInteger, nullable=False),
    PrimaryKeyConstraint("tenant_id", "session_id", "turn"),
    ForeignKeyConstraint(["tenant_id", "session_id"], ["sessions.tenant_id", "sessions.id"]),
)

# Which worker has a session's sandbox between two turns; advice for whoever leases the next one.
LIVE_SANDBOXES = Table(
    "live_sandboxes",
    METADATA,
    Column("tenant_id", Text, nullable=False),
    Column("session_id", Text, nullable=False),
    Column("worker", Text, nullable=False),
    Column("turn", Integer, nullable=False),
    Column("passed", Integer, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    PrimaryKeyConstraint("tenant_id", "session_id"),
    ForeignKeyConstraint(["tenant_id", "session_id"], ["sessions.tenant_id", "sessions.id"]),
    Index(None, "session_id"),
)

# Of each place in a session's outputs the content that was last made a file of it, whether or not
# that file is there still. `place` is SHA-256 (hex) of the path, which is the agent's, as bytes.
SESSION_OUTPUTS = Table(
    "session_outputs",
    METADATA,
    Column("tenant_id", Text, nullable=False),
    Column("session_id", Text, nullable=False),
    Column("place", Text, nullable=False),
    Column("sha256", Text, nullable=False),
    PrimaryKeyConstraint("tenant_id", "session_id", "place"),
    ForeignKeyConstraint(["tenant_id", "session_id"], ["sessions.tenant_id", "sessions.id"]),
)

# How many runs of a tenant may be in hand at once, over all workers of an engine that does not
# count them itself. No row: any number. No foreign key: a queue knows tenants by their ids alone.
TENANT_LIMITS = Table(
    "tenant_limits",
    METADATA,
    Column("tenant_id", Text, nullable=False),
    Column("runs", Integer, nullable=False),
    PrimaryKeyConstraint("tenant_id"),
)

# Runs that are in hand, and runs that found no place; times by the database's own clock. `worker`
# is NULL for one that waits, and '' for a place that its run keeps over a moment in nobody's hand.
# `asked_at`: when it first asked, which is its place among those that wait.
RUN_PLACES = Table(
    "run_places",
    METADATA,
    Column("tenant_id", Text, nullable=False),
    Column("run_id", Text, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("priority", Integer, nullable=False),
    Column("worker", Text),
    Column("asked_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    Column("woken", Boolean, nullable=False),
    PrimaryKeyConstraint("tenant_id", "run_id"),
    Index(None, "run_id"),
    Index(None, "expires_at"),
    Index(
        "ix_run_places_held",
        "tenant_id",
        sqlite_where=text("worker IS NOT NULL"),
        postgresql_where=text("worker IS NOT NULL"),
    ),
    Index(
        "ix_run_places_waits",
        *("tenant_id", "priority", "asked_at", "run_id"),
        sqlite_where=text("worker IS NULL"),
        postgresql_where=text("worker IS NULL"),
    ),
)

# Metadata of an uploaded file; its bytes lie in the contents' directory under tenant and id.
# `sha256` is of the whole content; `scope_id` the session that made it; `purged_at` when the bytes
# of an expired one were removed.
FILES = Table(
    "files",
    METADATA,
    Column("tenant_id", Text, nullable=False),
    Column("id", Text, nullable=False),
    Column("filename", Text, nullable=False),
    Column("mime_type", Text, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("sha256", Text, nullable=False),
    Column("downloadable", Boolean, nullable=False),
    Column("scope_id", Text),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger),
    Column("purged_at", BigInteger),
    PrimaryKeyConstraint("tenant_id", "id"),
    ForeignKeyConstraint(["tenant_id"], ["tenants.id"]),
    Index(None, "tenant_id", "created_at", "id"),
    Index(None, "tenant_id", "scope_id", "created_at", "id"),
    Index(None, "expires_at"),
)

VAULTS = Table(
    "vaults",
    METADATA,
    Column("tenant_id", Text, nullable=False),
    Column("id", Text, nullable=False),
    Column("body", Json, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("updated_at", BigInteger, nullable=False),
    Column("archived_at", BigInteger),
    PrimaryKeyConstraint("tenant_id", "id"),
    ForeignKeyConstraint(["tenant_id"], ["tenants.id"]),
    Index(None, "tenant_id", "created_at", "id"),
)

# `sealed` is the value under the deployment's public key, with tenant, vault, id, host and expiry
# authenticated: a row that is moved or edited does not open. NULL once the credential is archived.
VAULT_CREDENTIALS = Table(
    "vault_credentials",
    METADATA,
    Column("tenant_id", Text, nullable=False),
    Column("vault_id", Text, nullable=False),
    Column("id", Text, nullable=False),
    Column("body", Json, nullable=False),
    Column("host", Text, nullable=False),
    Column("sealed", Text),
    Column("key_id", Text, nullable=False),
    Column("expires_at", BigInteger),
    Column("created_at", BigInteger, nullable=False),
    Column("updated_at", BigInteger, nullable=False),
    Column("archived_at", BigInteger),
    PrimaryKeyConstraint("tenant_id", "id"),
    ForeignKeyConstraint(["tenant_id", "vault_id"], ["vaults.tenant_id", "vaults.id"]),
    Index(None, "tenant_id", "vault_id", "created_at", "id"),
)

# The public key that values of this deployment are sealed to, by name: one row, so that of two
# gateways with two keys exactly one seals.
VAULT_KEYS = Table(
    "vault_keys",
    METADATA,
    Column("slot", Text, nullable=False),
    Column("key_id", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    PrimaryKeyConstraint("slot"),
)

# Where transcripts, snapshots and files lie, by a mark that the first worker left there: whoever
# does not find it there has another place.
PLACES = Table(
    "places",
    METADATA,
    Column("kind", Text, nullable=False),
    Column("mark", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    PrimaryKeyConstraint("kind"),
)

# What operators' servers are told of: a row for each kind and target of a gateway's settings, and
# `seen_at` when a gateway last said so. `tenant` is the name of the only one that it is about,
# '' for all. URLs and secrets stay in the settings.
WEBHOOK_TARGETS = Table(
    "webhook_targets",
    METADATA,
    Column("name", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("tenant", Text, nullable=False),
    Column("seen_at", BigInteger, nullable=False),
    PrimaryKeyConstraint("name", "kind"),
)

# What is still to be told, to one target each; written in the transaction in which it happened, and
# gone once it has arrived or is given up. `due_at`: when it is to be tried next; whoever tries it
# moves that on first. No foreign key to the session: that it was deleted does not undo what it did.
# `body`: what is told instead of a session, which is '' then.
WEBHOOK_DELIVERIES = Table(
    "webhook_deliveries",
    METADATA,
    Column("tenant_id", Text, nullable=False),
    Column("id", Text, nullable=False),
    Column("target", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("session_id", Text, nullable=False),
    Column("tries", Integer, nullable=False),
    Column("due_at", BigInteger, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("body", Json),
    PrimaryKeyConstraint("tenant_id", "id", "target"),
    ForeignKeyConstraint(["tenant_id"], ["tenants.id"]),
    Index(None, "target", "due_at"),
)

# Turns that have ended, by environment, time and kind (`slo.outcomes`): written in the transaction
# that ends the turn, which happens once. Each is counted twice, in its minute and in its hour: a
# month is read from few rows, and minutes are soon forgotten. `span` is in seconds, `start` is the
# moment of the bucket's begin. No foreign key to the environment: its rows go with it.
SLO_COUNTS = Table(
    "slo_counts",
    METADATA,
    Column("tenant_id", Text, nullable=False),
    Column("environment_id", Text, nullable=False),
    Column("span", Integer, nullable=False),
    Column("start", BigInteger, nullable=False),
    Column("kind", Integer, nullable=False),
    Column("runs", BigInteger, nullable=False),
    PrimaryKeyConstraint("tenant_id", "environment_id", "span", "start", "kind"),
    ForeignKeyConstraint(["tenant_id"], ["tenants.id"]),
    Index(None, "span", "start"),
)

# Alerts on that, as they stand; `since` when the state last changed, `relief_at` when a spent
# budget comes back if nothing happens meanwhile, `told` what was said of it, to be said again.
SLO_ALERTS = Table(
    "slo_alerts",
    METADATA,
    Column("tenant_id", Text, nullable=False),
    Column("environment_id", Text, nullable=False),
    Column("sli", Text, nullable=False),
    Column("rule", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("since", BigInteger, nullable=False),
    Column("relief_at", BigInteger),
    Column("told", Json, nullable=False),
    PrimaryKeyConstraint("tenant_id", "environment_id", "sli", "rule"),
    ForeignKeyConstraint(["tenant_id"], ["tenants.id"]),
    Index(None, "state", "since"),
)

# Which process looks: one row. What it decides it writes while it has the row locked, so that of
# two that believe they are it one finds another's name there and stops.
SLO_WATCH = Table(
    "slo_watch",
    METADATA,
    Column("slot", Text, nullable=False),
    Column("holder", Text, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    PrimaryKeyConstraint("slot"),
)
