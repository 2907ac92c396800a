"""Deleted sessions of which something lies outside the database."""

import sqlalchemy as sa
from alembic import op

revision = "0028"
down_revision = "0002_files"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Spelled out and never changed: tables.py says what is, this says what was then."""
    op.create_table(
        "deleted_sessions",
        sa.Column("tenant_id", sa.Text, nullable=False),
        sa.Column("session_id", sa.Text, nullable=False),
        sa.Column("transcript", sa.Text),
        sa.Column("snapshots", sa.Boolean, nullable=False),
        sa.Column("deleted_at", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", "session_id", name="pk_deleted_sessions"),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name="fk_deleted_sessions_tenants"),
    )
