"""The train stage: run the training loop on Ray Train, select a checkpoint, write the aligned model."""

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
from dde_core.latents.ledger import drops_to_zeros
from dde_core.latents.schema import Manifest
from dde_core.methods import METHODS
from dde_core.models.folder import ModelFolder
from dde_core.models.policy import check_optimizer
from dde_core.models.saving import save_adapters, save_aligned
from dde_core.objectives import conventions
from dde_core.transitions import ranked_transitions
from services.api.records import ModelRecord, TrainResult
from services.api.requests import most_workers
from services.artifacts import checkpoints, models
from services.artifacts.checkpoints import BrokenCheckpoint
from services.errors import Unavailable
from services.rollout.maker import read_round_prompts
from services.settings import TrackerSettings, TrainingSettings
from services.stages import layout
from services.stages.journal import Journal
from services.stages.runner import describe
from services.stages.specs import TrainSpec
from services.storage import files
from services.training import pair_log, selection
from services.training.driver import capacity, reference
from services.training.driver.starts import StartFailures
from services.training.driver.supervision import supervise
from services.training.fence import Fence
from services.training.tracking.outbox import check_trackers
from services.training.worker.loop import train_loop


def train(spec: TrainSpec, journal: Journal) -> TrainResult:
    """Fine-tune, from the run's newest checkpoint if there is one, and write the aligned model.

    Raises ConfigError for a spec that cannot work, before a worker starts; Unavailable if another attempt may
    succeed; Stopped on request; Overtaken if a newer attempt has taken over the run.
    """
    began = time.monotonic()
    manifest = None
    if spec.dataset:
        manifest = Manifest.from_json(files.read_bytes(layout.manifest_uri(spec.dataset)))
    _check(spec)
    if manifest:
        _check_dataset(spec, manifest)
        log_soft_labels(spec, manifest, journal)
    spec = reference.resolve(spec, journal)
    fence = Fence(spec.run, spec.attempt)
    fence.take()
    _run_workers(spec, journal)
    fence.check()
    try:
        step, metrics = _select_step(spec, journal)
        record = _write_model(spec, manifest, step, journal)
    except BrokenCheckpoint as error:
        checkpoints.invalidate(spec.run, error.step)
        raise Unavailable(f"{error}: invalidated, the next attempt resumes from an older one") from error
    return TrainResult(model=record, step=step, metrics=metrics, seconds=time.monotonic() - began)


def _check(spec: TrainSpec) -> None:
    """Raises ConfigError, or another error, for what cannot work."""
    models.check_digests(spec.model)
    training = spec.training
    if METHODS[spec.objective.method].on_policy:
        _check_rollouts(spec)
    elif spec.rollouts or not spec.dataset:
        raise ConfigError(
            "rollouts", spec.rollouts, f"method {spec.objective.method!r} needs a dataset instead"
        )
    workers = most_workers(spec.workers)
    if workers > training.batch_size:
        raise ConfigError("workers", workers, f"must be at most training.batch_size = {training.batch_size}")
    if training.lora and spec.model.adapter_of:
        message = "cannot be trained on a model that is LoRA adapters itself"
        raise ConfigError("training.lora", spec.model.name, message)
    check_optimizer(training)
    check_trackers(TrackerSettings())


def _check_dataset(spec: TrainSpec, manifest: Manifest) -> None:
    training = spec.training
    pairs = manifest.counts["pairs"]
    if training.batch_size + training.held_out_pairs > pairs:
        field = "training.held_out_pairs" if training.batch_size <= pairs else "training.batch_size"
        message = f"and training.batch_size must be at most the dataset's {pairs} pairs together"
        raise ConfigError(field, [training.held_out_pairs, training.batch_size], message)


