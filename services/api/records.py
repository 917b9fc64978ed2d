"""Records that one process writes and others read: counts, models, stage results, credit.

API answers contain them.
"""

from __future__ import annotations

from typing import Any, Literal

from dde_core.config import ObjectiveConfig
from dde_core.family import Family
from dde_core.scorers.kinds import KindName
from dde_core.verdict import Verdict
from services.api.requests import Resize, Strict, Uri

Stage = Literal["encode", "ledger", "train", "evaluate", "generate", "relabel"]
JobStatus = Literal[
    "validating", "queued", "preparing", "running", "evaluating", "succeeded", "failed", "cancelled", "paused"
]
WaitReason = Literal["slots", "project_limit", "cluster_room", "cluster_unreachable"]
DatasetStatus = Literal["generating", "ready", "failed"]
FINAL_STATUSES: frozenset[JobStatus] = frozenset({"succeeded", "failed", "cancelled"})
"""Only a request changes these: a failed job may be resumed."""


CHECKPOINT_SECONDS = "checkpoint_s"
"""Among the metrics of a training step: how long it took to store the checkpoint of that step."""


class PairCounts(Strict):
    """Decided pairs: all; with a soft label (the winner's share is below 1); repetitions of an earlier pair;
    pairs that another pair contradicts; and those whose caption CLIP's tokenizer cuts at 77 tokens for sure.

    Null: not counted by the version that registered the dataset.
    """

    pairs: int
    soft: int | None = None
    duplicates: int | None = None
    contradicting: int | None = None
    long_captions: int | None = None


class DatasetCounts(PairCounts):
    """Rows of a dataset: all, decided pairs, ties, without a label, and bad rows by cause.

    Images are not read: they are compared by their uids.
    """

    rows: int
    ties: int
    missing: int
    bad: dict[str, int] = {}


class BadExample(Strict):
    """An unusable row: its position as "file:group:row", and the reason."""

    row: str
    detail: str


class BadRows(Strict):
    """How many rows of a sample are bad for one cause, and a few of them."""

    count: int
    examples: list[BadExample]


class DecidedExample(Strict):
    """A decided row in words: which image was preferred for the caption. Check the direction."""

    row: str
    chosen: str
    rejected: str
    caption: str


class PictureSizes(Strict):
    """Lengths of the shorter side of a sample's images, in pixels: each image is cropped to that square.

    ``transparent`` images have pixels that show the background.
    """

    count: int
    min_px: int
    median_px: int
    max_px: int
    transparent: int


class DatasetReport(Strict):
    """What a sample of a dataset contains. ``rows`` is null if counting would require reading all files.

    ``columns`` maps expected column names to the ones in the files. ``sampled`` counts the sampled rows in
    total and by kind: decided, tie, missing (no label) and bad. A row with an unusable image is bad.
    ``files_not_read`` counts, by suffix, the files of a folder that are neither rows nor images;
    ``parts_missing`` the files that the names of others tell of.
    ``pairs`` are those of the sample; their images are compared by content.
    """

    uri: str
    format: Literal["parquet", "arrow", "jsonl", "json", "csv", "tar", "folders"]
    shape: Literal["pair", "chosen", "ranking"]
    split: str | None = None
    columns: dict[str, str]
    columns_not_read: list[str]
    files_not_read: dict[str, int] = {}
    parts_missing: int = 0
    rows: int | None
    sampled: dict[str, int]
    example: DecidedExample | None = None
    pairs: PairCounts
    bad: dict[str, BadRows]
    pictures: PictureSizes | None


