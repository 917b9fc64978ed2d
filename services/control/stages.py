"""The spec of a job's current stage, and the names under which it runs."""

from __future__ import annotations

import json
import shlex
from typing import Any

from services.api.records import ModelRecord, ScorerRecord
from services.api.requests import (
    AlignmentJobCreate,
    DatasetSource,
    EvaluationConfig,
    GeneratePairs,
    ImageFolder,
    Relabel,
    least_workers,
    most_workers,
)
from services.artifacts.scorers import BUILT_IN
from services.control.launchers.contract import Needs, Run
from services.control.tables import Job
from services.settings import Settings
from services.stages import layout
from services.stages.specs import (
    ENTRY_MODULES,
    EncodeSpec,
    EvaluateSpec,
    GenerateSpec,
    LedgerSpec,
    RelabelSpec,
    StageSpec,
    TrainSpec,
)
from services.storage import files
from services.storage.sources import SourceRules


def root(job: Job, settings: Settings) -> str:
    """The root of the job's project in storage."""
    return layout.project_root(settings.storage_uri, job.project)


def prefix(job: Job, root: str) -> str:
    """The folder of the job's current attempt: spec, journal and markers."""
    return layout.attempt_prefix(root, job.id, str(job.stage), job.attempt)


def submission_id(job: Job) -> str:
    """Ray's id of the current attempt; the same on every call, so a repeated submit starts nothing twice."""
    return f"{job.id}-{job.stage}-a{job.attempt}"


def entrypoint(job: Job, root: str) -> str:
    """The command that Ray runs for the job's current stage."""
    uri = layout.spec_uri(prefix(job, root))
    return f"python -m {ENTRY_MODULES[job.stage]} --spec {shlex.quote(uri)}"  # type: ignore[index]


def run(job: Job, root: str, settings: Settings) -> Run:
    """The run of the job's current attempt."""
    metadata = {"job": job.id, "stage": str(job.stage), "attempt": str(job.attempt), "project": job.project}
    return Run(
        id=submission_id(job),
        command=entrypoint(job, root),
        prefix=prefix(job, root),
        metadata=metadata,
        needs=_needs(job, settings),
        starts_within_s=job.request.get("max_wait_s") or settings.max_wait_s,
    )


def _needs(job: Job, settings: Settings) -> Needs:
    """The workers of the job's current stage; those that draw and score rollouts are workers, too."""
    gpus = 1 if settings.use_gpu else 0
    if job.stage == "train":
        request = _request(job)
        rollouts = request.rollouts
        others = rollouts.actors + rollouts.reward_actors if rollouts else 0
        return Needs(least_workers(request.workers) + others, most_workers(request.workers) + others, gpus)
    actors = settings.encode_actors if job.stage in ("encode", "ledger") else settings.evaluate_actors
    return Needs(actors, actors, gpus)


def spec(job: Job, settings: Settings) -> StageSpec:
    """The spec of the job's current stage."""
    common = {
        "job": job.id,
        "attempt": job.attempt,
        "prefix": prefix(job, root(job, settings)),
        "sources": source_rules(settings, job.project),
        "use_gpu": settings.use_gpu,
    }
    return _BUILDERS[job.stage](job, settings, common)  # type: ignore[index]


def source_rules(settings: Settings, project: str) -> SourceRules:
    """What a project's requests and jobs may read: what the operator allows, and of the project's files the
    datasets that scorers made and held-out captions.

    Raises BadRequest for an unusable path or URI.
    """
    allowed = tuple(map(files.as_uri, settings.allowed_sources))
    denied = tuple(map(files.as_uri, settings.denied_sources))
    storage = files.as_uri(settings.storage_uri)
    of_others, own = layout.others_root(storage, project)
    root = layout.project_root(storage, project)
    made = (layout.all_made_folder(root), layout.prompts_folder(root))
    return SourceRules((*allowed, *made), denied, of_others, own)


def aligned_record(job: Job, record: ModelRecord) -> ModelRecord:
    """Training's model under the id and name that the job gave it."""
    return record.model_copy(
        update={"id": job.output_model, "name": job.name, "base": job.model, "job": job.id}
    )


def _request(job: Job) -> AlignmentJobCreate:
    return AlignmentJobCreate.model_validate_json(json.dumps(job.request))


