"""Datasets that a job makes: without counts until it has ended.

Revision ID: 0010
"""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    with op.batch_alter_table("datasets") as datasets:
        datasets.add_column(sa.Column("job", sa.String(40), nullable=True))
        datasets.alter_column("digest", existing_type=sa.String(64), nullable=True)
        datasets.alter_column("counts", existing_type=sa.JSON(), nullable=True)
        datasets.create_index("ix_datasets_job", ["job"])


def downgrade() -> None:
    """Datasets that a job makes are forgotten, and so are the jobs that make them."""
    op.execute("DELETE FROM datasets WHERE job IS NOT NULL")
    made = "(SELECT id FROM jobs WHERE kind IN ('generate', 'relabel'))"
    op.execute(f"DELETE FROM events WHERE job IN {made}")
    op.execute(f"DELETE FROM metrics WHERE job IN {made}")
    op.execute("DELETE FROM jobs WHERE kind IN ('generate', 'relabel')")
    with op.batch_alter_table("datasets") as datasets:
        datasets.drop_index("ix_datasets_job")
        datasets.alter_column("counts", existing_type=sa.JSON(), nullable=False)
        datasets.alter_column("digest", existing_type=sa.String(64), nullable=False)
        datasets.drop_column("job")
