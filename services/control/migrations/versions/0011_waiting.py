"""Since when and for what a job waits for room, and how long it has waited before; indexes of the queue.

Revision ID: 0011
"""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"


def upgrade() -> None:
    """Only adds: the version before can go on with these tables."""
    op.add_column("jobs", sa.Column("waiting_since", sa.Double(), nullable=True))
    op.add_column("jobs", sa.Column("waiting_reason", sa.String(32), nullable=True))
    op.add_column("jobs", sa.Column("waiting_message", sa.Text(), nullable=True))
    op.add_column("jobs", sa.Column("waited_s", sa.Double(), nullable=False, server_default=sa.text("0")))
    op.create_index("ix_jobs_status_project_seq", "jobs", ["status", "project", "seq"])
    op.create_index("ix_jobs_status_waiting_since", "jobs", ["status", "waiting_since"])
    op.create_index("ix_jobs_project_started_at", "jobs", ["project", "started_at"])


def downgrade() -> None:
    for index in ("project_started_at", "status_waiting_since", "status_project_seq"):
        op.drop_index(f"ix_jobs_{index}", "jobs")
    for column in ("waited_s", "waiting_message", "waiting_reason", "waiting_since"):
        op.drop_column("jobs", column)
