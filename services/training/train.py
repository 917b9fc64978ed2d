"""The train stage: a Ray Train run over the loop, then the model version that it made."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

import ray
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
from services import registry, storage
from services.contracts import CREDIT, ModelRecord, TrainResult, TrainSpec, least_workers, most_workers
from services.errors import Unavailable
from services.observability import Journal
from services.training import held_out, pair_log, reference
from services.training.loop import train_loop

MAX_WORKER_FAILURES = 3
MAX_START_FAILURES = 5
"""Each is a minute of waiting for workers that the cluster does not give."""
CPUS_PER_WORKER = 1


def train(spec: TrainSpec, journal: Journal) -> TrainResult:
    """Fine-tune, resuming from the run's last checkpoint where there is one, and write the aligned model."""
    began = time.monotonic()
    manifest = Manifest.from_json(storage.read_bytes(storage.join(spec.dataset, MANIFEST)))
    _check(spec, manifest)
    spec = reference.resolve(spec, journal)
    steps, batch_size = spec.training.steps, spec.training.batch_size
    journal.event(f"{steps} steps of {batch_size} pairs with {spec.objective.method} on {spec.workers} workers")
    journal.flush()
    filesystem, path = storage.resolve(spec.run)
    storage_path, name = path.rsplit("/", 1)
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={"spec": spec.model_dump_json()},
        scaling_config=ray.train.ScalingConfig(
            num_workers=spec.workers, use_gpu=spec.use_gpu, resources_per_worker={"CPU": CPUS_PER_WORKER}
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=storage_path,
            storage_filesystem=filesystem,
            failure_config=ray.train.FailureConfig(
                max_failures=MAX_WORKER_FAILURES, controller_failure_limit=MAX_START_FAILURES
            ),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
        ),
    )
    try:
        result = trainer.fit()
    except ray.train.ControllerError as error:
        message = f"workers = {spec.workers} could not be started: {error.controller_failure}"
        raise Unavailable(message, param="workers") from error
    base = ModelFolder(*registry.fetch(spec.model))
    record = _model_record(spec, manifest, base)
    with tempfile.TemporaryDirectory() as scratch, result.checkpoint.as_directory() as last:
        folder, weights = Path(scratch) / "model", checkpoint.model_weights(Path(last))
        if spec.training.lora:
            save_adapters(weights, folder)
        else:
            save_aligned(base.path, weights, folder)
        (folder / "README.md").write_text(_model_card(record))
        _write_credit(spec, base, Path(last), folder, journal)
        (folder / "lineage.json").write_text(json.dumps(record.lineage, indent=1, sort_keys=True))
        storage.copy_folder(storage.as_uri(folder), spec.output)
    record = record.model_copy(update={"digest": registry.folder_digest(spec.output)})
    metrics = {name: float(value) for name, value in (result.metrics or {}).items() if isinstance(value, (int, float))}
    if spec.training.held_out_pairs:
        metrics |= storage.read_json(storage.join(spec.run, held_out.RESULT))
    return TrainResult(model=record, step=steps, metrics=metrics, seconds=time.monotonic() - began)


def _write_credit(spec: TrainSpec, base: ModelFolder, last: Path, folder: Path, journal: Journal) -> None:
    """Add the credit record to the model version. A log with gaps costs the record, not the model."""
    config, calibration = base.scheduler_config(), load_file(last / checkpoint.CALIBRATION)
    try:
        pairs, batch_size = pair_log.read(spec.run), spec.training.batch_size
        record = pair_log.credit_record(pairs, spec.objective, base.schedule(), config, calibration, batch_size)
    except DataError as error:
        journal.event(f"no credit record: {error}", "warning")
    else:
        (folder / CREDIT).write_text(record.model_dump_json())


def _check(spec: TrainSpec, manifest: Manifest) -> None:
    """Refuse what cannot work before a worker starts."""
    registry.check_digests(spec.model)
    pairs, training = manifest.counts["pairs"], spec.training
    if training.batch_size + training.held_out_pairs > pairs:
        field = "training.held_out_pairs" if training.batch_size <= pairs else "training.batch_size"
        message = f"and training.batch_size must be at most the dataset's {pairs} pairs together"
        raise ConfigError(field, [training.held_out_pairs, training.batch_size], message)
    workers = most_workers(spec.workers)
    if workers > training.batch_size:
        raise ConfigError("workers", workers, f"must be at most training.batch_size = {training.batch_size}")
    if training.lora and spec.model.adapter_of:
        raise ConfigError("training.lora", spec.model.name, "cannot be trained on a model that is LoRA adapters itself")
    check_optimizer(training)
    workers = least_workers(spec.workers)
    needed = {"CPU": workers * CPUS_PER_WORKER, "GPU": workers if spec.use_gpu else 0}
    for resource, amount in needed.items():
        there = ray.cluster_resources().get(resource, 0)
        if amount > there:
            raise Unavailable(f"workers = {workers} need {amount} {resource}, the cluster has {there:g}", param="workers")


def _model_record(spec: TrainSpec, manifest: Manifest, base: ModelFolder) -> ModelRecord:
    lineage = {
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
    return "\n".join([f"# {record.name}", "", f"{record.base} aligned with preference pairs. How it was made:", "", *lines, ""])
