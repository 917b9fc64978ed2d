"""The bodies that the HTTP API takes. The client sends them, the control plane and Ray Serve read them; no torch, no Ray."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic_core import PydanticCustomError

from dde_core.config import DataConfig, ObjectiveConfig, SampleConfig, TrainConfig
from dde_core.errors import ConfigError
from dde_core.family import Family

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
Uri = Annotated[str, Field(min_length=1, max_length=2048, pattern=r"^[^\x00-\x1f]+$")]
MetadataKey = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[^\x00]+$")]
MetadataValue = Annotated[str, Field(max_length=512, pattern=r"^[^\x00]*$")]
Scorer = Literal["match", "taste", "fidelity"]
Column = Literal[
    "caption", "jpg_0", "jpg_1", "label_0", "label_1", "has_label", "image_0_uid", "image_1_uid", "chosen", "rejected",
    "chosen_uid", "rejected_uid", "images", "ranks", "image_uids", "pair_id",
]  # fmt: skip
"""What can be read of a row: the names of Pick-a-Pic, of chosen/rejected pairs, of rankings."""
ALL_SCORERS: tuple[Scorer, ...] = ("match", "taste", "fidelity")
MAX_IMAGES = 16


class Strict(BaseModel):
    """Refuses unknown fields, silent conversions and non-finite numbers."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class DatasetSource(Strict):
    """Where preference pairs lie. The kind of files is told from the URI and what is there (see services/pairs/source.py);
    ``columns`` maps the names that are read to those that the files have, where they differ."""

    uri: Uri
    columns: dict[Column, str] = {}


class DatasetCreate(DatasetSource):
    """Register preference pairs."""

    name: Name


class ModelCreate(Strict):
    """Register a base model: a diffusers folder. ``family`` is told from its model_index.json; another one is refused."""

    name: Name
    uri: Uri
    family: Family | None = None


class EvaluationConfig(Strict):
    """Held-out evaluation: one prompt a line in the file at ``prompts_uri``; the same prompt and seed for both models.

    The scorers know the shapes world alone. Other prompts and models take an empty list: pictures and grid, no scores.
    """

    prompts_uri: Uri
    num_prompts: Annotated[int, Field(ge=2, le=100_000)] = 200
    seed: Annotated[int, Field(ge=0, lt=2**62)] = 0
    scorers: list[Scorer] = list(ALL_SCORERS)
    sample: SampleConfig = SampleConfig()


Metric = Literal["held_out_accuracy", "held_out_margin", "match", "taste", "fidelity"]
"""What validation measures of a checkpoint. More is better."""
MAX_WORKERS = 1024
WorkerCount = Annotated[int, Field(gt=0, le=MAX_WORKERS)]


def _checked(value: Any, inner: ValidatorFunctionWrapHandler) -> Any:
    """One error at the field itself: a union's own are one for each of its forms, at places that nobody has sent."""
    try:
        workers = inner(tuple(value) if isinstance(value, list) else value)
        if least_workers(workers) <= most_workers(workers):
            return workers
    except ValidationError:
        pass
    raise PydanticCustomError(
        "workers", "must be a number from 1 to {most}, or two of them as [least, most]", {"most": MAX_WORKERS}
    )


Workers = Annotated[WorkerCount | tuple[WorkerCount, WorkerCount], WrapValidator(_checked)]
"""How many, or [least, most]: the run goes on with as many as the cluster has."""


def most_workers(workers: Workers) -> int:
    """The largest number that a run may have."""
    return workers if isinstance(workers, int) else workers[1]


def least_workers(workers: Workers) -> int:
    """The smallest number that a run may have."""
    return workers if isinstance(workers, int) else workers[0]


class ValidationConfig(Strict):
    """Looks at checkpoints while training goes on, every ``every`` steps (a multiple of ``training.checkpoint_every``, at
    most ``training.steps``) and at step 0, beside the training workers: implicit accuracy on the held-out pairs, where there
    are any, and ``num_prompts`` pictures with the evaluation's settings and scorers. Prompts are those of ``prompts_uri``, or
    without one those that follow the evaluation's in its own file. Picture i is drawn from ``seed`` + i, the same at every
    step.

    The model is made from the checkpoint with the largest ``best_metric`` (None: from the last one).
    """

    every: Annotated[int, Field(gt=0)]
    prompts_uri: Uri | None = None
    num_prompts: Annotated[int, Field(ge=0, le=256)] = 0
    seed: Annotated[int, Field(ge=0, lt=2**62)] = 0
    best_metric: Metric | None = None


class AlignmentJobCreate(Strict):
    """POST one of these, get back an aligned, evaluated, served model.

    ``model`` is the name or id of a registered model, ``dataset`` the id of a registered dataset, ``name`` what the
    aligned model will be called when it is served (default: made from the base's name, the method and the job's id).
    """

    model: str
    dataset: str
    name: Name | None = None
    data: DataConfig = DataConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    training: TrainConfig = TrainConfig()
    workers: Workers = 1
    evaluation: EvaluationConfig
    validation: ValidationConfig | None = None
    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)] = {}


class EvaluationCreate(EvaluationConfig):
    """Compare a registered model with another on held-out prompts."""

    model: str
    base: str


class ImageRequest(Strict):
    """POST /v1/images/generations. Picture i of a request is drawn from seed + i. ``size`` is WIDTHxHEIGHT or "auto"."""

    model: str
    prompt: Annotated[str, Field(min_length=1, max_length=4000)]
    n: Annotated[int, Field(gt=0, le=MAX_IMAGES)] = 1
    size: Annotated[str, Field(pattern=r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$")] = "auto"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    steps: Annotated[int, Field(gt=0, le=1000)] = 25
    guidance_scale: Annotated[float, Field(ge=0, le=100)] = 5.0
    response_format: Literal["b64_json"] = "b64_json"

    def sample(self) -> SampleConfig:
        """The sampling settings. Raises ConfigError for a size that is too large or not a multiple of 8."""
        width, height = (0, 0) if self.size == "auto" else map(int, self.size.split("x"))
        try:
            return SampleConfig(
                steps=self.steps, guidance_scale=self.guidance_scale, height=height, width=width
            )
        except ConfigError as error:
            raise ConfigError("size", self.size, f"{error.field} {error.reason}") from error


class ScoreRequest(Strict):
    """POST /v1/scores. Pictures as base64 PNG or JPEG, one prompt each."""

    images: Annotated[list[str], Field(min_length=1, max_length=256)]
    prompts: Annotated[list[str], Field(min_length=1, max_length=256)]
    scorers: Annotated[list[Scorer], Field(min_length=1)] = list(ALL_SCORERS)
