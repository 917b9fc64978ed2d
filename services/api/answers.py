"""The bodies that the HTTP API answers with, declared once: the control plane builds them, the client parses
them.

The client ignores fields that a newer server adds.
"""

from __future__ import annotations

from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict
from pydantic_core import to_json

from dde_core.family import Family
from dde_core.scorers.kinds import KindName, Level
from services.api.records import (
    FINAL_STATUSES,
    DatasetCounts,
    DatasetStatus,
    DecidedExample,
    EncodeResult,
    EvaluateResult,
    GateResult,
    JobStatus,
    LedgerResult,
    PairsResult,
    Stage,
    StudyCellRecord,
    StudyReport,
    TrainResult,
    Validated,
    WaitReason,
)
from services.api.requests import Cluster, Resize, Scope


class Answer(BaseModel):
    """Base of every answer."""

    model_config = ConfigDict(extra="ignore", frozen=True)


Item = TypeVar("Item", bound=Answer)


class ListView(Answer, Generic[Item]):
    """One page of a list.

    ``has_more``: request the next page with ``after`` set to the last item's id (or step).
    """

    object: Literal["list"]
    data: list[Item]
    has_more: bool


class DeletedView(Answer):
    """Confirms a deletion."""

    id: str
    object: str
    deleted: Literal[True]


class ErrorBody(Answer):
    """``message`` is for people, ``code`` for programs, ``param`` names the invalid field."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorView(Answer):
    """The body of every answer whose HTTP status is 400 or above."""

    error: ErrorBody


class CheckView(Answer):
    """Whether a part was reachable ``age_s`` seconds ago; None before its first check has ended.

    ``detail`` is its error, or what is unusual about a part that is reachable.
    """

    ok: bool
    detail: str | None
    age_s: float | None = None


class ReadyView(Answer):
    """Whether this replica can answer: the database is reachable, and the replica is not ``draining``. "not
    ready" has the HTTP status 503.

    ``checks`` are of database, storage, Ray and Serve. The last three do not decide: without them the API
    still answers.
    """

    status: Literal["ready", "not ready"]
    draining: bool = False
    checks: dict[str, CheckView]

    @property
    def away(self) -> dict[str, str]:
        """The parts that are not reachable, with their errors."""
        return {name: str(check.detail) for name, check in self.checks.items() if not check.ok}


class ReasonView(Answer):
    """Why a job or an evaluation failed or was cancelled, or the making of a dataset."""

    code: str
    message: str
    param: str | None

    def __str__(self) -> str:
        return f"{self.param}: {self.message}" if self.param else self.message


class DatasetView(Answer):
    """Registered preference pairs. ``digest`` identifies their content, ``example`` is a decided row.

    ``generate`` or ``relabel`` is the request of a dataset that a run makes, named ``job``: its status is
    "generating", then "ready" or, with a ``reason``, "failed". ``counts``, ``digest`` and ``result`` are null
    until it is ready.
    """

    id: str
    object: Literal["dataset"]
    name: str
    uri: str
    split: str | None = None
    columns: dict[str, str]
    status: DatasetStatus = "ready"
    reason: ReasonView | None = None
    job: str | None = None
    generate: dict[str, Any] | None = None
    relabel: dict[str, Any] | None = None
    result: PairsResult | None = None
    digest: str | None
    counts: DatasetCounts | None
    example: DecidedExample | None = None
    created_at: int


class ModelView(Answer):
    """A base model or an aligned one. ``base``, ``job`` and ``lineage`` record how an aligned model was made.

    ``id``, ``object``, ``created`` and ``owned_by`` are as in OpenAI's API. ``id`` is what requests call the
    model by: its name while ``current`` is true, that is while the name refers to it, else its ``version``.
    The version never changes, and requests accept it, too; ``base`` and ``adapter_of`` are versions. For LoRA
    adapters, ``uri`` holds the adapters and ``adapter_of`` is the model that they modify. ``NAME@production``
    refers to this version while "production" is among its ``aliases``.
    """

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    version: str
    name: str
    uri: str
    family: Family
    digest: str
    base: str | None
    job: str | None
    adapter_of: str | None
    lineage: dict[str, Any]
    current: bool
    aliases: list[str] = []
    created_at: int


class ScorerView(Answer):
    """A scorer. ``uri`` is null for the built-in ones of the shapes world, which every project has.

    ``level`` is what one number belongs to: an image, all images of a prompt, or all images of a model.
    ``scale`` is the unit and the range of the numbers. ``digest`` is of all files.
    """

    id: str
    object: Literal["scorer"]
    name: str
    kind: KindName
    uri: str | None
    processor: str | None
    resize: Resize
    digest: str
    level: Level
    reads_prompt: bool
    higher_is_better: bool
    scale: str
    created_at: int


class KeyView(Answer):
    """An API key without its secret, which ends in ``hint``. It is accepted until ``revoked_at``."""

    id: str
    object: Literal["api_key"]
    name: str
    project: str
    scopes: list[Scope]
    hint: str
    created_at: int
    revoked_at: int | None


class KeyCreated(KeyView):
    """A new API key. No other answer has its secret, ``key``: only a hash of it is stored."""

    key: str


class ResultView(Answer):
    """The result of each finished stage, and of the gate if the job has one; null before that."""

    encode: EncodeResult | None = None
    ledger: LedgerResult | None = None
    train: TrainResult | None = None
    evaluate: EvaluateResult | None = None
    gate: GateResult | None = None


class WaitingView(Answer):
    """What a job waits for.

    - ``slots``: ``max_active_jobs`` jobs are active.
    - ``project_limit``: ``max_active_jobs_per_project`` jobs of its project are.
    - ``cluster_room``: it has a slot, and its stage waits for machines.
    - ``cluster_unreachable``: its stage cannot be started, or not be observed.

    ``position`` is its place among all queued jobs, from 1; null once it has a slot. It waits ``since`` then
    (Unix time), whatever the reasons were in between.
    """

    position: int | None
    reason: WaitReason
    since: int
    message: str | None

    def __str__(self) -> str:
        """``place 3: 8 of 8 jobs are active``."""
        place = None if self.position is None else f"place {self.position}"
        return ": ".join(part for part in (place, self.message or self.reason) if part)


class RunView(Answer):
    """The fields that alignment jobs and evaluations share.

    ``stage`` is the current stage, or the one that failed. ``waiting`` is null while the job does not wait
    for room, and in the answers of requests that change it.
    """

    id: str
    status: JobStatus
    reason: ReasonView | None
    stage: Stage | None
    stage_seconds: dict[Stage, float]
    created_at: int
    started_at: int | None
    finished_at: int | None
    waiting: WaitingView | None = None

    @property
    def finished(self) -> bool:
        """Whether the status is final, unless a failed job is resumed."""
        return self.status in FINAL_STATUSES


class JobView(RunView):
    """An alignment job. All settings are as requested, with every default filled in.

    ``model`` is the base model's id. ``dataset`` is null and ``rollouts`` an object where the method is
    on-policy. ``aligned_model`` is the id of the trained model, null until training
    finishes. A job with ``pause_requested_at`` is pausing until its status is "paused".
    """

    object: Literal["alignment.job"]
    model: str
    dataset: str | None
    rollouts: dict[str, Any] | None = None
    name: str
    data: dict[str, Any]
    objective: dict[str, Any]
    training: dict[str, Any]
    workers: int | list[int]
    cluster: Cluster = "shared"
    max_wait_s: float | None = None
    evaluation: dict[str, Any]
    validation: dict[str, Any] | None
    promote_if: dict[str, Any] | None = None
    metadata: dict[str, str]
    pause_requested_at: int | None
    aligned_model: str | None
    result: ResultView

    @property
    def state(self) -> str:
        """The status, or "pausing" from the request to pause until the job is paused."""
        is_pausing = self.pause_requested_at is not None and self.status != "paused" and not self.finished
        return "pausing" if is_pausing else self.status


class ComparedView(Answer):
    """One side of a comparison: the ``model``'s id, or the URI of images that were drawn elsewhere."""

    name: str
    model: str | None = None
    images_uri: str | None = None


