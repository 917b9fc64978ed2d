"""Promotions: which version of a model an alias refers to, and which ones it referred to before.

Revision ID: 0009
"""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    op.create_table(
        "promotions",
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True),
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("project", sa.String(64), server_default="default", nullable=False),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("alias", sa.String(64), nullable=False),
        sa.Column("model", sa.String(40), nullable=False),
        sa.Column("job", sa.String(40), nullable=True),
        sa.PrimaryKeyConstraint("seq", name="pk_promotions"),
        sa.UniqueConstraint("id", name="uq_promotions_id"),
    )
    op.create_index("ix_promotions_project_name_alias_seq", "promotions", ["project", "name", "alias", "seq"])


def downgrade() -> None:
    op.drop_table("promotions")
