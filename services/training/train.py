"""The train stage: a Ray Train run over the loop, then the model version that it made."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import ray.exceptions
import ray.train
from ray.train.torch import TorchTrainer
from safetensors.torch import load_file

import dde_core
from dde_core import checkpoint
from dde_core.errors import ConfigError, DataError
from dde_core.latents.schema import MANIFEST, Manifest
from dde_core.models.folder import ModelFolder
from dde_core.models.policy import check_optimizer
from dde_core.models.saving import save_adapters, save_aligned
from dde_core.objectives import conventions
from services.api.records import ModelRecord, TrainResult
from services.api.requests import most_workers
from services.artifacts import checkpoints, models
from services.artifacts.checkpoints import BrokenCheckpoint
from services.errors import Unavailable
from services.settings import TrackerSettings, TrainingSettings
from services.stages.journal import Journal
from services.stages.layout import CREDIT
from services.stages.runner import root_cause
from services.stages.specs import TrainSpec
from services.storage import files
from services.training import pair_log, selection
from services.training.driver import reference
from services.training.driver.capacity import needs
from services.training.driver.supervision import supervise
from services.training.fence import Fence
from services.training.tracking.outbox import check_trackers
from services.training.worker.loop import train_loop

MAX_WORKER_FAILURES = 30
"""Of one attempt. Errors that would come again end it at once."""
MAX_START_FAILURES = 30
"""Each is a minute of waiting for workers that the cluster does not give, since others have what they need."""


def train(spec: TrainSpec, journal: Journal) -> TrainResult:
    """Fine-tune, going on from the run's last checkpoint where there is one, and write the aligned model."""
    began = time.monotonic()
    manifest = Manifest.from_json(files.read_bytes(files.join(spec.dataset, MANIFEST)))
    _check(spec, manifest)
    spec = reference.resolve(spec, journal)
    fence = Fence(spec.run, spec.attempt)
    fence.take()
    steps, batch_size = spec.training.steps, spec.training.batch_size
    journal.event(
        f"{steps} steps of {batch_size} pairs with {spec.objective.method} on {_in_words(spec)} workers"
    )
    journal.flush()
    with tempfile.TemporaryDirectory(prefix="dde-ray-train-", ignore_cleanup_errors=True) as scratch:
        _fit(spec, scratch, journal)
    fence.check()
    try:
        step, metrics = _chosen(spec, journal)
        record = _write_model(spec, manifest, step, journal)
    except BrokenCheckpoint as error:
        checkpoints.discard(spec.run, error.step)
        raise Unavailable(f"{error}: put aside, the next attempt goes on from what is left") from error
    return TrainResult(model=record, step=step, metrics=metrics, seconds=time.monotonic() - began)


def _fit(spec: TrainSpec, scratch: str, journal: Journal) -> None:
    """Train to the last step. Ray Train keeps its own notes in ``scratch``; checkpoints are ours."""
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={"spec": spec.model_dump_json()},
        scaling_config=ray.train.ScalingConfig(
            num_workers=spec.workers,
            use_gpu=spec.use_gpu,
            resources_per_worker=needs(spec),
            elastic_resize_monitor_interval_s=TrainingSettings().resize_every_s,
        ),
        run_config=ray.train.RunConfig(
            name="run",
            storage_path=scratch,
            failure_config=ray.train.FailureConfig(
                max_failures=MAX_WORKER_FAILURES, controller_failure_limit=MAX_START_FAILURES
            ),
        ),
    )
    try:
        supervise(trainer, spec, journal)
    except ray.train.ControllerError as error:
        message = f"workers = {_in_words(spec)} could not be started: {error.controller_failure}"
        raise Unavailable(message, param="workers") from error
    except ray.train.WorkerGroupError as error:
        raise Unavailable(
            f"workers have failed {MAX_WORKER_FAILURES} times, at last: {root_cause(error)}"
        ) from error
    except (
        ray.exceptions.RayActorError,
        ray.exceptions.RaySystemError,
    ) as error:  # Ray Train's own actor, or Ray itself
        raise Unavailable(f"what runs the workers has died: {str(error).strip().splitlines()[0]}") from error


def _in_words(spec: TrainSpec) -> str:
    return str(spec.workers) if isinstance(spec.workers, int) else f"{spec.workers[0]} to {spec.workers[1]}"


