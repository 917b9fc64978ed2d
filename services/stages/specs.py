"""What a stage receives, and what it writes to storage. Imports no torch and no Ray."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import ConfigDict

from dde_core.config import DataConfig, ObjectiveConfig, TrainConfig
from services.api.records import (
    EncodeResult,
    EvaluateResult,
    LedgerResult,
    ModelRecord,
    PairsResult,
    ScorerRecord,
    Stage,
    TrainResult,
)
from services.api.requests import (
    DatasetSource,
    EvaluationConfig,
    GeneratePairs,
    ImageFolder,
    Relabel,
    Rollouts,
    Strict,
    Uri,
    ValidationConfig,
    Workers,
)
from services.storage.sources import SourceRules


class StageSpec(Strict):
    """The base of all specs. ``prefix`` is the folder of this attempt, with its spec, journal and markers.

    ``sources`` are the rules of the control plane: the stage opens no other pairs, prompts and base models.
    """

    job: str
    attempt: int
    prefix: Uri
    sources: SourceRules = SourceRules()

    def base_models(self) -> Iterator[ModelRecord]:
        """The registered models among the spec's fields; aligned ones are the system's own files."""
        for name in type(self).model_fields:
            value = getattr(self, name)
            for record in value if isinstance(value, list) else [value]:
                if isinstance(record, ModelRecord):
                    yield from (each for each in (record, record.adapter_of) if each and each.job is None)

    def scorer_files(self) -> Iterator[str]:
        """The checkpoints and processors of the registered scorers among the spec's fields."""
        for scorer in (*getattr(self, "scorers", ()), *getattr(self, "rewards", ())):
            yield from filter(None, (scorer.uri, scorer.processor))


class EncodeSpec(StageSpec):
    """Encode a dataset's pairs with a model's VAE and tokenizer; ``output`` is the folder of all datasets."""

    source: DatasetSource
    source_digest: str
    model: ModelRecord
    data: DataConfig = DataConfig()
    output: Uri
    actors: int = 1
    use_gpu: bool = False


class LedgerSpec(StageSpec):
    """Compute the errors of the frozen ``model`` on the shards at ``dataset``.

    The draws are those of a run with this ``objective`` and ``training``.
    """

    dataset: Uri
    model: ModelRecord
    objective: ObjectiveConfig
    training: TrainConfig
    actors: int = 1
    use_gpu: bool = False


class TrainSpec(StageSpec):
    """Fine-tune ``model`` on the shards at ``dataset``, or on pairs of ``rollouts``: checkpoints go to
    ``run``, the weights to ``output``.

    ``rewards`` are the records of the rollouts' scorers, in the order of their names, and ``prompts_digest``
    is of the prompts that were checked.

    ``ledger`` is the record of the reference errors, if the job has written or found one. Validation
    generates images with the settings of ``evaluation`` and scores them with ``scorers``, the records of its
    scorers.
    """

    dataset: Uri | None = None
    rollouts: Rollouts | None = None
    rewards: list[ScorerRecord] = []
    prompts_digest: str = ""
    model: ModelRecord
    model_id: str
    name: str
    objective: ObjectiveConfig
    training: TrainConfig
    workers: Workers
    evaluation: EvaluationConfig | None = None
    scorers: list[ScorerRecord] = []
    validation: ValidationConfig | None = None
    ledger: Uri | None = None
    run: Uri
    output: Uri
    use_gpu: bool = False


class EvaluateSpec(StageSpec):
    """Compare each of ``models`` with the one whose name is ``base``, by every one of ``scorers``.

    Images and scores are kept below ``images`` for later evaluations. The report and the image grid go to
    ``output``.
    """

    models: list[ModelRecord | ImageFolder]
    base: str
    scorers: list[ScorerRecord]
    evaluation: EvaluationConfig
    images: Uri
    output: Uri
    actors: int = 1
    use_gpu: bool = False


class GenerateSpec(StageSpec):
    """Draw images of prompts with ``model``, rank them by ``scorers`` and write pairs below ``output``.

    ``prompts_digest`` is of the prompts that were checked; ``scorers`` are those of the request.
    """

    model: ModelRecord
    generate: GeneratePairs
    prompts_digest: str
    scorers: list[ScorerRecord]
    output: Uri
    actors: int = 1
    use_gpu: bool = False


class RelabelSpec(StageSpec):
    """Score both images of every decided pair of ``source`` and write pairs labeled by the only scorer."""

    source: DatasetSource
    source_digest: str
    relabel: Relabel
    scorers: list[ScorerRecord]
    output: Uri
    actors: int = 1
    use_gpu: bool = False


class StageFailure(Strict):
    """``failed.json``: ``code`` is for programs; ``param`` names the invalid field, if any."""

    message: str
    code: str
    param: str | None = None


class StopRequest(Strict):
    """``stop.json``: training finishes its current step, writes a checkpoint and ends.

    Other stages do not read it. "guard": the run's own driver ends training, and goes on with its result.
    """

    why: Literal["pause", "signal", "guard"]


class StageStopped(Strict):
    """``stopped.json``: the stage stopped on request after ``step`` steps, and resumes from there."""

    why: Literal["pause", "signal"]
    step: int


Level = Literal["info", "warning", "error"]


class JournalEvent(Strict):
    """One line of a stage's journal: a message for people, or metrics of a step for programs (or both).

    ``waiting_for``: the room on the cluster that the stage waits for from now on; "" ends the wait. Fields of
    later versions are ignored: a stage of a new image may report to a control plane that is older.
    """

    model_config = ConfigDict(extra="ignore")

    at: float
    level: Level = "info"
    message: str | None = None
    step: int | None = None
    metrics: dict[str, float] | None = None
    waiting_for: str | None = None


RESULTS: dict[Stage, type[Strict]] = {
    "encode": EncodeResult,
    "ledger": LedgerResult,
    "train": TrainResult,
    "evaluate": EvaluateResult,
    "generate": PairsResult,
    "relabel": PairsResult,
}
ENTRY_MODULES: dict[Stage, str] = {
    "encode": "services.ingest encode",
    "ledger": "services.ingest ledger",
    "train": "services.training",
    "evaluate": "services.evaluation",
    "generate": "services.ingest generate",
    "relabel": "services.ingest relabel",
}
"""The arguments of ``python -m``: a module, and the name of the stage if the module has several."""
