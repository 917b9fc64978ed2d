"""Rows of the database as answers of the API."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from dde_core.config import DataConfig
from dde_core.scorers.kinds import KINDS
from services.api.answers import (
    CheckpointView,
    DatasetView,
    EvaluationView,
    EventView,
    JobView,
    KeyView,
    MetricView,
    ModelView,
    RunView,
    ScorerView,
    StudyView,
    parse,
)
from services.api.records import FINAL_STATUSES, ScorerRecord, Validated
from services.artifacts.checkpoints import CheckpointRecord
from services.control.launchers import clusters
from services.control.tables import ApiKey, Dataset, Event, Job, Metric, Model

DEFAULT_DATA = asdict(DataConfig())


def dataset_view(row: Dataset, job: Job | None = None) -> DatasetView:
    """``job`` is the run that makes the dataset, if scorers do."""
    made: dict[str, Any] = {}
    if job is not None:
        ended = "ready" if job.status == "succeeded" else "failed"
        made = {
            "status": ended if job.status in FINAL_STATUSES else "generating",
            "reason": job.reason,
            job.kind: job.request,
            "result": job.results.get(job.kind),
        }
    return parse(
        DatasetView,
        {
            "object": "dataset",
            **_columns(row, "id", "name", "uri", "split", "columns", "job", "digest", "counts", "example"),
            **made,
            "created_at": int(row.created_at),
        },
    )


def key_view(row: ApiKey) -> KeyView:
    return KeyView(
        object="api_key",
        **_columns(row, "id", "name", "project", "scopes", "hint"),
        created_at=int(row.created_at),
        revoked_at=_seconds(row.revoked_at),
    )


def model_view(row: Model, aliases: Sequence[str] = ()) -> ModelView:
    columns = ("name", "uri", "family", "digest", "base", "job", "lineage", "current")
    return parse(
        ModelView,
        {
            "id": row.name if row.current else row.id,
            "object": "model",
            "created": int(row.created_at),
            "owned_by": "dde",
            "version": row.id,
            **_columns(row, *columns),
            "adapter_of": row.adapter_of["id"] if row.adapter_of else None,
            "aliases": list(aliases),
            "created_at": int(row.created_at),
        },
    )


def scorer_view(record: ScorerRecord) -> ScorerView:
    kind = KINDS[record.kind]
    return ScorerView(
        object="scorer",
        **record.model_dump(),
        **_columns(kind, "level", "reads_prompt", "higher_is_better", "scale"),
    )


def job_view(row: Job) -> JobView:
    settings = ("objective", "training", "workers", "evaluation", "metadata")
    return parse(
        JobView,
        {
            "object": "alignment.job",
            **_run(row),
            **_columns(row, "model", "dataset", "name"),
            "data": row.request.get("data", DEFAULT_DATA),  # jobs of earlier versions have none
            **{name: row.request[name] for name in settings},
            "rollouts": row.request.get("rollouts"),
            "validation": row.request.get("validation"),
            "cluster": clusters.of_job(row),
            "max_wait_s": row.request.get("max_wait_s"),
            "promote_if": row.request.get("promote_if"),
            "pause_requested_at": _seconds(row.pause_requested_at),
            "aligned_model": row.output_model if "train" in row.results else None,
            "result": row.results,
        },
    )


def evaluation_view(row: Job) -> EvaluationView:
    settings = (
        "models",
        "base",
        "prompts_uri",
        "num_prompts",
        "images_per_prompt",
        "seed",
        "scorers",
        "sample",
    )
    return parse(
        EvaluationView,
        {
            "object": "evaluation",
            **_run(row),
            **{name: row.request[name] for name in settings},
            "cluster": clusters.of_job(row),
            "compare": row.request.get("compare", {}),  # evaluations of earlier versions have none
            "max_wait_s": row.request.get("max_wait_s"),
            "result": row.results.get("evaluate"),
        },
    )


def study_view(row: Job) -> StudyView:
    settings = ("parallel", "on_failure", "evaluation")
    return parse(
        StudyView,
        {
            "object": "study",
            **_run(row),
            **_columns(row, "name"),
            **{name: row.request[name] for name in settings},
            "cells": row.results["cells"],
            "evaluations": row.results["evaluations"],
            "result": row.results.get("report"),
        },
    )


JOB_VIEWS: dict[str, Callable[[Job], RunView]] = {
    "alignment": job_view,
    "evaluation": evaluation_view,
    "study": study_view,
}
"""The answer for a job of each kind."""


def event_view(row: Event) -> EventView:
    return EventView(
        id=f"event_{row.seq:024x}",
        object="alignment.job.event",
        created_at=int(row.created_at),
        level=row.level,
        message=row.message,
    )


def metric_view(row: Metric) -> MetricView:
    return parse(
        MetricView,
        {
            "object": "alignment.job.metrics",
            **_columns(row, "stage", "step", "at"),
            "metrics": row.values,
        },
    )


def checkpoint_view(record: CheckpointRecord, uri: str, validation: Validated | None) -> CheckpointView:
    return CheckpointView(
        object="alignment.job.checkpoint",
        step=record.step,
        pairs_seen=record.pairs_seen,
        images_seen=record.images_seen,
        bytes=record.num_bytes,
        workers=record.workers,
        created_at=int(record.created_at),
        metrics=record.metrics,
        uri=uri,
        validation=validation,
    )


def _run(row: Job) -> dict[str, Any]:
    """The fields that alignment jobs and evaluations share."""
    return {
        **_columns(row, "id", "status", "reason", "stage", "stage_seconds"),
        "created_at": int(row.created_at),
        "started_at": _seconds(row.started_at),
        "finished_at": _seconds(row.finished_at),
    }


def _columns(row: object, *names: str) -> dict[str, Any]:
    return {name: getattr(row, name) for name in names}


def _seconds(at: float | None) -> int | None:
    return None if at is None else int(at)
