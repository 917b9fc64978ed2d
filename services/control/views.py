"""What the API answers: the shapes, for the OpenAPI document, and rows turned into them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel

from dde_core.config import DataConfig
from dde_core.family import Family
from services.api.records import (
    DatasetCounts,
    EncodeResult,
    EvaluateResult,
    JobStatus,
    LedgerResult,
    Stage,
    TrainResult,
    Validated,
)
from services.api.requests import Scorer
from services.artifacts.checkpoints import CheckpointRecord
from services.control.tables import Dataset, Event, Job, Metric, Model
from services.control.transitions import STAGES

Item = TypeVar("Item")


class ListView(BaseModel, Generic[Item]):
    object: Literal["list"]
    data: list[Item]
    has_more: bool


class DeletedView(BaseModel):
    id: str
    object: str
    deleted: Literal[True]


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorView(BaseModel):
    error: ErrorBody


class DatasetView(BaseModel):
    id: str
    object: Literal["dataset"]
    name: str
    uri: str
    columns: dict[str, str]
    digest: str
    counts: DatasetCounts
    created_at: int


class ModelView(BaseModel):
    """``current``: the name means this model. ``base``, ``job`` and ``lineage`` say where an aligned model is from.

    ``adapter_of`` is the id of the model on which LoRA adapters work; ``uri`` then holds the adapters alone.
    """

    id: str
    object: Literal["model"]
    name: str
    uri: str
    family: Family
    digest: str
    base: str | None
    job: str | None
    adapter_of: str | None
    lineage: dict[str, Any]
    current: bool
    created_at: int


class ReasonView(BaseModel):
    code: str
    message: str
    param: str | None


class ResultView(BaseModel):
    """The result of each stage that is done."""

    encode: EncodeResult | None = None
    ledger: LedgerResult | None = None
    train: TrainResult | None = None
    evaluate: EvaluateResult | None = None


class RunView(BaseModel):
    """What alignment jobs and evaluations share. ``stage`` is where the job is, or where it failed."""

    id: str
    status: JobStatus
    reason: ReasonView | None
    stage: Stage | None
    stage_seconds: dict[Stage, float]
    created_at: int
    started_at: int | None
    finished_at: int | None


class JobView(RunView):
    """``model`` is an id, whatever name was given; ``aligned_model`` is there once training is done. A job with a
    ``pause_requested_at`` is being paused until its status is paused."""

    object: Literal["alignment.job"]
    model: str
    dataset: str
    name: str
    data: dict[str, Any]
    objective: dict[str, Any]
    training: dict[str, Any]
    workers: int | list[int]
    evaluation: dict[str, Any]
    validation: dict[str, Any] | None
    metadata: dict[str, str]
    pause_requested_at: int | None
    aligned_model: str | None
    result: ResultView


class EvaluationView(RunView):
    object: Literal["evaluation"]
    model: str
    base: str
    prompts_uri: str
    num_prompts: int
    seed: int
    scorers: list[Scorer]
    sample: dict[str, Any]
    result: EvaluateResult | None


class EventView(BaseModel):
    id: str
    object: Literal["alignment.job.event"]
    created_at: int
    level: str
    message: str


class MetricView(BaseModel):
    object: Literal["alignment.job.metrics"]
    stage: Stage
    step: int
    at: float
    metrics: dict[str, float]


class CheckpointView(BaseModel):
    """The state of training after ``step`` steps. ``workers`` wrote it, ``images_seen`` counts pictures that went through the
    U-Net; ``validation`` is what was measured of it beside training, null where nothing was (yet)."""

    object: Literal["alignment.job.checkpoint"]
    step: int
    pairs_seen: int
    images_seen: int
    bytes: int
    workers: int
    created_at: int
    metrics: dict[str, float]
    uri: str
    validation: Validated | None


def dataset_view(row: Dataset) -> dict[str, Any]:
    return {
        "id": row.id,
        "object": "dataset",
        "name": row.name,
        "uri": row.uri,
        "columns": row.columns,
        "digest": row.digest,
        "counts": row.counts,
        "created_at": int(row.created_at),
    }


def model_view(row: Model) -> dict[str, Any]:
    plain = ("name", "uri", "family", "digest", "base", "job", "lineage", "current")
    return {
        "id": row.id,
        "object": "model",
        **{name: getattr(row, name) for name in plain},
        "adapter_of": row.adapter_of["id"] if row.adapter_of else None,
        "created_at": int(row.created_at),
    }


def _run_view(row: Job) -> dict[str, Any]:
    return {
        "status": row.status,
        "reason": row.reason,
        "stage": row.stage,
        "stage_seconds": row.stage_seconds,
        "created_at": int(row.created_at),
        "started_at": _seconds(row.started_at),
        "finished_at": _seconds(row.finished_at),
    }


def job_view(row: Job) -> dict[str, Any]:
    asked = ("objective", "training", "workers", "evaluation", "metadata")
    return {
        "id": row.id,
        "object": "alignment.job",
        **_run_view(row),
        "model": row.model,
        "dataset": row.dataset,
        "name": row.name,
        "data": row.request.get("data", asdict(DataConfig())),  # jobs of earlier versions have none
        **{name: row.request[name] for name in asked},
        "validation": row.request.get("validation"),
        "pause_requested_at": _seconds(row.pause_requested_at),
        "aligned_model": row.output_model if "train" in row.results else None,
        "result": {stage: row.results.get(stage) for stage in STAGES["alignment"]},
    }


def evaluation_view(row: Job) -> dict[str, Any]:
    asked = ("prompts_uri", "num_prompts", "seed", "scorers", "sample")
    return {
        "id": row.id,
        "object": "evaluation",
        **_run_view(row),
        "model": row.model,
        "base": row.base,
        **{name: row.request[name] for name in asked},
        "result": row.results.get("evaluate"),
    }


def event_view(row: Event) -> dict[str, Any]:
    return {
        "id": f"event_{row.seq:024x}",
        "object": "alignment.job.event",
        "created_at": int(row.created_at),
        "level": row.level,
        "message": row.message,
    }


def metric_view(row: Metric) -> dict[str, Any]:
    return {
        "object": "alignment.job.metrics",
        "stage": row.stage,
        "step": row.step,
        "at": row.at,
        "metrics": row.values,
    }


def checkpoint_view(record: CheckpointRecord, uri: str, validation: dict[str, Any] | None) -> dict[str, Any]:
    plain = ("step", "pairs_seen", "images_seen", "workers", "metrics")
    return {
        "object": "alignment.job.checkpoint",
        **{name: getattr(record, name) for name in plain},
        "bytes": record.num_bytes,
        "created_at": int(record.created_at),
        "uri": uri,
        "validation": validation,
    }


def _seconds(at: float | None) -> int | None:
    return None if at is None else int(at)
