"""What of a session's outputs has been made a file, by its place."""

import sqlalchemy as sa
from alembic import op

revision = "0034_outputs"
down_revision = "0033_run_places"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Spelled out and never changed: tables.py says what is, this says what was then."""
    op.create_table(
        "session_outputs",
        sa.Column("tenant_id", sa.Text, nullable=False),
        sa.Column("session_id", sa.Text, nullable=False),
        sa.Column("place", sa.Text, nullable=False),
        sa.Column("sha256", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", "session_id", "place", name="pk_session_outputs"),
        sa.ForeignKeyConstraint(
            ["tenant_id", "session_id"],
            ["sessions.tenant_id", "sessions.id"],
            name="fk_session_outputs_sessions",
        ),
    )