def _check_rollouts(spec: TrainSpec) -> None:
    """Raises ConfigError for settings that an on-policy run does not have."""
    method = METHODS[spec.objective.method]
    if spec.rollouts is None or spec.dataset:
        raise ConfigError("dataset", spec.dataset, f"method {spec.objective.method!r} needs rollouts instead")
    if spec.training.held_out_pairs:
        message = "must be 0: an on-policy run has no pairs to hold out"
        raise ConfigError("training.held_out_pairs", spec.training.held_out_pairs, message)
    if spec.training.caption_dropout:
        message = "must be 0: pairs are trained with the guidance that drew them"
        raise ConfigError("training.caption_dropout", spec.training.caption_dropout, message)
    if method.reward_gradient and spec.rollouts.reward_actors:
        message = "must be 0: the reward's gradient needs decoder, scorer and U-Net in one process"
        raise ConfigError("rollouts.reward_actors", spec.rollouts.reward_actors, message)
    ranked_transitions(spec.objective, ModelFolder(*models.fetch(spec.model)).schedule())
    read_round_prompts(spec)


def log_soft_labels(spec: TrainSpec, manifest: Manifest, journal: Journal) -> None:
    """Say what is done with soft labels. Manifests of earlier versions do not count them."""
    soft = manifest.counts.get("soft", 0)
    if not soft or not METHODS[spec.objective.method].has_loser:
        return
    found = f"{soft} of {manifest.counts['pairs']} pairs have a soft label"
    if spec.objective.label == "soft":
        journal.event(f"{found}: the loss uses the winner's share")
    else:
        message = f"{found} and are trained on as if all had preferred the winner"
        journal.event(f'{message}: objective.label "soft" uses its share', "warning")


def _run_workers(spec: TrainSpec, journal: Journal) -> None:
    """Train to the last step, on Ray Train, whose own state is temporary: checkpoints are ours."""
    training = spec.training
    workers = _workers_summary(spec)
    summary = f"{training.steps} steps of {training.batch_size} pairs with {spec.objective.method}"
    journal.event(f"{summary} on {workers} workers")
    journal.flush()
    settings = TrainingSettings()
    scaling = ray.train.ScalingConfig(
        num_workers=spec.workers,
        use_gpu=spec.use_gpu,
        resources_per_worker=capacity.needed(spec),
        elastic_resize_monitor_interval_s=settings.resize_every_s,
    )
    failures = ray.train.FailureConfig(
        max_failures=settings.max_worker_failures,
        controller_failure_limit=-1,  # of these, a wait for room is most
    )
    with tempfile.TemporaryDirectory(prefix="dde-ray-train-", ignore_cleanup_errors=True) as scratch:
        trainer = TorchTrainer(
            train_loop,
            train_loop_config={"spec": spec.model_dump_json()},
            scaling_config=scaling,
            run_config=ray.train.RunConfig(
                name="run",
                storage_path=scratch,
                failure_config=failures,
                callbacks=[StartFailures(settings.max_start_failures)],
            ),
        )
        try:
            supervise(trainer, spec, journal)
        except ray.train.ControllerError as error:
            message = f"workers = {workers} could not be started: {describe(error)}"
            raise Unavailable(message, param="workers") from error
        except ray.train.WorkerGroupError as error:
            message = (
                f"workers failed {settings.max_worker_failures} times; the last error: {describe(error)}"
            )
            raise Unavailable(message) from error
        except (ray.exceptions.RayActorError, ray.exceptions.RaySystemError) as error:
            raise Unavailable(f"Ray Train's controller or Ray itself died: {describe(error)}") from error


def _workers_summary(spec: TrainSpec) -> str:
    if isinstance(spec.workers, int):
        return str(spec.workers)
    least, most = spec.workers
    return f"{least} to {most}"


