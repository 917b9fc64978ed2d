"""Datasets that are one split of a folder, and a decided row of each.

Revision ID: 0005
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    with op.batch_alter_table("datasets") as datasets:
        datasets.add_column(sa.Column("split", sa.String(128), nullable=True))
        datasets.add_column(sa.Column("example", sa.JSON(), nullable=True))


def downgrade() -> None:
    with op.batch_alter_table("datasets") as datasets:
        datasets.drop_column("example")
        datasets.drop_column("split")
