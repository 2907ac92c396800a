"""Sessions, their events, and how their turns ended."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Spelled out and never changed: tables.py says what is, this says what was then."""
    op.create_table(
        "sessions",
        sa.Column("tenant_id", sa.Text, nullable=False),
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("agent_id", sa.Text, nullable=False),
        sa.Column("agent_version", sa.Integer, nullable=False),
        sa.Column("agent", sa.Text, nullable=False),
        sa.Column("environment_id", sa.Text, nullable=False),
        sa.Column("title", sa.Text),
        sa.Column("metadata", sa.Text, nullable=False),
        sa.Column("resources", sa.Text, nullable=False),
        sa.Column("vault_ids", sa.Text, nullable=False),
        sa.Column("budget", sa.Text),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("turn", sa.Integer, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("unqueued_at", sa.BigInteger),
        sa.Column("position", sa.BigInteger, nullable=False),
        sa.Column("pending", sa.Text, nullable=False),
        sa.Column("transcript", sa.Text, nullable=False),
        sa.Column("transcript_begun", sa.Boolean, nullable=False),
        sa.Column("workspace", sa.Text),
        sa.Column("usage", sa.Text, nullable=False),
        sa.Column("active_us", sa.BigInteger, nullable=False),
        sa.Column("running_since", sa.BigInteger),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("updated_at", sa.BigInteger, nullable=False),
        sa.Column("archived_at", sa.BigInteger),
        sa.PrimaryKeyConstraint("tenant_id", "id", name="pk_sessions"),
        sa.UniqueConstraint("id", name="uq_sessions_id"),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name="fk_sessions_tenants"),
        sa.ForeignKeyConstraint(
            ["tenant_id", "environment_id"],
            ["environments.tenant_id", "environments.id"],
            name="fk_sessions_environments",
        ),
    )
    for columns in (
        ["tenant_id", "created_at", "id"],
        ["tenant_id", "agent_id", "created_at", "id"],
        ["tenant_id", "environment_id"],
        ["unqueued_at"],
    ):
        op.create_index(f"ix_sessions_{'_'.join(columns)}", "sessions", columns)
    op.create_table(
        "events",
        sa.Column("tenant_id", sa.Text, nullable=False),
        sa.Column("session_id", sa.Text, nullable=False),
        sa.Column("position", sa.BigInteger, nullable=False),
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("type", sa.Text, nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.Column("turn", sa.Integer),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("processed_at", sa.BigInteger),
        sa.PrimaryKeyConstraint("tenant_id", "session_id", "position", name="pk_events"),
        sa.UniqueConstraint(
            "tenant_id", "session_id", "id", name="uq_events_tenant_id_session_id_id"
        ),
        sa.ForeignKeyConstraint(_SESSION, _OF_SESSIONS, name="fk_events_sessions"),
    )
    op.create_index(
        "ix_events_tenant_id_session_id_turn_type",
        "events",
        ["tenant_id", "session_id", "turn", "type"],
    )
    op.create_table(
        "turns",
        sa.Column("tenant_id", sa.Text, nullable=False),
        sa.Column("session_id", sa.Text, nullable=False),
        sa.Column("turn", sa.Integer, nullable=False),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("ended_at", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", "session_id", "turn", name="pk_turns"),
        sa.ForeignKeyConstraint(_SESSION, _OF_SESSIONS, name="fk_turns_sessions"),
    )


_SESSION = ["tenant_id", "session_id"]
_OF_SESSIONS = ["sessions.tenant_id", "sessions.id"]
