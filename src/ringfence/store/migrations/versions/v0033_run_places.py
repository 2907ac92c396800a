"""How many runs of a tenant are in hand at once, and which."""

import sqlalchemy as sa
from alembic import op

revision = "0033_run_places"
down_revision = "0032_live"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Spelled out and never changed: tables.py says what is, this says what was then."""
    op.create_table(
        "tenant_limits",
        sa.Column("tenant_id", sa.Text, nullable=False),
        sa.Column("runs", sa.Integer, nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", name="pk_tenant_limits"),
    )
    op.create_table(
        "run_places",
        sa.Column("tenant_id", sa.Text, nullable=False),
        sa.Column("run_id", sa.Text, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("priority", sa.Integer, nullable=False),
        sa.Column("worker", sa.Text),
        sa.Column("asked_at", sa.BigInteger, nullable=False),
        sa.Column("expires_at", sa.BigInteger, nullable=False),
        sa.Column("woken", sa.Boolean, nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", "run_id", name="pk_run_places"),
    )
    op.create_index("ix_run_places_run_id", "run_places", ["run_id"])
    op.create_index("ix_run_places_expires_at", "run_places", ["expires_at"])
    for name, columns, where in (
        ("ix_run_places_held", ["tenant_id"], "worker IS NOT NULL"),
        (
            "ix_run_places_waits",
            ["tenant_id", "priority", "asked_at", "run_id"],
            "worker IS NULL",
        ),
    ):
        some = sa.text(where)
        op.create_index(name, "run_places", columns, sqlite_where=some, postgresql_where=some)
