"""Files, vaults, credentials, and the keys that credentials are sealed to."""

import sqlalchemy as sa
from alembic import op

revision = "0002_files"
down_revision = "0027"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Spelled out and never changed: tables.py says what is, this says what was then."""
    op.create_table(
        "files",
        sa.Column("tenant_id", sa.Text, nullable=False),
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("filename", sa.Text, nullable=False),
        sa.Column("mime_type", sa.Text, nullable=False),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.Column("sha256", sa.Text, nullable=False),
        sa.Column("downloadable", sa.Boolean, nullable=False),
        sa.Column("scope_id", sa.Text),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("expires_at", sa.BigInteger),
        sa.Column("purged_at", sa.BigInteger),
        sa.PrimaryKeyConstraint("tenant_id", "id", name="pk_files"),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name="fk_files_tenants"),
    )
    op.create_index("ix_files_tenant_id_created_at_id", "files", _PAGE)
    op.create_index("ix_files_expires_at", "files", ["expires_at"])
    op.create_table(
        "vaults",
        sa.Column("tenant_id", sa.Text, nullable=False),
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("updated_at", sa.BigInteger, nullable=False),
        sa.Column("archived_at", sa.BigInteger),
        sa.PrimaryKeyConstraint("tenant_id", "id", name="pk_vaults"),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name="fk_vaults_tenants"),
    )
    op.create_index("ix_vaults_tenant_id_created_at_id", "vaults", _PAGE)
    op.create_table(
        "vault_credentials",
        sa.Column("tenant_id", sa.Text, nullable=False),
        sa.Column("vault_id", sa.Text, nullable=False),
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.Column("host", sa.Text, nullable=False),
        sa.Column("sealed", sa.Text),
        sa.Column("key_id", sa.Text, nullable=False),
        sa.Column("expires_at", sa.BigInteger),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("updated_at", sa.BigInteger, nullable=False),
        sa.Column("archived_at", sa.BigInteger),
        sa.PrimaryKeyConstraint("tenant_id", "id", name="pk_vault_credentials"),
        sa.ForeignKeyConstraint(
            ["tenant_id", "vault_id"],
            ["vaults.tenant_id", "vaults.id"],
            name="fk_vault_credentials_vaults",
        ),
    )
    op.create_index(
        "ix_vault_credentials_tenant_id_vault_id_created_at_id",
        "vault_credentials",
        ["tenant_id", "vault_id", "created_at", "id"],
    )
    op.create_table(
        "vault_keys",
        sa.Column("slot", sa.Text, nullable=False),
        sa.Column("key_id", sa.Text, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("slot", name="pk_vault_keys"),
    )


_PAGE = ["tenant_id", "created_at", "id"]
