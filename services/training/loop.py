"""The training loop, run by every worker. Read it top to bottom: set up, resume, step, report."""

from __future__ import annotations

import tempfile
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import ray.train
import ray.train.torch
import torch
from torch.nn.parallel import DistributedDataParallel

from dde_core import checkpoint
from dde_core.batches import BatchMaker, micro_batches
from dde_core.calibration import Calibration
from dde_core.checkpoint import Progress
from dde_core.latents.ledger import Ledger
from dde_core.latents.reader import LatentReader
from dde_core.metrics import in_words, logit_deviation, step_metrics
from dde_core.models.folder import ModelFolder
from dde_core.models.policy import Policy, learning_rate, make_optimizer, use_repeatable_kernels
from dde_core.objectives import OBJECTIVES
from dde_core.train_step import check_finite, pair_errors, step_losses
from services import registry, storage
from services.contracts import TrainSpec
from services.observability import Journal
from services.training import held_out
from services.training.gathering import gather_errors
from services.training.pair_log import PairLog

REPORTED = ("loss", "implicit_accuracy", "margin")


def train_loop(config: dict) -> None:
    """Fine-tune on this worker's share of every global batch. ``config`` is {"spec": TrainSpec as JSON}."""
    spec = TrainSpec.model_validate_json(config["spec"])
    objective, training = spec.objective, spec.training
    use_repeatable_kernels()
    device, context = ray.train.torch.get_device(), ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    journal, pair_log = (Journal(spec.prefix), PairLog(spec.run)) if rank == 0 else (None, None)

    folder = ModelFolder(*registry.fetch(spec.model))
    schedule = folder.schedule()
    reader = LatentReader(*storage.resolve(spec.dataset), training.held_out_pairs)
    batches = BatchMaker(reader, folder, schedule, objective, training, device)
    ledger = Ledger(*storage.resolve(spec.ledger), device) if spec.ledger else None
    policy = Policy(folder, training, device)
    optimizer = make_optimizer(policy.parameters(), training)
    calibration, method = Calibration(schedule, objective), OBJECTIVES[objective.method]

    done = Progress(step=0, pairs_seen=0)
    if (previous := ray.train.get_checkpoint()) is not None:
        with previous.as_directory() as path:
            done = checkpoint.load(Path(path), policy, optimizer, calibration)
    if journal:
        journal.event(f"training on {world_size} workers from step {done.step}")
    parallel = ray.train.torch.prepare_model(
        policy.unet, move_to_device=False, parallel_strategy_kwargs={"gradient_as_bucket_view": True}
    )

    try:
        for step in range(done.step, training.steps):
            began = time.monotonic()
            optimizer.zero_grad(set_to_none=True)
            rows, parts, waited = batches.rows(step, rank, world_size), [], time.monotonic() - began
            for part, is_last in micro_batches(rows, training.micro_batch_size):
                asked = time.monotonic()
                batch = batches.make(part)
                waited += time.monotonic() - asked
                with synchronised(parallel, is_last):
                    with policy.arithmetic():
                        ref = ledger.errors(part) if ledger else None
                        if ref is None and method.preference:
                            ref = pair_errors(policy.reference, schedule, batch)
                        theta = pair_errors(parallel, schedule, batch)
                    terms = step_losses(theta, ref, batch.t, objective, schedule, calibration.correction(batch.t))
                    check_finite("loss", terms.loss)
                    (terms.loss.sum() / training.batch_size * world_size).backward()
                parts.append((batch.t, theta, ref))
            grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), training.max_grad_norm)
            check_finite("gradient", grad_norm)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(training, step)
            optimizer.step()
            if policy.ema:
                policy.ema.step(policy.parameters())

            # Every worker sees the errors of the whole global batch, so all hold the same calibration arrays.
            t, theta, ref = gather_errors(parts, rows.positions, training.batch_size)
            terms = step_losses(theta, ref, t, objective, schedule, calibration.correction(t))
            if ref is not None and method.corrected:
                calibration.update(t, theta, ref)
            done = Progress(step=step + 1, pairs_seen=done.pairs_seen + training.batch_size)

            metrics = step_metrics(t, theta, ref, terms, schedule.T)
            if step == 0 and terms.margin is not None:  # the policy is still its reference
                metrics |= (noise := logit_deviation(t, terms.margin, schedule.snr[t], objective.beta, schedule.T))
                if journal:
                    journal.event(f"rounding moves the logits of step 0: {in_words(noise)}")
            seconds = time.monotonic() - began
            metrics |= {"grad_norm": float(grad_norm), "learning_rate": learning_rate(training, step),
                        "pairs_per_s": training.batch_size / seconds, "data_wait": waited / seconds}  # fmt: skip
            if journal and pair_log:
                journal.metrics(done.step, metrics)
                pair_log.add(done.step, t, terms.margin, terms.gradient_weight)
            if done.step % training.checkpoint_every == 0 or done.step == training.steps:
                if journal and pair_log:  # a run that goes on from this checkpoint does not tell these steps again
                    journal.flush()
                    pair_log.flush()
                report(metrics, policy, optimizer, calibration, done, rank)

        if reader.num_held_out:  # after the last checkpoint: what goes wrong here costs no step
            optimizer.zero_grad(set_to_none=True)
            size = training.micro_batch_size
            measured = held_out.held_out_metrics(policy, batches, reader, schedule, size, rank, world_size)
            if journal:
                storage.write_json(storage.join(spec.run, held_out.RESULT), measured)
                journal.event(f"implicit accuracy on held-out pairs: {measured}")
    finally:
        reader.close()
        if journal:
            journal.flush()


def synchronised(parallel: torch.nn.Module, is_last: bool) -> AbstractContextManager:
    """Gradients are averaged over workers once a step, with the last micro-batch."""
    return nullcontext() if is_last or not isinstance(parallel, DistributedDataParallel) else parallel.no_sync()


def report(
    metrics: dict[str, float],
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    calibration: Calibration,
    done: Progress,
    rank: int,
) -> None:
    """Hand a checkpoint to Ray Train: rank 0 writes it, all wait for it."""
    chosen = {"step": done.step, **{name: metrics[name] for name in REPORTED if name in metrics}}
    if rank != 0:
        ray.train.report(chosen)
        return
    with tempfile.TemporaryDirectory() as path:
        checkpoint.save(Path(path), policy, optimizer, calibration, done)
        ray.train.report(chosen, checkpoint=ray.train.Checkpoint.from_directory(path))
