"""Counts of sessions, vaults and files; sessions that go on by themselves, and those at work."""

import sqlalchemy as sa
from alembic import op

revision = "0029_mended"
down_revision = "0028"
branch_labels = None
depends_on = None

_COUNTED = ("sessions", "vaults", "files")


def upgrade() -> None:
    """Spelled out and never changed: tables.py says what is, this says what was then."""
    op.add_column("sessions", sa.Column("wakes_at", sa.BigInteger))
    op.create_index("ix_sessions_wakes_at", "sessions", ["wakes_at"])
    at_work = sa.text("status IN ('running', 'rescheduling')")
    op.create_index(
        "ix_sessions_at_work", "sessions", ["id"], sqlite_where=at_work, postgresql_where=at_work
    )
    for table in _COUNTED:
        op.execute(
            "INSERT INTO tenant_counts (tenant_id, kind, held) "  # noqa: S608  names of ours
            f"SELECT tenant_id, '{table}', count(*) FROM {table} GROUP BY tenant_id"
        )