def _select_step(spec: TrainSpec, journal: Journal) -> tuple[int, dict[str, float]]:
    """The step whose weights become the model, and its metrics: the best one by validation, or the last."""
    outcomes = selection.outcomes(spec.run)
    step = _last_step(spec)
    metric = spec.validation.best_metric if spec.validation else None
    best = selection.chosen(spec, outcomes)
    ended = selection.violation(spec, outcomes)
    if best is None and ended:
        message = f"no checkpoint can become the model: after step {ended[0]} {ended[1]}"
        reason = f"{message}. Lower training.learning_rate, or validate more often (validation.every)"
        raise DataError(reason)
    if best is not None:
        step = best
        why = f"it has the best {metric}" if metric else "it is the last one that the guard allows"
        journal.event(f"selected step {step}: {why}")
    elif metric:
        journal.event(f"{metric} was never measured: selected the last step, {step}", "warning")
    metrics = checkpoints.read(spec.run, step).metrics
    if step in outcomes:
        metrics = metrics | outcomes[step].metrics
    return step, metrics


def _last_step(spec: TrainSpec) -> int:
    """The run's last step. It is an earlier one than the spec's if the guard has ended training."""
    return max(step for step in checkpoints.steps(spec.run) if step <= spec.training.steps)


def _write_model(spec: TrainSpec, manifest: Manifest | None, step: int, journal: Journal) -> ModelRecord:
    """Write the model's files. They become a model when the control plane stores the returned record."""
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
        newest = checkpoints.read(spec.run, _last_step(spec))
        with checkpoints.opened(spec.run, newest) as last:
            _write_credit(spec, base, last, folder, journal)
        (folder / "lineage.json").write_text(json.dumps(record.lineage, indent=1, sort_keys=True))
        files.copy_folder(files.as_uri(folder), spec.output)
    return record.model_copy(update={"digest": models.folder_digest(spec.output)})


def _model_record(spec: TrainSpec, manifest: Manifest | None, base: ModelFolder, step: int) -> ModelRecord:
    settings = spec.model_dump(mode="json")
    lineage: dict[str, Any] = {
        "job": spec.job,
        "dataset_digest": manifest.digest if manifest else None,
        **_rollout_lineage(spec),
        "base": spec.model.id,
        "base_digest": spec.model.digest,
        "objective": settings["objective"] | {"noise": spec.objective.noise_mode},
        "conventions": {
            **conventions(spec.objective, base.schedule()),
            **({"latents": manifest.latents} if manifest else {}),
            "no_caption": "zeros" if drops_to_zeros(spec.objective, base) else "the empty caption",
        },
        "training": settings["training"],
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


def _rollout_lineage(spec: TrainSpec) -> dict[str, Any]:
    """Where an on-policy run got its pairs."""
    if not spec.rollouts:
        return {}
    return {
        "rollouts": spec.rollouts.model_dump(mode="json"),
        "prompts_digest": spec.prompts_digest,
        "rewards": {record.name: record.digest for record in spec.rewards},
    }


def _model_card(record: ModelRecord) -> str:
    title = f"# {record.name}"
    source = "preference pairs"
    if "rollouts" in record.lineage:
        source = "pairs that it drew itself, ranked by scorers"
    summary = f"{record.base} aligned with {source}. How it was made:"
    lines = [f"- {name}: `{json.dumps(value, sort_keys=True)}`" for name, value in record.lineage.items()]
    return "\n".join([title, "", summary, "", *lines, ""])


def _write_credit(spec: TrainSpec, base: ModelFolder, last: Path, folder: Path, journal: Journal) -> None:
    """Add the credit record to the model. A pair log with gaps costs the record, not the model."""
    scheduler_config = base.scheduler_config()
    calibration = load_file(last / checkpoint.CALIBRATION)
    try:
        pairs = pair_log.read(spec.run)
        schedule = base.schedule()
        batch_size = spec.training.batch_size
        record = pair_log.credit_record(
            pairs, spec.objective, schedule, scheduler_config, calibration, batch_size
        )
    except DataError as error:
        journal.event(f"no credit record: {error}", "warning")
        return
    (folder / layout.CREDIT).write_text(record.model_dump_json())
