"""Which worker has the live sandbox of a session."""

import sqlalchemy as sa
from alembic import op

revision = "0032_live"
down_revision = "0031_webhooks"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Spelled out and never changed: tables.py says what is, this says what was then."""
    op.create_table(
        "live_sandboxes",
        sa.Column("tenant_id", sa.Text, nullable=False),
        sa.Column("session_id", sa.Text, nullable=False),
        sa.Column("worker", sa.Text, nullable=False),
        sa.Column("turn", sa.Integer, nullable=False),
        sa.Column("passed", sa.Integer, nullable=False),
        sa.Column("expires_at", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", "session_id", name="pk_live_sandboxes"),
        sa.ForeignKeyConstraint(
            ["tenant_id", "session_id"],
            ["sessions.tenant_id", "sessions.id"],
            name="fk_live_sandboxes_sessions",
        ),
    )
    op.create_index("ix_live_sandboxes_session_id", "live_sandboxes", ["session_id"])
