"""What the processes say to one another: API bodies, stage specs and results, and where things lie in storage.

A job is a chain of stages, each one Ray job that is told what to do by a spec file and answers with a marker file:

    {storage}/jobs/{job}/{stage}/a{attempt}/spec.json       written by the control plane, read by the stage
                                           /journal/*.json  append-only events and metrics, written by the stage
                                           /done.json       the stage's result, written last
                                           /failed.json     or why it could not
                                           /stopped.json    or how far it came before it was asked to stop
                                           /stop.json       that it is asked to, by the control plane (train alone reads it)
    {storage}/jobs/{job}/train/run/checkpoints/step-*/      the run's state (services/checkpoints.py)
                                  /validation/step-*.json   what validation measured of it, and its pictures as .png
                                  /tensorboard/             event files
                                  /pairs/*.parquet          t, margin and gradient weight of every pair of every step
    {storage}/datasets/{key}/manifest.json                  latent shards; no manifest: no shards
    {storage}/datasets/{key}/ledgers/{key}/ledger-*.json    errors of a frozen model on them; no such file: no ledger
    {storage}/models/{model}.json, aliases/{name}.json      what Serve can load, written by the control plane
    {storage}/models/{model}/                               weights of an aligned model: a diffusers folder
                            /credit.json                    where its training put the credit

Imports no torch and no Ray.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator
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
Stage = Literal["encode", "ledger", "train", "evaluate"]
JobStatus = Literal["validating", "queued", "preparing", "running", "evaluating", "succeeded", "failed", "cancelled", "paused"]

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


# ---- API bodies --------------------------------------------------------------------------------------------------


class DatasetSource(Strict):
    """Where preference pairs lie. The kind of files is told from the URI and what is there (see services/sources.py);
    ``columns`` maps the names that are read to those that the files have, where they differ."""

    uri: Uri
    columns: dict[Column, str] = {}


class DatasetCreate(DatasetSource):
    """Register preference pairs."""

    name: Name


class DatasetCounts(Strict):
    """Rows seen, pairs that are decided, ties, rows without a label, and bad rows by cause (pictures not looked at)."""

    rows: int
    pairs: int
    ties: int
    missing: int
    bad: dict[str, int] = {}


class BadExample(Strict):
    """A row that cannot be used: where it stands ("file:group:row"), and what is known of it."""

    row: str
    detail: str


class BadRows(Strict):
    """How many rows of a sample share a cause, and a few of them."""

    count: int
    examples: list[BadExample]


class PictureSizes(Strict):
    """The shorter sides of a sample's pictures, in pixels: the side of the square that is cut out of each."""

    count: int
    min_px: int
    median_px: int
    max_px: int


class DatasetReport(Strict):
    """What a sample of a dataset shows before anything is spent. ``rows`` is null where counting them means reading them.

    ``columns`` maps what is read to the names in the files. ``sampled`` counts rows, and of them decided, tie, missing and
    bad; a row with a picture that cannot be used is bad.
    """

    uri: str
    format: Literal["parquet", "arrow", "jsonl", "folders"]
    shape: Literal["pair", "chosen", "ranking"]
    columns: dict[str, str]
    columns_not_read: list[str]
    rows: int | None
    sampled: dict[str, int]
    bad: dict[str, BadRows]
    pictures: PictureSizes | None


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
            return SampleConfig(steps=self.steps, guidance_scale=self.guidance_scale, height=height, width=width)
        except ConfigError as error:
            raise ConfigError("size", self.size, f"{error.field} {error.reason}") from error


class ScoreRequest(Strict):
    """POST /v1/scores. Pictures as base64 PNG or JPEG, one prompt each."""

    images: Annotated[list[str], Field(min_length=1, max_length=256)]
    prompts: Annotated[list[str], Field(min_length=1, max_length=256)]
    scorers: Annotated[list[Scorer], Field(min_length=1)] = list(ALL_SCORERS)


# ---- models in storage -------------------------------------------------------------------------------------------


class ModelRecord(Strict):
    """``models/{id}.json``: a model that can be aligned, evaluated and served. ``lineage`` is empty for a base.

    ``adapter_of`` is the model on which LoRA adapters work; ``uri`` then holds the adapters alone.
    """

    id: str
    name: str
    uri: Uri
    family: Family
    digest: str
    base: str | None = None
    job: str | None = None
    adapter_of: ModelRecord | None = None
    lineage: dict[str, Any] = {}
    created_at: int


STOP, HEARD = "stop.json", "stopping.json"
"""In a train attempt's folder: a request to stop, and that a worker has heard it."""
CREDIT = "credit.json"
"""Lies beside the weights of an aligned model."""


class CreditBucket(Strict):
    """The pairs of a run whose t lies in one tenth of 1..T: mean margin (none for `sft`), mean gradient weight as it was
    logged, and as it is predicted from the margins alone."""

    t_first: int
    t_last: int
    pairs: int
    margin: float | None
    logged: float
    predicted: float


