"""Projects and their API keys. All rows of earlier versions belong to the default project.

Revision ID: 0006
"""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"

SEQ = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
CURRENT: dict[str, Any] = {"sqlite_where": sa.text('"current"'), "postgresql_where": sa.text('"current"')}
OLD_INDEXES = {
    "datasets": (),
    "models": (),
    "jobs": (("kind", "seq"), ("kind", "status", "seq")),
}
NEW_INDEXES = {
    "datasets": (("project", "seq"),),
    "models": (("project", "seq"),),
    "jobs": (("project", "kind", "seq"), ("project", "kind", "status", "seq"), ("status", "seq")),
}


def upgrade() -> None:
    op.create_table(
        "api_keys",
        sa.Column("seq", SEQ, autoincrement=True, nullable=False),
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        _project(),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("scopes", sa.JSON(), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("hint", sa.String(8), nullable=False),
        sa.Column("revoked_at", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("seq", name="pk_api_keys"),
        sa.UniqueConstraint("id", name="uq_api_keys_id"),
        sa.UniqueConstraint("digest", name="uq_api_keys_digest"),
    )
    op.drop_index("uq_models_current_name", "models")
    for table, indexes in NEW_INDEXES.items():
        op.add_column(table, _project())
        _replace(table, OLD_INDEXES[table], indexes)
    op.create_index("uq_models_current_name", "models", ["project", "name"], unique=True, **CURRENT)
    _key_answers_by("project", "key")


def downgrade() -> None:
    """Raises RuntimeError if other projects have rows: without the column they would be everybody's."""
    for table in NEW_INDEXES:
        others = sa.table(table, sa.column("project"))
        if op.get_bind().scalar(sa.select(sa.exists().where(others.c.project != "default"))):
            raise RuntimeError(f"{table} of other projects exist: delete them before the downgrade")
    op.drop_index("uq_models_current_name", "models")
    for table, indexes in NEW_INDEXES.items():
        _replace(table, indexes, OLD_INDEXES[table])
        op.drop_column(table, "project")
    op.create_index("uq_models_current_name", "models", ["name"], unique=True, **CURRENT)
    _key_answers_by("key")
    op.drop_table("api_keys")


def _project() -> sa.Column[str]:
    return sa.Column("project", sa.String(64), server_default="default", nullable=False)


def _replace(table: str, old: tuple[tuple[str, ...], ...], new: tuple[tuple[str, ...], ...]) -> None:
    for columns in old:
        op.drop_index(f"ix_{table}_{'_'.join(columns)}", table)
    for columns in new:
        op.create_index(f"ix_{table}_{'_'.join(columns)}", table, list(columns))


def _key_answers_by(*columns: str) -> None:
    """Give idempotency_keys the primary key ``columns``; its rows stay."""
    with op.batch_alter_table("idempotency_keys") as answers:
        answers.drop_constraint("pk_idempotency_keys", type_="primary")
        if "project" in columns:
            answers.add_column(_project())
        else:
            answers.drop_column("project")
        answers.create_primary_key("pk_idempotency_keys", list(columns))
