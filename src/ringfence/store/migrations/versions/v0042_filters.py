"""Lists of sessions and files behind their filters, and how many bytes a tenant's files take."""

import sqlalchemy as sa
from alembic import op

revision = "0042_filters"
down_revision = "0041_slo"
branch_labels = None
depends_on = None

_LIVE = (("agent_id", "status"), ("agent_id", "agent_version"))


def upgrade() -> None:
    """Spelled out and never changed: tables.py says what is, this says what was then."""
    live = sa.text("archived_at IS NULL")
    for by in _LIVE:
        op.create_index(
            "_".join(("ix_sessions", *by, "live")),
            "sessions",
            ["tenant_id", *by, "created_at", "id"],
            sqlite_where=live,
            postgresql_where=live,
        )
    op.create_index(
        "ix_sessions_tenant_id_status_created_at_id",
        "sessions",
        ["tenant_id", "status", "created_at", "id"],
    )
    op.create_index(
        "ix_files_tenant_id_scope_id_created_at_id",
        "files",
        ["tenant_id", "scope_id", "created_at", "id"],
    )
    op.execute(
        "INSERT INTO tenant_counts (tenant_id, kind, held) "
        "SELECT tenant_id, 'file_bytes', sum(size_bytes) FROM files "
        "WHERE purged_at IS NULL GROUP BY tenant_id"
    )