class EvaluationView(RunView):
    """A comparison of ``models`` with the ``base`` among them, a name: all generate images of the same
    prompts and seeds."""

    object: Literal["evaluation"]
    models: list[ComparedView]
    base: str
    prompts_uri: str
    num_prompts: int
    images_per_prompt: int
    seed: int
    scorers: list[str]
    sample: dict[str, Any]
    compare: dict[str, Any] = {}
    cluster: Cluster = "shared"
    max_wait_s: float | None = None
    result: EvaluateResult | None


class StudyView(RunView):
    """A study: a grid of alignment jobs, its cells, and the evaluations that compare their models.

    Each cell's job has the metadata ``study`` (this id) and ``cell`` (its label). ``evaluations`` are their
    ids, empty until all cells have ended.
    """

    object: Literal["study"]
    name: str
    parallel: int
    on_failure: str
    evaluation: dict[str, Any]
    cells: list[StudyCellRecord]
    evaluations: list[str]
    result: StudyReport | None


class EventView(Answer):
    """One entry of a job's history. ``level`` is "info", "warning" or "error"."""

    id: str
    object: Literal["alignment.job.event"]
    created_at: int
    level: str
    message: str


class MetricView(Answer):
    """The metrics of one step. Each stage counts its own steps. ``at`` is a Unix time in seconds."""

    object: Literal["alignment.job.metrics"]
    stage: Stage
    step: int
    at: float
    metrics: dict[str, float]


class CheckpointView(Answer):
    """The training state after ``step`` steps, written by ``workers`` workers. ``bytes`` is its size in
    storage.

    ``images_seen`` counts the images that went through the U-Net. ``validation`` is null until the checkpoint
    is validated.
    """

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


Parsed = TypeVar("Parsed", bound=Answer)


def parse(view: type[Parsed], body: Any) -> Parsed:
    """Parse decoded JSON as ``view``. The records inside accept dataclasses from JSON only, hence the round
    trip.

    Raises pydantic.ValidationError.
    """
    return view.model_validate_json(to_json(body), extra="ignore")
