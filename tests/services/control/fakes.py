"""A launcher that runs nothing: what a stage would do is a function of its spec, called at submit."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from contextvars import copy_context
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from services.api.records import (
    EncodeResult,
    EvaluateResult,
    Interval,
    LedgerResult,
    PairsResult,
    ScorerReport,
    Stage,
    TrainResult,
)
from services.api.requests import DatasetSource, Strict
from services.artifacts import checkpoints
from services.artifacts.checkpoints import CheckpointRecord, ReaderPosition
from services.control.launchers.contract import Run, RunState, RunStatus
from services.control.stages import ENTRY_MODULES
from services.errors import Unavailable
from services.pairs.source import open_source
from services.pairs.validation import inspect
from services.stages import layout
from services.stages.journal import Journal
from services.stages.specs import (
    EncodeSpec,
    EvaluateSpec,
    GenerateSpec,
    LedgerSpec,
    RelabelSpec,
    StageFailure,
    StageSpec,
    StageStopped,
    TrainSpec,
)
from services.storage import files, sources

Play = Callable[[StageSpec], RunState]
STAGE_OF = {module: stage for stage, module in ENTRY_MODULES.items()}
SPECS: dict[Stage, type[StageSpec]] = {
    "encode": EncodeSpec,
    "ledger": LedgerSpec,
    "train": TrainSpec,
    "evaluate": EvaluateSpec,
    "generate": GenerateSpec,
    "relabel": RelabelSpec,
}


class FakeLauncher:
    """Records what was submitted and stopped.

    ``plays`` maps each stage to its behavior; ``statuses`` is what it reports instead of a run's state.
    ``down`` makes Ray unreachable. Runs in ``deaf`` ignore a
    stop; others then write the marker that every stage writes.
    """

    def __init__(self, **plays: Play) -> None:
        self.plays: dict[Stage, Play] = {
            "encode": encode,
            "ledger": ledger,
            "train": train,
            "evaluate": evaluate,
            "generate": make_pairs,
            "relabel": make_pairs,
            **plays,
        }
        self.states: dict[str, RunState] = {}
        self.statuses: dict[str, RunStatus] = {}
        self.submitted: list[str] = []
        self.stopped: list[str] = []
        self.specs: dict[str, StageSpec] = {}
        self.entrypoints: dict[str, str] = {}
        self.down = False
        self.deaf: set[str] = set()

    def submit(self, run: Run) -> None:
        self._answer()
        submission_id, entrypoint = run.id, run.command
        if submission_id in self.states:
            return
        self.submitted.append(submission_id)
        _, _, *module, _, uri = shlex.split(entrypoint)
        stage = STAGE_OF[" ".join(module)]
        spec = SPECS[stage].model_validate_json(files.read_bytes(uri))
        self.specs[submission_id], self.entrypoints[submission_id] = spec, entrypoint
        self.states[submission_id] = self.plays[stage](spec)

    def status(self, run_id: str) -> RunStatus:
        self._answer()
        return self.statuses.get(run_id, RunStatus(self.states.get(run_id, "unknown")))

    def stop(self, run_id: str) -> None:
        self._answer()
        self.stopped.append(run_id)
        if self.states.get(run_id) in ("pending", "running") and run_id not in self.deaf:
            self.states[run_id] = "stopped"
            fail(self.specs[run_id], "the stage was stopped", "stopped")

    def leave(self, submission_id: str, step: int, why: Literal["pause", "signal"] = "pause") -> None:
        """Let a run end as training does that was asked to stop."""
        marker = files.join(self.specs[submission_id].prefix, "stopped.json")
        files.write_json(marker, StageStopped(why=why, step=step).model_dump())
        self.states[submission_id] = "succeeded"

    def log_tail(self, run_id: str) -> str:
        self._answer()
        return f"\x1b[36mlast words\x1b[0m of {run_id}" if run_id in self.states else ""

    def _answer(self) -> None:
        if self.down:
            raise Unavailable("Ray at http://nowhere does not answer: connection refused")


def encode(spec) -> RunState:
    """Does what the encode stage leaves in storage."""
    journal(spec, 3)
    return done(
        spec,
        EncodeResult(
            dataset=f"{spec.output}/key", digest="d1", counts={"pairs": 8}, reused=False, seconds=0.5
        ),
    )


def ledger(spec) -> RunState:
    journal(spec, 2)
    uri = f"{spec.dataset}/ledgers/key/ledger-0001.json"
    return done(spec, LedgerResult(ledger=uri, draws=1, pairs=8, noise={}, reused=False, seconds=0.5))


def train(spec) -> RunState:
    journal(spec, 5)
    files.copy_folder(spec.model.uri, spec.output)
    lineage = {"job": spec.job, "dataset": "d1", "base": spec.model.digest}
    model = spec.model.model_copy(
        update={
            "id": spec.model_id,
            "name": spec.name,
            "uri": spec.output,
            "digest": "d2",
            "lineage": lineage,
        }
    )
    return done(spec, TrainResult(model=model, step=5, metrics={"loss": 0.5}, seconds=1))


def evaluate(spec) -> RunState:
    journal(spec, 1)
    half = Interval(value=0.5, low=0.4, high=0.6)
    numbers = ScorerReport(base=0.1, candidate=0.2, difference=half, beat_ratio=half)
    candidates = [model.name for model in spec.models if model.name != spec.base]
    scores = {scorer.name: dict.fromkeys(candidates, numbers) for scorer in spec.scorers}
    report = EvaluateResult(
        report=f"{spec.output}/report.json",
        grid=f"{spec.output}/grid.png",
        base=spec.base,
        num_prompts=2,
        images_per_prompt=spec.evaluation.images_per_prompt,
        images_drawn=4,
        scores=scores,
        seconds=0.1,
    )
    return done(spec, report)


def _inspect_as_a_stage(spec, uri: str):
    """Under the rules of the stage, which end with the caller's context."""
    sources.hold_request_to(spec.sources)
    return inspect(open_source(DatasetSource(uri=uri)))


