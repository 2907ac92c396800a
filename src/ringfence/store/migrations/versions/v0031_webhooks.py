"""What operators' servers are to be told."""

import sqlalchemy as sa
from alembic import op

revision = "0031_webhooks"
down_revision = "0030_places"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Spelled out and never changed: tables.py says what is, this says what was then."""
    op.create_table(
        "webhook_targets",
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("tenant", sa.Text, nullable=False),
        sa.Column("seen_at", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("name", "kind", name="pk_webhook_targets"),
    )
    op.create_table(
        "webhook_deliveries",
        sa.Column("tenant_id", sa.Text, nullable=False),
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("target", sa.Text, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("session_id", sa.Text, nullable=False),
        sa.Column("tries", sa.Integer, nullable=False),
        sa.Column("due_at", sa.BigInteger, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", "id", "target", name="pk_webhook_deliveries"),
        sa.ForeignKeyConstraint(
            ["tenant_id"], ["tenants.id"], name="fk_webhook_deliveries_tenants"
        ),
    )
    op.create_index(
        "ix_webhook_deliveries_target_due_at", "webhook_deliveries", ["target", "due_at"]
    )
