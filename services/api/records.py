"""What is written once and read by several processes: counts, models, stage results, credit. The API answers with them."""

from __future__ import annotations

from typing import Any, Literal

from dde_core.config import ObjectiveConfig
from dde_core.family import Family
from services.api.requests import Scorer, Strict, Uri

Stage = Literal["encode", "ledger", "train", "evaluate"]
JobStatus = Literal[
    "validating", "queued", "preparing", "running", "evaluating", "succeeded", "failed", "cancelled", "paused"
]


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


class EncodeResult(Strict):
    """``reused`` says that shards with these settings were there already. ``bad`` counts quarantined rows by cause."""

    dataset: Uri
    digest: str
    counts: dict[str, int]
    bad: dict[str, int] = {}
    reused: bool
    seconds: float


class LedgerResult(Strict):
    """``ledger`` is the record of ``draws`` draws of each pair. ``noise``: by how much rounding moves the reference's logit
    against itself, at DDE's beta. ``reused``: all of it was there already."""

    ledger: Uri
    draws: int
    pairs: int
    noise: dict[str, float]
    reused: bool
    seconds: float


class TrainResult(Strict):
    """The aligned model's record, the step whose weights it has, and what was measured at that step."""

    model: ModelRecord
    step: int
    metrics: dict[str, float]
    seconds: float


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


class Validated(Strict):
    """``validation/step-*.json``: what was measured of a checkpoint and where its pictures lie, or why it could not be."""

    step: int
    metrics: dict[str, float] = {}
    picture: Uri | None = None
    seconds: float
    error: str | None = None