def make_pairs(spec) -> RunState:
    """Writes pairs as a run that scores images leaves them: eight decided ones."""
    journal(spec, 2)
    table = {
        "jpg_0": pa.array([b"0"] * 8, pa.binary()),
        "jpg_1": pa.array([b"1"] * 8, pa.binary()),
        "label_0": [1.0] * 8,
        "label_1": [0.0] * 8,
        "caption": ["a red cross"] * 8,
        "image_0_uid": [f"l{i}" for i in range(8)],
        "image_1_uid": [f"r{i}" for i in range(8)],
    }
    uri = layout.made_pairs_folder(spec.output)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(table), sink)
    files.write_bytes(layout.made_pairs_uri(spec.output, 0), sink.getvalue().to_pybytes())
    counts, digest, example = copy_context().run(_inspect_as_a_stage, spec, uri)
    result = PairsResult(
        digest=digest,
        counts=counts,
        example=example,
        prompts=9,
        images=36,
        ties=1,
        prompts_without_pair=1,
        spreads={"taste": 0.1},
        seconds=1.0,
    )
    return done(spec, result)


def runs(spec) -> RunState:
    """A stage that goes on."""
    journal(spec, 1)
    return "running"


def dies(spec) -> RunState:
    """A driver that leaves no marker."""
    return "failed"


def fails(spec) -> RunState:
    journal(spec, 1)
    return fail(spec, "beta must be positive, got -1", "ConfigError", "beta")


def lacks(spec) -> RunState:
    """A stage for which something was out of reach."""
    return fail(spec, "the object store does not answer", "unavailable")


def fail(spec, message: str, code: str, param: str | None = None) -> RunState:
    failure = StageFailure(message=message, code=code, param=param)
    files.write_json(files.join(spec.prefix, "failed.json"), failure.model_dump())
    return "failed"


def checkpoint(run: str, step: int) -> None:
    """A checkpoint as training writes it."""
    record = CheckpointRecord(
        step=step,
        pairs_seen=4 * step,
        images_seen=8 * step,
        reader=ReaderPosition(epoch=0, pair=4 * step),
        ledger=None,
        identity={},
        workers=2,
        attempt=1,
        created_at=1700000000.5,
        metrics={"loss": 1.0 / step},
        alarms={},
        files={},
    )
    with checkpoints.committed(run, record, lambda: None) as folder:
        (folder / "weights.bin").write_bytes(b"x" * 100)


def journal(spec: StageSpec, steps: int) -> None:
    """As many files as steps, each an event and numbers."""
    writer = Journal(spec.prefix, flush_every_s=0.0)
    for step in range(1, steps + 1):
        writer.event(f"step {step}")
        writer.metrics(step, {"loss": 1.0 / step})
    writer.flush()


def done(spec: StageSpec, result: Strict) -> RunState:
    files.write_json(files.join(spec.prefix, "done.json"), result.model_dump(mode="json"))
    return "succeeded"