class CreditRecord(Strict):
    """``credit.json``: where a run put its credit. Noise mode and timestep range of ``objective`` are resolved.

    ``scheduler`` is the base's scheduler config, ``calibration`` the four arrays of coefficients after the last step.
    """

    objective: ObjectiveConfig
    scheduler: dict[str, Any]
    steps: int
    batch_size: int
    calibration: dict[str, list[float]]
    buckets: list[CreditBucket]


# ---- stages ------------------------------------------------------------------------------------------------------


class StageSpec(Strict):
    """What every stage is told. ``prefix`` is the folder of this attempt: spec, journal and markers lie there."""

    job: str
    attempt: int
    prefix: Uri


class EncodeSpec(StageSpec):
    """Encode a dataset's pairs with a model's VAE and tokenizer; ``output`` is the folder under which datasets lie."""

    source: DatasetSource
    source_digest: str
    model: ModelRecord
    data: DataConfig = DataConfig()
    output: Uri
    actors: int = 1
    use_gpu: bool = False


class EncodeResult(Strict):
    """``reused`` says that shards with these settings were there already. ``bad`` counts quarantined rows by cause."""

    dataset: Uri
    digest: str
    counts: dict[str, int]
    bad: dict[str, int] = {}
    reused: bool
    seconds: float


class LedgerSpec(StageSpec):
    """Compute the errors of the frozen ``model`` for every draw that the run of ``objective`` and ``training`` makes of the
    shards at ``dataset``."""

    dataset: Uri
    model: ModelRecord
    objective: ObjectiveConfig
    training: TrainConfig
    actors: int = 1
    use_gpu: bool = False


class LedgerResult(Strict):
    """``ledger`` is the record of ``draws`` draws of each pair. ``noise``: by how much rounding moves the reference's logit
    against itself, at DDE's beta. ``reused``: all of it was there already."""

    ledger: Uri
    draws: int
    pairs: int
    noise: dict[str, float]
    reused: bool
    seconds: float


class TrainSpec(StageSpec):
    """Fine-tune ``model`` on the shards at ``dataset``; ``run`` keeps checkpoints, ``output`` receives the weights.
    ``ledger`` is the record of the reference's errors, where the job has written or found one. Pictures of ``validation`` are
    drawn with ``evaluation``'s settings and scorers."""

    dataset: Uri
    model: ModelRecord
    model_id: str
    name: str
    objective: ObjectiveConfig
    training: TrainConfig
    workers: Workers
    evaluation: EvaluationConfig | None = None
    validation: ValidationConfig | None = None
    ledger: Uri | None = None
    run: Uri
    output: Uri
    use_gpu: bool = False


class TrainResult(Strict):
    """The aligned model's record, the step whose weights it has, and what was measured at that step."""

    model: ModelRecord
    step: int
    metrics: dict[str, float]
    seconds: float


class EvaluateSpec(StageSpec):
    """Compare ``candidate`` with ``base``; report and picture grid are written under ``output``."""

    candidate: ModelRecord
    base: ModelRecord
    evaluation: EvaluationConfig
    output: Uri
    actors: int = 1
    use_gpu: bool = False


class Interval(Strict):
    """An estimate with its 95% interval."""

    value: float
    low: float
    high: float


class ScorerReport(Strict):
    """One scorer: means, the paired difference (candidate - base) and the beat ratio (ties count half)."""

    base: float
    candidate: float
    difference: Interval
    beat_ratio: Interval


class EvaluateResult(Strict):
    report: Uri
    grid: Uri
    num_prompts: int
    scores: dict[Scorer, ScorerReport]
    seconds: float


class StageFailure(Strict):
    """``failed.json``: ``code`` is for programs, ``param`` the field that it is about, where there is one."""

    message: str
    code: str
    param: str | None = None


class Validated(Strict):
    """``validation/step-*.json``: what was measured of a checkpoint and where its pictures lie, or why it could not be."""

    step: int
    metrics: dict[str, float] = {}
    picture: Uri | None = None
    seconds: float
    error: str | None = None


class StopRequest(Strict):
    """``stop.json``: training writes a checkpoint after the step it is at, and ends. Other stages do not read it."""

    why: Literal["pause", "signal"]


class StageStopped(Strict):
    """``stopped.json``: the stage ended because it was asked to, after ``step`` steps, and goes on from there."""

    why: Literal["pause", "signal"]
    step: int


Level = Literal["info", "warning", "error"]


class JournalEvent(Strict):
    """One line of a stage's journal: a message for people, or metrics of a step for programs (or both)."""

    at: float
    level: Level = "info"
    message: str | None = None
    step: int | None = None
    metrics: dict[str, float] | None = None


RESULTS: dict[Stage, type[Strict]] = {
    "encode": EncodeResult,
    "ledger": LedgerResult,
    "train": TrainResult,
    "evaluate": EvaluateResult,
}
ENTRY_MODULES: dict[Stage, str] = {
    "encode": "services.ingest encode",
    "ledger": "services.ingest ledger",
    "train": "services.training",
    "evaluate": "services.evaluation",
}
"""What follows ``python -m``: a module, and which of its stages where it has several."""
