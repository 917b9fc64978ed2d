"""The tables. The migrations create them; a test compares the two."""

from __future__ import annotations

import secrets
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Text,
    UniqueConstraint,
    false,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from services.api.requests import DEFAULT_PROJECT

BigInt = BigInteger().with_variant(Integer, "sqlite")
"""SQLite numbers rows only if the key is INTEGER."""

CURRENT: dict[str, Any] = {"sqlite_where": text('"current"'), "postgresql_where": text('"current"')}


def new_id(prefix: str) -> str:
    """A new id: ``prefix_`` and 24 random hex digits."""
    return f"{prefix}_{secrets.token_hex(12)}"


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012
        dict[str, Any]: JSON(none_as_null=True),
        list[str]: JSON(),
        float: Double,
        int: BigInteger,
    }


class Resource(Base):
    """A row with an id that the API lists. ``seq`` is the order of creation."""

    __abstract__ = True

    seq: Mapped[int] = mapped_column(BigInt, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(40), unique=True)
    created_at: Mapped[float]


class Owned(Resource):
    """A row that belongs to a project. A session of a project finds its own rows alone (database.py)."""

    __abstract__ = True

    project: Mapped[str] = mapped_column(String(64), server_default=DEFAULT_PROJECT)


class ApiKey(Owned):
    """A key of a project. Only the SHA-256 of the key is stored; ``hint`` is how it ends."""

    __tablename__ = "api_keys"

    name: Mapped[str] = mapped_column(String(64))
    scopes: Mapped[list[str]]
    digest: Mapped[str] = mapped_column(String(64), unique=True)
    hint: Mapped[str] = mapped_column(String(8))
    revoked_at: Mapped[float | None]


class Dataset(Owned):
    """``job`` makes its pairs, if scorers do; then ``digest`` and ``counts`` are null until it has ended."""

    __tablename__ = "datasets"

    name: Mapped[str] = mapped_column(String(64))
    uri: Mapped[str] = mapped_column(Text)
    digest: Mapped[str | None] = mapped_column(String(64))
    split: Mapped[str | None] = mapped_column(String(128))
    columns: Mapped[dict[str, Any]] = mapped_column(default=dict)
    counts: Mapped[dict[str, Any] | None]
    job: Mapped[str | None] = mapped_column(String(40), index=True)
    example: Mapped[dict[str, Any] | None]

    __table_args__ = (Index(None, "project", "seq"),)


class Model(Owned):
    """A base model (``base`` and ``job`` are null) or an aligned one.

    ``current``: its name refers to this row, in its project.
    """

    __tablename__ = "models"

    name: Mapped[str] = mapped_column(String(64), index=True)
    uri: Mapped[str] = mapped_column(Text)
    family: Mapped[str] = mapped_column(String(16))
    digest: Mapped[str] = mapped_column(String(64))
    base: Mapped[str | None] = mapped_column(String(40))
    job: Mapped[str | None] = mapped_column(String(40))
    adapter_of: Mapped[dict[str, Any] | None]
    lineage: Mapped[dict[str, Any]]
    current: Mapped[bool] = mapped_column(server_default=false())

    __table_args__ = (
        Index("uq_models_current_name", "project", "name", unique=True, **CURRENT),
        Index(None, "project", "seq"),
    )


class Promotion(Owned):
    """``name@alias`` refers to ``model``, as of the alias's newest row. ``job``: whose gate promoted it."""

    __tablename__ = "promotions"

    name: Mapped[str] = mapped_column(String(64))
    alias: Mapped[str] = mapped_column(String(64))
    model: Mapped[str] = mapped_column(String(40))
    job: Mapped[str | None] = mapped_column(String(40))

    __table_args__ = (Index(None, "project", "name", "alias", "seq"),)


class Scorer(Owned):
    """A registered scorer. The built-in ones have no row."""

    __tablename__ = "scorers"

    name: Mapped[str] = mapped_column(String(64))
    kind: Mapped[str] = mapped_column(String(16))
    uri: Mapped[str] = mapped_column(Text)
    processor: Mapped[str | None] = mapped_column(Text)
    resize: Mapped[str] = mapped_column(String(16))
    digest: Mapped[str] = mapped_column(String(64))

    __table_args__ = (UniqueConstraint("project", "name"), Index(None, "project", "seq"))


