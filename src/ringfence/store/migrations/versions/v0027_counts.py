"""How many rows a tenant has, and lists of what is not archived."""

import sqlalchemy as sa
from alembic import op

revision = "0027"
down_revision = "0002"
branch_labels = None
depends_on = None

_COUNTED = ("agents", "environments")


def upgrade() -> None:
    """Spelled out and never changed: tables.py says what is, this says what was then."""
    op.create_table(
        "tenant_counts",
        sa.Column("tenant_id", sa.Text, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("held", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", "kind", name="pk_tenant_counts"),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name="fk_tenant_counts_tenants"),
    )
    live = sa.text("archived_at IS NULL")
    for table in _COUNTED:
        op.create_index(
            f"ix_{table}_live",
            table,
            ["tenant_id", "created_at", "id"],
            sqlite_where=live,
            postgresql_where=live,
        )
        op.execute(
            "INSERT INTO tenant_counts (tenant_id, kind, held) "  # noqa: S608  names of ours
            f"SELECT tenant_id, '{table}', count(*) FROM {table} GROUP BY tenant_id"
        )
