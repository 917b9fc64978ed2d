"""The training loop, run by every worker. Read it top to bottom: set up, resume, step, report."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import ray.train
import ray.train.torch
import torch
from torch import Tensor

from dde_core import checkpoint
from dde_core.calibration import Calibration
from dde_core.checkpoint import Progress
from dde_core.config import TrainConfig
from dde_core.latents.reader import LatentReader
from dde_core.metrics import step_metrics
from dde_core.models import ModelFolder
from dde_core.train_step import PairErrors, check_finite, pair_errors, step_losses
from services import registry, storage
from services.contracts import TrainSpec
from services.observability import Journal
from services.training.batches import BatchMaker, gather

REPORTED = ("loss", "implicit_accuracy", "margin")


def train_loop(config: dict) -> None:
    """Fine-tune on this worker's share of every global batch. ``config`` is {"spec": TrainSpec as JSON}."""
    spec = TrainSpec.model_validate_json(config["spec"])
    objective, training = spec.objective, spec.training
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    device, context = ray.train.torch.get_device(), ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    journal = Journal(spec.prefix) if rank == 0 else None

    folder = ModelFolder(registry.fetch(spec.model))
    schedule = folder.schedule()
    reader = LatentReader(*storage.resolve(spec.dataset))
    batches = BatchMaker(reader, folder, schedule, objective, training, device)
    reference = folder.unet().requires_grad_(False).to(device)
    policy = folder.unet().to(device)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay)
    calibration = Calibration(schedule, objective)

    done = Progress(step=0, pairs_seen=0)
    if (previous := ray.train.get_checkpoint()) is not None:
        with previous.as_directory() as path:
            done = checkpoint.load(Path(path), policy, optimizer, calibration)
    if journal:
        journal.event(f"training on {world_size} workers from step {done.step}")
    parallel = ray.train.torch.prepare_model(policy, move_to_device=False)

    try:
        for step in range(done.step, training.steps):
            began = time.monotonic()
            batch, positions = batches.make(step, rank, world_size)
            fetched = time.monotonic()
            theta = pair_errors(parallel, schedule, batch)
            with torch.no_grad():
                ref = pair_errors(reference, schedule, batch)
            terms = step_losses(theta, ref, batch.t, objective, schedule, calibration.correction(batch.t))
            check_finite("loss", terms.loss)

            optimizer.zero_grad(set_to_none=True)
            (terms.loss.sum() / training.batch_size * world_size).backward()
            grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), training.max_grad_norm)
            check_finite("gradient", grad_norm)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(training, step)
            optimizer.step()

            # Every worker sees the errors of the whole global batch, so all hold the same calibration arrays.
            columns = gather([batch.t, theta.w, ref.w, theta.l, ref.l], positions, training.batch_size)
            t, (theta_w, ref_w, theta_l, ref_l) = columns[0].long(), columns[1:].float()
            theta_all, ref_all = PairErrors(theta_w, theta_l), PairErrors(ref_w, ref_l)
            terms = step_losses(theta_all, ref_all, t, objective, schedule, calibration.correction(t))
            calibration.update(t, theta_w, ref_w, theta_l, ref_l)
            done = Progress(step=step + 1, pairs_seen=done.pairs_seen + training.batch_size)

            metrics = step_metrics(t, theta_all, ref_all, terms, schedule.T)
            seconds = time.monotonic() - began
            metrics |= {"grad_norm": float(grad_norm), "learning_rate": learning_rate(training, step),
                        "pairs_per_s": training.batch_size / seconds, "data_wait": (fetched - began) / seconds}  # fmt: skip
            if journal:
                journal.metrics(done.step, metrics)
            if done.step % training.checkpoint_every == 0 or done.step == training.steps:
                if journal:  # a run that goes on from this checkpoint does not tell these steps again
                    journal.flush()
                report(metrics, policy, optimizer, calibration, done, rank)
    finally:
        if journal:
            journal.flush()


def learning_rate(training: TrainConfig, step: int) -> float:
    """Linear warm-up to a constant. A function of the step alone."""
    return training.learning_rate * min(1.0, (step + 1) / (training.warmup_steps + 1))


def report(
    metrics: dict[str, float],
    policy: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    calibration: Calibration,
    done: Progress,
    rank: int,
) -> None:
    """Hand a checkpoint to Ray Train: rank 0 writes it, all wait for it."""
    chosen: dict[str, Tensor | float] = {"step": done.step, **{name: metrics[name] for name in REPORTED}}
    if rank != 0:
        ray.train.report(chosen)
        return
    with tempfile.TemporaryDirectory() as path:
        checkpoint.save(Path(path), policy, optimizer, calibration, done)
        ray.train.report(chosen, checkpoint=ray.train.Checkpoint.from_directory(path))
