"""The training loop, run by every worker. Read it top to bottom: set up, resume, step, report."""

from __future__ import annotations

import ray.train
import ray.train.torch
import torch

from dde_core import checkpoint
from dde_core.batches import BatchMaker, micro_batches, parts_of_a_share
from dde_core.calibration import Calibration
from dde_core.checkpoint import Progress
from dde_core.latents.ledger import Ledger
from dde_core.latents.reader import LatentReader
from dde_core.models.folder import ModelFolder
from dde_core.models.parallel import synchronised
from dde_core.models.policy import Policy, learning_rate, make_optimizer, use_deterministic_kernels
from dde_core.objectives import OBJECTIVES
from dde_core.planning.estimate import pairs_of_a_worker
from dde_core.train_step import check_finite, pair_errors, step_losses
from services.api.requests import most_workers
from services.artifacts import models
from services.stages.journal import Journal
from services.stages.specs import TrainSpec
from services.storage import files
from services.training.fence import Fence
from services.training.worker import errors
from services.training.worker.collectives import agreed, gather_errors
from services.training.worker.preemption import Leaving
from services.training.worker.recorder import PairValues, Recorder
from services.training.worker.resume import State, identity, resume
from services.training.worker.step_timer import StepClock


def train_loop(config: dict) -> None:
    """Fine-tune on this worker's share of every global batch. ``config`` is {"spec": TrainSpec as JSON}."""
    spec, context = TrainSpec.model_validate_json(config["spec"]), ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    try:
        _train(spec, rank, world_size)
    except Exception as error:
        errors.tell(spec, error, rank, world_size)
        raise


def _train(spec: TrainSpec, rank: int, world_size: int) -> None:
    objective, training = spec.objective, spec.training
    use_deterministic_kernels()
    device, fence = ray.train.torch.get_device(), Fence.of_workers(spec.run, spec.attempt)
    if rank == 0:
        fence.take()

    folder = ModelFolder(*models.fetch(spec.model))
    schedule = folder.schedule()
    reader = LatentReader(*files.resolve(spec.dataset), training.held_out_pairs)
    batches = BatchMaker(reader, folder, schedule, objective, training, device)
    ledger = Ledger(*files.resolve(spec.ledger), device) if spec.ledger else None
    policy = Policy(folder, training, device, world_size)
    optimizer = make_optimizer(policy.parameters(), training)
    calibration, method = Calibration(schedule, objective), OBJECTIVES[objective.method]
    # A share that fits when all workers are there must fit when some are gone.
    size = training.micro_batch_size or pairs_of_a_worker(training, most_workers(spec.workers))
    num_parts = parts_of_a_share(training.batch_size, world_size, size)

    same = identity(spec, reader.manifest, ledger)
    done = resume(spec.run, same, State(policy, optimizer, calibration), rank, Journal(spec.prefix))
    recorder = Recorder(spec, fence, same, policy, schedule, len(reader), done) if rank == 0 else None
    if recorder:
        how = f" ({policy.parallelism})" if world_size > 1 else ""
        recorder.event(f"training on {world_size} workers{how} from step {done.step}")
    clock, leaving = StepClock(training.batch_size, training.steps), Leaving(spec, rank, world_size, device)

    try:
        for step in range(done.step, training.steps):
            if leaving.stopped:
                break
            clock.begin()
            optimizer.zero_grad(set_to_none=True)
            with clock.waiting():
                rows, parts = batches.rows(step, rank, world_size), []
            for part, is_last in micro_batches(rows, num_parts):
                with clock.waiting():
                    batch = batches.make(part)
                with synchronised(policy.trained, is_last):
                    with policy.autocast():
                        ref = ledger.errors(part) if ledger else None
                        if ref is None and method.preference:
                            ref = pair_errors(policy.reference, schedule, batch)
                        theta = pair_errors(policy.trained, schedule, batch)
                    terms = step_losses(
                        theta, ref, batch.t, objective, schedule, calibration.correction(batch.t)
                    )
                    check_finite("loss", terms.loss)
                    (terms.loss.sum() / training.batch_size * world_size).backward()
                parts.append((batch.t, theta, ref))
            grad_norm = policy.clip_gradients()
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
            done = Progress(
                step=step + 1,
                pairs_seen=done.pairs_seen + training.batch_size,
                images_seen=done.images_seen + training.batch_size * (2 if method.preference else 1),
            )

            state, is_last = None, done.step == training.steps
            needed = leaving.after_step() or is_last
            if needed or (
                done.step % training.checkpoint_every == 0 and not _left_out(recorder, done.step, device)
            ):
                with clock.stalled():
                    if recorder:
                        recorder.wait()
                    state = checkpoint.snapshot(policy, optimizer, calibration, done, rank)
            if recorder:
                more = {"grad_norm": float(grad_norm), "learning_rate": learning_rate(training, step)}
                recorder.step(done, PairValues(t, theta, ref, terms), more | clock.metrics(done.step, device))
                if state:
                    recorder.checkpoint(state, world_size)
        if recorder:
            recorder.close()
    except BaseException:
        if recorder:
            recorder.abandon()
        raise
    finally:
        leaving.close()
        reader.close()


def _left_out(recorder: Recorder | None, step: int, device: torch.device) -> bool:
    """Whether a checkpoint that is due is left out, since the one before is still on its way. All workers know."""
    return agreed([recorder is not None and recorder.leaves_out(step)], device)[0]
