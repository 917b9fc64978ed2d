"""What the API answers, as the client reads it. Fields that a newer server adds are ignored."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from services.api.records import (
    DatasetCounts,
    EncodeResult,
    EvaluateResult,
    LedgerResult,
    TrainResult,
    Validated,
)

FINISHED = ("succeeded", "failed", "cancelled")
Item = TypeVar("Item", bound="Answer")


class Answer(BaseModel):
    """Base of everything below."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Resource(Answer):
    """What has an id and stands in lists."""

    id: str
    created_at: float


class Page(Answer, Generic[Item]):
    """One page of a list."""

    data: list[Item]
    has_more: bool = False


class Reason(Answer):
    """Why a job or an evaluation ended as it did."""

    code: str
    message: str
    param: str | None = None

    def __str__(self) -> str:
        return f"{self.param}: {self.message}" if self.param else self.message


class Dataset(Resource):
    """Registered preference pairs."""

    name: str
    uri: str
    columns: Mapping[str, str] = Field(default_factory=dict)
    digest: str | None = None
    counts: DatasetCounts | None = None


class Model(Resource):
    """A base model, or an aligned one with its lineage."""

    name: str
    uri: str
    family: str
    digest: str | None = None
    base: str | None = None
    job: str | None = None
    adapter_of: str | None = None


class JobResult(Answer):
    """What the finished stages answered."""

    encode: EncodeResult | None = None
    ledger: LedgerResult | None = None
    train: TrainResult | None = None
    evaluate: EvaluateResult | None = None


class Job(Resource):
    """One alignment job. ``training`` is as it was asked for, with every default filled in."""

    status: str
    pause_requested_at: float | None = None
    name: str | None = None
    model: str
    dataset: str
    stage: str | None = None
    reason: Reason | None = None
    aligned_model: str | None = None
    training: Mapping[str, Any] = Field(default_factory=dict)
    result: JobResult | None = None
    stage_seconds: Mapping[str, float | None] = Field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """Will the status stay as it is, unless a failed job is resumed?"""
        return self.status in FINISHED

    @property
    def state(self) -> str:
        """The status, or "pausing" while what runs is being brought to rest."""
        return (
            "pausing"
            if self.pause_requested_at and self.status != "paused" and not self.finished
            else self.status
        )


class Event(Resource):
    """One line of a job's history."""

    level: str = "info"
    message: str


class MetricRow(Answer):
    """The numbers of one step of a stage. Each stage counts its own steps."""

    stage: str
    step: int
    at: float
    metrics: Mapping[str, float]


class Checkpoint(Answer):
    """The state of training after ``step`` steps, and what validation measured of it."""

    step: int
    pairs_seen: int
    images_seen: int
    bytes: int
    workers: int
    created_at: float
    metrics: Mapping[str, float]
    uri: str
    validation: Validated | None = None


class Evaluation(Resource):
    """A comparison of two registered models."""

    status: str
    model: str
    base: str
    reason: Reason | None = None
    result: EvaluateResult | None = None

    @property
    def finished(self) -> bool:
        """Will the status stay as it is?"""
        return self.status in FINISHED


def parse(answer: type[Item], body: Any) -> Item:
    """A JSON value as a typed answer. Parsed as JSON: the contracts' strict types take dataclasses from JSON only."""
    return answer.model_validate_json(json.dumps(body))
