"""The trace of the request that began a session's turn."""

import sqlalchemy as sa
from alembic import op

revision = "0040_trace"
down_revision = "0034_outputs"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Spelled out and never changed: tables.py says what is, this says what was then."""
    op.add_column("sessions", sa.Column("trace", sa.Text))