class Job(Owned):
    """A chain of stages.

    kind                  "alignment", "evaluation", "study" (studies.py), which has no stages, or how it
                          makes a dataset: "generate" or "relabel"
    inputs                the records of its models, dataset and scorers when it was created; of an on-policy
                          job those of its ``rewards`` and the digest of its prompts instead of a dataset's
    model, base           of an evaluation: its first registered model, and its base if that is registered;
                          ``model`` is "" where it needs none: to relabel a dataset
    pause_requested_at    set until the job is resumed or ends
    attempt               number of the current attempt at the stage
    restarts              attempts that failed since the stage last made progress
    restart_step          training's newest checkpoint at the last restart
    journal_cursor        the next journal file to read
    stop_asked_at         when the attempt was asked to stop
    ended_at              when its driver was first seen to have ended, or was stopped
    unreachable_at        since when Ray is unreachable and the journal silent
    waiting_since         since when it waits for room (waiting.py); null while it does not
    waiting_reason        why, as the last review found; waiting_message explains it
    waited_s              how long it has waited before
    next_at               when the next review is due
    failures, last_error  of reviews, in a row
    lock_token            of the replica that reviews the job, valid until lock_expires_at
    """

    __tablename__ = "jobs"

    kind: Mapped[str] = mapped_column(String(16))
    status: Mapped[str] = mapped_column(String(16))
    reason: Mapped[dict[str, Any] | None]
    name: Mapped[str | None] = mapped_column(String(64), index=True)
    model: Mapped[str] = mapped_column(String(40), index=True)
    base: Mapped[str | None] = mapped_column(String(40), index=True)
    dataset: Mapped[str | None] = mapped_column(String(40), index=True)
    output_model: Mapped[str | None] = mapped_column(String(40), index=True)
    request: Mapped[dict[str, Any]]
    inputs: Mapped[dict[str, Any]]
    results: Mapped[dict[str, Any]]
    stage_seconds: Mapped[dict[str, Any]]
    started_at: Mapped[float | None]
    finished_at: Mapped[float | None]
    cancel_requested_at: Mapped[float | None]
    pause_requested_at: Mapped[float | None]

    stage: Mapped[str | None] = mapped_column(String(16))
    attempt: Mapped[int] = mapped_column(Integer)
    restarts: Mapped[int] = mapped_column(Integer)
    restart_step: Mapped[int] = mapped_column(Integer)
    stage_started_at: Mapped[float | None]
    submitted_at: Mapped[float | None]
    journal_cursor: Mapped[int] = mapped_column(Integer)
    stop_asked_at: Mapped[float | None]
    ended_at: Mapped[float | None]
    unreachable_at: Mapped[float | None]

    waiting_since: Mapped[float | None]
    waiting_reason: Mapped[str | None] = mapped_column(String(32))
    waiting_message: Mapped[str | None] = mapped_column(Text)
    waited_s: Mapped[float] = mapped_column(server_default=text("0"))

    next_at: Mapped[float]
    failures: Mapped[int] = mapped_column(Integer)
    last_error: Mapped[str | None] = mapped_column(Text)
    lock_token: Mapped[str | None] = mapped_column(String(32))
    lock_expires_at: Mapped[float | None]

    __table_args__ = (
        Index(None, "project", "kind", "seq"),
        Index(None, "project", "kind", "status", "seq"),
        Index(None, "status", "next_at"),
        Index(None, "status", "seq"),
        Index(None, "status", "project", "seq"),
        Index(None, "status", "waiting_since"),
        Index(None, "project", "started_at"),
    )


class JobMetadata(Base):
    """A copy of a job's metadata, one row per key, for filters: its index is in the order of lists."""

    __tablename__ = "job_metadata"

    job_seq: Mapped[int] = mapped_column(ForeignKey("jobs.seq"), primary_key=True)
    key: Mapped[str] = mapped_column(String(64), primary_key=True)
    value: Mapped[str] = mapped_column(String(512))

    __table_args__ = (Index(None, "key", "value", "job_seq"),)


class Event(Base):
    __tablename__ = "events"

    seq: Mapped[int] = mapped_column(BigInt, primary_key=True, autoincrement=True)
    job: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    created_at: Mapped[float]
    level: Mapped[str] = mapped_column(String(16))
    message: Mapped[str] = mapped_column(Text)

    __table_args__ = (Index(None, "job", "seq"),)


class Metric(Base):
    """The metrics of one step of one stage."""

    __tablename__ = "metrics"

    seq: Mapped[int] = mapped_column(BigInt, primary_key=True, autoincrement=True)
    job: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    stage: Mapped[str] = mapped_column(String(16))
    step: Mapped[int]
    at: Mapped[float]
    values: Mapped[dict[str, Any]]

    __table_args__ = (UniqueConstraint("job", "stage", "step"), Index(None, "job", "seq"))


class IdempotencyKey(Base):
    """The digest and the answer of the create request of a project that had this key."""

    __tablename__ = "idempotency_keys"

    project: Mapped[str] = mapped_column(String(64), primary_key=True, server_default=DEFAULT_PROJECT)
    key: Mapped[str] = mapped_column(String(255), primary_key=True)
    fingerprint: Mapped[str] = mapped_column(String(64))
    answer: Mapped[dict[str, Any]]
    created_at: Mapped[float] = mapped_column(index=True)
