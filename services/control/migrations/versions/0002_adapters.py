"""Models that are LoRA adapters: the record of what they work on.

Revision ID: 0002
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    with op.batch_alter_table("models") as models:
        models.add_column(sa.Column("adapter_of", sa.JSON(), nullable=True))


def downgrade() -> None:
    with op.batch_alter_table("models") as models:
        models.drop_column("adapter_of")
