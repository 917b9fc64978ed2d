"""Datasets whose files have other names for their columns.

Revision ID: 0003
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    with op.batch_alter_table("datasets") as datasets:
        datasets.add_column(sa.Column("columns", sa.JSON(), nullable=False, server_default="{}"))
    with op.batch_alter_table("datasets") as datasets:
        datasets.alter_column("columns", server_default=None)


def downgrade() -> None:
    with op.batch_alter_table("datasets") as datasets:
        datasets.drop_column("columns")
