"""Jobs that are paused, and stages that are started again.

Revision ID: 0004
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    with op.batch_alter_table("jobs") as jobs:
        jobs.add_column(sa.Column("pause_requested_at", sa.Double(), nullable=True))
        jobs.add_column(sa.Column("stop_asked_at", sa.Double(), nullable=True))
        jobs.add_column(sa.Column("restarts", sa.Integer(), nullable=False, server_default="0"))
        jobs.add_column(sa.Column("restart_step", sa.Integer(), nullable=False, server_default="0"))
    with op.batch_alter_table("jobs") as jobs:
        jobs.alter_column("restarts", server_default=None)
        jobs.alter_column("restart_step", server_default=None)


def downgrade() -> None:
    with op.batch_alter_table("jobs") as jobs:
        jobs.drop_column("restart_step")
        jobs.drop_column("restarts")
        jobs.drop_column("stop_asked_at")
        jobs.drop_column("pause_requested_at")