class ModelRecord(Strict):
    """A model that can be aligned, evaluated and served, as stored at ``models/{id}.json``.

    ``lineage`` is empty for a base model. For LoRA adapters, ``uri`` holds the adapters and ``adapter_of`` is
    the model that they modify.
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


class ScorerRecord(Strict):
    """A scorer that evaluations, validation and Serve may use, as stored at ``scorers/{name}.json``.

    ``uri`` has its checkpoint and ``processor`` its tokenizer and image settings where these are not beside
    it; both are null for the scorers of the shapes world. ``resize``: how `hps` makes an image smaller.
    ``digest`` is of all files.
    """

    id: str
    name: str
    kind: KindName
    uri: Uri | None = None
    processor: Uri | None = None
    resize: Resize = "antialiased"
    digest: str
    created_at: int


class PairsResult(Strict):
    """Result of making pairs: ``counts``, ``digest`` and ``example`` are as registration finds them.

    ``prompts`` were drawn, ``images`` scored, ``ties`` dropped because their scores differ by at most the
    margin; ``prompts_without_pair`` have no other pairs. ``spreads`` is the standard deviation of each scorer
    among images of one prompt. Of a relabeled dataset, ``prompts`` are its decided pairs, ``agreement`` is
    the fraction of the kept pairs in which the scorer prefers the image that people preferred, and ``bad``
    counts pairs with an unusable image and rows that are unusable, by cause.
    """

    digest: str
    counts: DatasetCounts
    example: DecidedExample
    prompts: int
    images: int
    ties: int
    prompts_without_pair: int
    spreads: dict[str, float]
    agreement: float | None = None
    bad: dict[str, int] = {}
    seconds: float


class CreditBucket(Strict):
    """The pairs of a run whose timestep is from ``t_first`` to ``t_last``, one tenth of 1..T.

    Their mean margin (null for `sft`), and their mean gradient weight as logged and as predicted from the
    margins.
    """

    t_first: int
    t_last: int
    pairs: int
    margin: float | None
    logged: float
    predicted: float


class CreditRecord(Strict):
    """Where a run put its credit, as stored in ``credit.json``. ``objective`` has every "auto" resolved.

    ``scheduler`` is the base model's scheduler config. ``calibration`` has the four arrays of coefficients
    after the last step.
    """

    objective: ObjectiveConfig
    scheduler: dict[str, Any]
    steps: int
    batch_size: int
    calibration: dict[str, list[float]]
    buckets: list[CreditBucket]


class EncodeResult(Strict):
    """Result of encoding.

    ``bad`` counts quarantined rows by cause. ``reused``: the encoded dataset existed already.
    """

    dataset: Uri
    digest: str
    counts: dict[str, int]
    bad: dict[str, int] = {}
    reused: bool
    seconds: float


class LedgerResult(Strict):
    """Result of recording the reference's errors: ``ledger`` is the URI, with ``draws`` draws of each pair.

    ``noise`` is how far rounding moves the reference's logit against itself, at DDE's beta. ``reused``: the
    ledger existed already.
    """

    ledger: Uri
    draws: int
    pairs: int
    noise: dict[str, float]
    reused: bool
    seconds: float


class TrainResult(Strict):
    """Result of training: the aligned model, the step of its weights and the metrics of that step."""

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
    """One scorer and one candidate: means, the paired difference (candidate - base), the beat ratio (ties
    count half), and what they say.
    """

    base: float
    candidate: float
    difference: Interval
    beat_ratio: Interval
    verdict: Verdict | None = None


class DriftResult(Strict):
    """How far a candidate's images have moved from the base's, and whether that is beyond the limit (null:
    none was set or measured).
    """

    value: float
    limit: float | None
    is_beyond: bool


class EvaluateResult(Strict):
    """Result of a comparison: URIs of the report (JSON, and a page of HTML) and the image grid, and each
    scorer's numbers.

    ``scores`` has the numbers of each candidate against ``base``, by scorer and candidate, and ``drift``
    those of scorers that compare all images of two models. ``summary`` says for each candidate what they
    mean. ``images_drawn`` counts the images that were not in storage already.
    """

    report: Uri
    page: Uri | None = None
    grid: Uri
    summary: list[str] = []
    base: str
    num_prompts: int
    images_per_prompt: int
    images_drawn: int
    scores: dict[str, dict[str, ScorerReport]]
    drift: dict[str, dict[str, DriftResult]] = {}
    seconds: float


class GateResult(Strict):
    """Whether a job's model passed its gate, and why not. ``alias`` refers to the model if it ``passed``."""

    passed: bool
    alias: str
    reasons: list[str]


CellStatus = Literal["waiting"] | JobStatus


class StudyCellRecord(Strict):
    """A cell of a study: its job once that exists, and the aligned model once it is trained.

    ``reason`` is why it has failed; without a job, why none could be created.
    """

    label: str
    setting: str
    overrides: dict[str, Any]
    status: CellStatus = "waiting"
    job: str | None = None
    model: str | None = None
    reason: str | None = None


class StudySetting(Strict):
    """Cells that differ by their seeds alone: how many there are and have a model, the mean score over their
    models and all prompts (of scorers of kind drift: over their models), and the cost of all of them.

    ``seconds`` are sums of their jobs' stages; ``images`` counts what validation and the jobs' own
    evaluations have drawn.
    """

    setting: str
    overrides: dict[str, Any]
    cells: int
    models: int
    scores: dict[str, float]
    seconds: dict[str, float]
    images: int


class Contrast(Strict):
    """The mean difference of one scorer between two settings, or a setting and the base (``against`` null).

    It is over ``seeds`` that both settings have and ``prompts``. ``by`` is the wider of the interval over
    both, by bootstrap, and Student's over seeds; that one needs two. Scorers of kind drift, whose numbers are
    lower for less drift, have Student's alone, between two settings. ``adjusted_p`` is Holm's, over all
    contrasts of the study.
    """

    scorer: str
    setting: str
    against: str | None
    seeds: int
    prompts: int
    difference: Interval
    by: Literal["bootstrap", "t"]
    p: float
    adjusted_p: float


class StudyReport(Strict):
    """What a study found, also as JSON and as a page with learning curves, both in storage.

    ``base_scores`` are the base's means. ``seconds`` and ``images`` are those of the study's evaluations.
    """

    report: Uri
    page: Uri
    base_scores: dict[str, float]
    settings: list[StudySetting]
    contrasts: list[Contrast]
    seconds: float
    images: int

    def scorers(self) -> list[str]:
        """Every scorer with means; those that measure distance from the base have none of the base."""
        of_settings = (name for each in self.settings for name in each.scores)
        return list(dict.fromkeys([*self.base_scores, *of_settings]))


class Validated(Strict):
    """Validation of one checkpoint: its metrics and the URI of its images, or why it failed."""

    step: int
    metrics: dict[str, float] = {}
    picture: Uri | None = None
    seconds: float
    error: str | None = None
