"""How runs ended by environment and time, alerts on it, and runs that wait for it."""

import sqlalchemy as sa
from alembic import op

revision = "0041_slo"
down_revision = "0040_trace"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Spelled out and never changed: tables.py says what is, this says what was then."""
    op.create_table(
        "slo_counts",
        sa.Column("tenant_id", sa.Text, nullable=False),
        sa.Column("environment_id", sa.Text, nullable=False),
        sa.Column("span", sa.Integer, nullable=False),
        sa.Column("start", sa.BigInteger, nullable=False),
        sa.Column("kind", sa.Integer, nullable=False),
        sa.Column("runs", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint(
            "tenant_id", "environment_id", "span", "start", "kind", name="pk_slo_counts"
        ),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name="fk_slo_counts_tenants"),
    )
    op.create_index("ix_slo_counts_span_start", "slo_counts", ["span", "start"])
    op.create_table(
        "slo_alerts",
        sa.Column("tenant_id", sa.Text, nullable=False),
        sa.Column("environment_id", sa.Text, nullable=False),
        sa.Column("sli", sa.Text, nullable=False),
        sa.Column("rule", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("since", sa.BigInteger, nullable=False),
        sa.Column("relief_at", sa.BigInteger),
        sa.Column("told", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", "environment_id", "sli", "rule", name="pk_slo_alerts"),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name="fk_slo_alerts_tenants"),
    )
    op.create_index("ix_slo_alerts_state_since", "slo_alerts", ["state", "since"])
    op.create_table(
        "slo_watch",
        sa.Column("slot", sa.Text, nullable=False),
        sa.Column("holder", sa.Text, nullable=False),
        sa.Column("expires_at", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("slot", name="pk_slo_watch"),
    )
    op.add_column(
        "sessions", sa.Column("priority", sa.Integer, nullable=False, server_default=sa.text("3"))
    )
    op.add_column("sessions", sa.Column("began_at", sa.BigInteger))
    op.add_column("sessions", sa.Column("held_at", sa.BigInteger))
    held = sa.text("held_at IS NOT NULL")
    op.create_index(
        "ix_sessions_held",
        "sessions",
        ["tenant_id", "environment_id"],
        sqlite_where=held,
        postgresql_where=held,
    )
    op.add_column("webhook_deliveries", sa.Column("body", sa.Text))