def _chosen(spec: TrainSpec, journal: Journal) -> tuple[int, dict[str, float]]:
    """The step whose weights become the model, and what was measured at it."""
    found, step = selection.outcomes(spec.run), spec.training.steps
    if spec.validation and (metric := spec.validation.best_metric):
        if (best := selection.best(found, metric)) is None:
            journal.event(
                f"{metric} was never measured: the model is that after the last step, {step}", "warning"
            )
        else:
            journal.event(f"the model is that after step {(step := best)}, by {metric}")
    metrics = checkpoints.read(spec.run, step).metrics
    return step, metrics | (found[step].metrics if step in found else {})


def _write_model(spec: TrainSpec, manifest: Manifest, step: int, journal: Journal) -> ModelRecord:
    """The model version, whole or not at all as far as the control plane can see: its record comes last."""
    base = ModelFolder(*models.fetch(spec.model))
    record = _model_record(spec, manifest, base, step)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        with checkpoints.opened(spec.run, checkpoints.read(spec.run, step)) as state:
            if spec.training.lora:
                save_adapters(checkpoint.model_weights(state), folder)
            else:
                save_aligned(base.path, checkpoint.model_weights(state), folder)
        (folder / "README.md").write_text(_model_card(record))
        with checkpoints.opened(spec.run, checkpoints.read(spec.run, spec.training.steps)) as last:
            _write_credit(spec, base, last, folder, journal)
        (folder / "lineage.json").write_text(json.dumps(record.lineage, indent=1, sort_keys=True))
        files.copy_folder(files.as_uri(folder), spec.output)
    return record.model_copy(update={"digest": models.folder_digest(spec.output)})


def _write_credit(spec: TrainSpec, base: ModelFolder, last: Path, folder: Path, journal: Journal) -> None:
    """Add the credit record to the model version. A log with gaps costs the record, not the model."""
    config, calibration = base.scheduler_config(), load_file(last / checkpoint.CALIBRATION)
    try:
        pairs, batch_size = pair_log.read(spec.run), spec.training.batch_size
        record = pair_log.credit_record(
            pairs, spec.objective, base.schedule(), config, calibration, batch_size
        )
    except DataError as error:
        journal.event(f"no credit record: {error}", "warning")
    else:
        (folder / CREDIT).write_text(record.model_dump_json())


def _check(spec: TrainSpec, manifest: Manifest) -> None:
    """Refuse what cannot work before a worker starts."""
    models.check_digests(spec.model)
    pairs, training = manifest.counts["pairs"], spec.training
    if training.batch_size + training.held_out_pairs > pairs:
        field = "training.held_out_pairs" if training.batch_size <= pairs else "training.batch_size"
        message = f"and training.batch_size must be at most the dataset's {pairs} pairs together"
        raise ConfigError(field, [training.held_out_pairs, training.batch_size], message)
    workers = most_workers(spec.workers)
    if workers > training.batch_size:
        raise ConfigError("workers", workers, f"must be at most training.batch_size = {training.batch_size}")
    if training.lora and spec.model.adapter_of:
        raise ConfigError(
            "training.lora", spec.model.name, "cannot be trained on a model that is LoRA adapters itself"
        )
    check_optimizer(training)
    check_trackers(TrackerSettings())


def _model_record(spec: TrainSpec, manifest: Manifest, base: ModelFolder, step: int) -> ModelRecord:
    lineage: dict[str, Any] = {
        "job": spec.job,
        "dataset_digest": manifest.digest,
        "base": spec.model.id,
        "base_digest": spec.model.digest,
        "objective": spec.model_dump(mode="json")["objective"] | {"noise": spec.objective.noise_mode},
        "conventions": {
            **conventions(spec.objective, base.schedule()),
            "no_caption": "zeros" if base.no_caption_is_zeros else "the empty caption",
        },
        "training": spec.model_dump(mode="json")["training"],
        "step": step,
        "reference": reference.lineage(spec),
        "code_version": dde_core.__version__,
    }
    return ModelRecord(
        id=spec.model_id,
        name=spec.name,
        uri=spec.output,
        family=spec.model.family,
        digest="",
        base=spec.model.id,
        job=spec.job,
        adapter_of=spec.model if spec.training.lora else None,
        lineage=lineage,
        created_at=int(time.time()),
    )


def _model_card(record: ModelRecord) -> str:
    lines = [f"- {name}: `{json.dumps(value, sort_keys=True)}`" for name, value in record.lineage.items()]
    return "\n".join(
        [
            f"# {record.name}",
            "",
            f"{record.base} aligned with preference pairs. How it was made:",
            "",
            *lines,
            "",
        ]
    )
