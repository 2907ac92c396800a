"""By what mark transcripts, snapshots and files are known; lists of sessions, however many."""

import sqlalchemy as sa
from alembic import op

revision = "0030_places"
down_revision = "0029_mended"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Spelled out and never changed: tables.py says what is, this says what was then."""
    op.create_table(
        "places",
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("mark", sa.Text, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("kind", name="pk_places"),
    )
    live = sa.text("archived_at IS NULL")
    for name, columns in (
        ("ix_sessions_live", ["tenant_id", "created_at", "id"]),
        ("ix_sessions_agent_id_live", ["tenant_id", "agent_id", "created_at", "id"]),
    ):
        op.create_index(name, "sessions", columns, sqlite_where=live, postgresql_where=live)
    op.create_index(
        "ix_sessions_status",
        "sessions",
        ["tenant_id", "status", "archived_at", "created_at", "id"],
    )
