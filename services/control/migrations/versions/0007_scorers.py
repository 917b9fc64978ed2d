"""Registered scorers.

Revision ID: 0007
"""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"

SEQ = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "scorers",
        sa.Column("seq", SEQ, autoincrement=True, nullable=False),
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("project", sa.String(64), server_default="default", nullable=False),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("uri", sa.Text(), nullable=False),
        sa.Column("processor", sa.Text(), nullable=True),
        sa.Column("resize", sa.String(16), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.PrimaryKeyConstraint("seq", name="pk_scorers"),
        sa.UniqueConstraint("id", name="uq_scorers_id"),
        sa.UniqueConstraint("project", "name", name="uq_scorers_project_name"),
    )
    op.create_index("ix_scorers_project_seq", "scorers", ["project", "seq"])


def downgrade() -> None:
    op.drop_table("scorers")
