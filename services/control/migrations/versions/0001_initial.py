"""Datasets, models, jobs, events, metrics, idempotency keys.

Revision ID: 0001
"""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

SEQ = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
CURRENT: dict[str, Any] = {"sqlite_where": sa.text('"current"'), "postgresql_where": sa.text('"current"')}
TABLES = ("metrics", "events", "job_metadata", "jobs", "models", "datasets", "idempotency_keys")


def upgrade() -> None:
    op.create_table(
        "datasets",
        *_resource("datasets"),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("uri", sa.Text(), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("counts", sa.JSON(), nullable=False),
    )
    _models()
    _jobs()
    _of_jobs()
    op.create_table(
        "idempotency_keys",
        sa.Column("key", sa.String(255), nullable=False),
        sa.Column("fingerprint", sa.String(64), nullable=False),
        sa.Column("answer", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("key", name="pk_idempotency_keys"),
    )
    _index("idempotency_keys", "created_at")


def downgrade() -> None:
    for table in TABLES:
        op.drop_table(table)


def _models() -> None:
    op.create_table(
        "models",
        *_resource("models"),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("uri", sa.Text(), nullable=False),
        sa.Column("family", sa.String(16), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("base", sa.String(40), nullable=True),
        sa.Column("job", sa.String(40), nullable=True),
        sa.Column("lineage", sa.JSON(), nullable=False),
        sa.Column("current", sa.Boolean(), server_default=sa.false(), nullable=False),
    )
    _index("models", "name")
    op.create_index("uq_models_current_name", "models", ["name"], unique=True, **CURRENT)


def _jobs() -> None:
    op.create_table(
        "jobs",
        *_resource("jobs"),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("reason", sa.JSON(), nullable=True),
        sa.Column("name", sa.String(64), nullable=True),
        sa.Column("model", sa.String(40), nullable=False),
        sa.Column("base", sa.String(40), nullable=True),
        sa.Column("dataset", sa.String(40), nullable=True),
        sa.Column("output_model", sa.String(40), nullable=True),
        sa.Column("request", sa.JSON(), nullable=False),
        sa.Column("inputs", sa.JSON(), nullable=False),
        sa.Column("results", sa.JSON(), nullable=False),
        sa.Column("stage_seconds", sa.JSON(), nullable=False),
        sa.Column("started_at", sa.Double(), nullable=True),
        sa.Column("finished_at", sa.Double(), nullable=True),
        sa.Column("cancel_requested_at", sa.Double(), nullable=True),
        sa.Column("stage", sa.String(16), nullable=True),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("stage_started_at", sa.Double(), nullable=True),
        sa.Column("submitted_at", sa.Double(), nullable=True),
        sa.Column("journal_cursor", sa.Integer(), nullable=False),
        sa.Column("ended_at", sa.Double(), nullable=True),
        sa.Column("unreachable_at", sa.Double(), nullable=True),
        sa.Column("next_at", sa.Double(), nullable=False),
        sa.Column("failures", sa.Integer(), nullable=False),
        sa.Column("last_error", sa.Text(), nullable=True),
        sa.Column("lock_token", sa.String(32), nullable=True),
        sa.Column("lock_expires_at", sa.Double(), nullable=True),
    )
    for columns in (["name"], ["model"], ["base"], ["dataset"], ["output_model"]):
        _index("jobs", *columns)
    for columns in (["kind", "seq"], ["kind", "status", "seq"], ["status", "next_at"]):
        _index("jobs", *columns)


def _of_jobs() -> None:
    op.create_table(
        "job_metadata",
        sa.Column("job_seq", SEQ, sa.ForeignKey("jobs.seq", name="fk_job_metadata_job_seq"), nullable=False),
        sa.Column("key", sa.String(64), nullable=False),
        sa.Column("value", sa.String(512), nullable=False),
        sa.PrimaryKeyConstraint("job_seq", "key", name="pk_job_metadata"),
    )
    _index("job_metadata", "key", "value", "job_seq")
    op.create_table(
        "events",
        *_numbered("events"),
        _job("events"),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("level", sa.String(16), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
    )
    _index("events", "job", "seq")
    op.create_table(
        "metrics",
        *_numbered("metrics"),
        _job("metrics"),
        sa.Column("stage", sa.String(16), nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("values", sa.JSON(), nullable=False),
        sa.UniqueConstraint("job", "stage", "step", name="uq_metrics_job_stage_step"),
    )
    _index("metrics", "job", "seq")


def _numbered(table: str) -> tuple[sa.schema.SchemaItem, ...]:
    return (
        sa.Column("seq", SEQ, autoincrement=True, nullable=False),
        sa.PrimaryKeyConstraint("seq", name=f"pk_{table}"),
    )


def _resource(table: str) -> tuple[sa.schema.SchemaItem, ...]:
    return (
        *_numbered(table),
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.UniqueConstraint("id", name=f"uq_{table}_id"),
    )


def _job(table: str) -> sa.Column[str]:
    return sa.Column("job", sa.String(40), sa.ForeignKey("jobs.id", name=f"fk_{table}_job"), nullable=False)


def _index(table: str, *columns: str) -> None:
    op.create_index(f"ix_{table}_{'_'.join(columns)}", table, list(columns))
