"""What a stage of a job is told, and under which names it runs."""

from __future__ import annotations

import json
import shlex
from typing import Any

from services.api.records import ModelRecord
from services.api.requests import AlignmentJobCreate, DatasetSource, EvaluationConfig
from services.artifacts import models
from services.control.tables import Job
from services.settings import Settings
from services.stages.specs import ENTRY_MODULES, EncodeSpec, EvaluateSpec, LedgerSpec, StageSpec, TrainSpec
from services.storage import files


def prefix(job: Job, root: str) -> str:
    """The folder of the job's current attempt: spec, journal and markers."""
    return files.join(root, "jobs", job.id, str(job.stage), f"a{job.attempt}")


def run_folder(job_id: str, root: str) -> str:
    """Where every attempt to train finds and leaves checkpoints, and what validation measured of them."""
    return files.join(root, "jobs", job_id, "train", "run")


def submission_id(job: Job) -> str:
    """The same for the same attempt, so that a repeated submit starts nothing twice."""
    return f"{job.id}-{job.stage}-a{job.attempt}"


def entrypoint(job: Job, root: str) -> str:
    """The command of the job's current stage."""
    uri = files.join(prefix(job, root), "spec.json")
    return f"python -m {ENTRY_MODULES[job.stage]} --spec {shlex.quote(uri)}"  # type: ignore[index]


def spec(job: Job, settings: Settings) -> StageSpec:
    """What the job's current stage is told."""
    root = settings.storage_uri
    frame = {"job": job.id, "attempt": job.attempt, "prefix": prefix(job, root), "use_gpu": settings.use_gpu}
    return _BUILDERS[job.stage](job, settings, frame)  # type: ignore[index]


def aligned_record(job: Job, record: ModelRecord) -> ModelRecord:
    """The record of what training made, under the id and name that the job was given."""
    return record.model_copy(
        update={"id": job.output_model, "name": job.name, "base": job.model, "job": job.id}
    )


def _asked(job: Job) -> AlignmentJobCreate:
    return AlignmentJobCreate.model_validate_json(json.dumps(job.request))


def _encode(job: Job, settings: Settings, frame: dict[str, Any]) -> EncodeSpec:
    dataset = job.inputs["dataset"]
    return EncodeSpec(
        **frame,
        source=DatasetSource(uri=dataset["uri"], columns=dataset.get("columns", {})),
        source_digest=dataset["digest"],
        model=ModelRecord(**job.inputs["model"]),
        data=_asked(job).data,
        output=files.join(settings.storage_uri, "datasets"),
        actors=settings.encode_actors,
    )


def _ledger(job: Job, settings: Settings, frame: dict[str, Any]) -> LedgerSpec:
    asked = _asked(job)
    return LedgerSpec(
        **frame,
        dataset=job.results["encode"]["dataset"],
        model=ModelRecord(**job.inputs["model"]),
        objective=asked.objective,
        training=asked.training,
        actors=settings.encode_actors,
    )


def _train(job: Job, settings: Settings, frame: dict[str, Any]) -> TrainSpec:
    root, asked = settings.storage_uri, _asked(job)
    return TrainSpec(
        **frame,
        dataset=job.results["encode"]["dataset"],
        model=ModelRecord(**job.inputs["model"]),
        model_id=str(job.output_model),
        name=str(job.name),
        objective=asked.objective,
        training=asked.training,
        workers=asked.workers,
        evaluation=asked.evaluation,
        validation=asked.validation,
        ledger=job.results["ledger"]["ledger"] if "ledger" in job.results else None,
        run=run_folder(job.id, root),
        output=models.model_uri(root, str(job.output_model)),
    )


def _evaluate(job: Job, settings: Settings, frame: dict[str, Any]) -> EvaluateSpec:
    if job.kind == "alignment":
        candidate, base, evaluation = (
            job.results["train"]["model"],
            job.inputs["model"],
            job.request["evaluation"],
        )
    else:
        candidate, base = job.inputs["model"], job.inputs["base"]
        evaluation = {name: job.request[name] for name in EvaluationConfig.model_fields}
    return EvaluateSpec(
        **frame,
        candidate=ModelRecord(**candidate),
        base=ModelRecord(**base),
        evaluation=EvaluationConfig.model_validate_json(json.dumps(evaluation)),
        output=files.join(settings.storage_uri, "jobs", job.id, "evaluate", f"a{job.attempt}"),
        actors=settings.evaluate_actors,
    )


_BUILDERS = {"encode": _encode, "ledger": _ledger, "train": _train, "evaluate": _evaluate}