def _encode(job: Job, settings: Settings, common: dict[str, Any]) -> EncodeSpec:
    return EncodeSpec(
        **common,
        source=_source(job),
        source_digest=job.inputs["dataset"]["digest"],
        model=ModelRecord(**job.inputs["model"]),
        data=_request(job).data,
        output=layout.datasets_folder(root(job, settings)),
        actors=settings.encode_actors,
    )


def _ledger(job: Job, settings: Settings, common: dict[str, Any]) -> LedgerSpec:
    request = _request(job)
    return LedgerSpec(
        **common,
        dataset=job.results["encode"]["dataset"],
        model=ModelRecord(**job.inputs["model"]),
        objective=request.objective,
        training=request.training,
        actors=settings.encode_actors,
    )


def _train(job: Job, settings: Settings, common: dict[str, Any]) -> TrainSpec:
    request = _request(job)
    return TrainSpec(
        **common,
        dataset=job.results["encode"]["dataset"] if "encode" in job.results else None,
        rollouts=request.rollouts,
        rewards=[ScorerRecord(**record) for record in job.inputs.get("rewards", ())],
        prompts_digest=job.inputs.get("prompts_digest", ""),
        model=ModelRecord(**job.inputs["model"]),
        model_id=str(job.output_model),
        name=str(job.name),
        objective=request.objective,
        training=request.training,
        workers=request.workers,
        evaluation=request.evaluation,
        scorers=_scorers(job, request.evaluation),
        validation=request.validation,
        ledger=job.results["ledger"]["ledger"] if "ledger" in job.results else None,
        run=layout.run_folder(root(job, settings), job.id),
        output=layout.model_folder(root(job, settings), str(job.output_model)),
    )


def _evaluate(job: Job, settings: Settings, common: dict[str, Any]) -> EvaluateSpec:
    if job.kind == "alignment":
        aligned = job.results["train"]["model"]
        model = job.inputs["model"]
        if model["name"] == aligned["name"]:  # a model that was aligned further under its own name
            model = model | {"name": model["id"]}
        compared = [model, aligned]
        base = model["name"]
        config = job.request["evaluation"]
    else:
        compared = job.inputs["models"]
        base = job.request["base"]
        fields = EvaluationConfig.model_fields.keys() & job.request.keys()
        config = {name: job.request[name] for name in fields}
    evaluation = EvaluationConfig.model_validate_json(json.dumps(config))
    return EvaluateSpec(
        **common,
        models=[ImageFolder(**each) if "images_uri" in each else ModelRecord(**each) for each in compared],
        base=base,
        scorers=_scorers(job, evaluation),
        evaluation=evaluation,
        images=layout.images_folder(root(job, settings)),
        output=prefix(job, root(job, settings)),
        actors=settings.evaluate_actors,
    )


def _generate(job: Job, settings: Settings, common: dict[str, Any]) -> GenerateSpec:
    return GenerateSpec(
        **common,
        model=ModelRecord(**job.inputs["model"]),
        generate=GeneratePairs.model_validate_json(json.dumps(job.request)),
        prompts_digest=job.inputs["prompts_digest"],
        scorers=[ScorerRecord(**record) for record in job.inputs["scorers"]],
        output=job.inputs["output"],
        actors=settings.evaluate_actors,
    )


def _relabel(job: Job, settings: Settings, common: dict[str, Any]) -> RelabelSpec:
    return RelabelSpec(
        **common,
        source=_source(job),
        source_digest=job.inputs["dataset"]["digest"],
        relabel=Relabel.model_validate_json(json.dumps(job.request)),
        scorers=[ScorerRecord(**record) for record in job.inputs["scorers"]],
        output=job.inputs["output"],
        actors=settings.evaluate_actors,
    )


def _source(job: Job) -> DatasetSource:
    """The files of the job's dataset."""
    dataset = job.inputs["dataset"]
    return DatasetSource(uri=dataset["uri"], columns=dataset.get("columns", {}), split=dataset.get("split"))


def _scorers(job: Job, evaluation: EvaluationConfig) -> list[ScorerRecord]:
    """The records that the scorers had when the job was created.

    Jobs of earlier versions stored none: they have built-in scorers alone.
    """
    stored = job.inputs.get("scorers")
    if stored is None:
        return [BUILT_IN[name] for name in evaluation.scorers]
    return [ScorerRecord(**record) for record in stored]


_BUILDERS = {
    "encode": _encode,
    "ledger": _ledger,
    "train": _train,
    "evaluate": _evaluate,
    "generate": _generate,
    "relabel": _relabel,
}
