"""The training loop, run by every worker: set up, resume, then step after step until the last one."""

from __future__ import annotations

from contextlib import closing, nullcontext

import ray.train
import ray.train.torch

from dde_core import checkpoint
from dde_core.batches import micro_batches
from dde_core.calibration import Calibration
from dde_core.checkpoint import Progress
from dde_core.methods import METHODS
from dde_core.models.folder import ModelFolder
from dde_core.models.parallel import synchronized
from dde_core.models.policy import Policy, learning_rate, make_optimizer, use_deterministic_kernels
from dde_core.parallelism import max_micro_batch, num_micro_batches
from dde_core.train_step import check_finite, errors_of, step_losses
from services.api.requests import most_workers
from services.artifacts import models
from services.stages.journal import Journal
from services.stages.specs import TrainSpec
from services.training.fence import Fence
from services.training.worker import errors
from services.training.worker.collectives import gather_errors
from services.training.worker.pairs import PairSource, RoundPairs, ShardPairs
from services.training.worker.preemption import Preemption
from services.training.worker.recorder import PairValues, Recorder, is_storing
from services.training.worker.resume import TrainState, resume, run_identity
from services.training.worker.step_timer import StepTimer


def train_loop(config: dict[str, str]) -> None:
    """Fine-tune on this worker's shard of every global batch. ``config`` is {"spec": TrainSpec as JSON}."""
    spec = TrainSpec.model_validate_json(config["spec"])
    rank = ray.train.get_context().get_world_rank()
    world_size = ray.train.get_context().get_world_size()
    try:
        _train(spec, rank, world_size)
    except Exception as error:
        errors.report(spec, error, rank, world_size)
        raise


def _train(spec: TrainSpec, rank: int, world_size: int) -> None:
    objective = spec.objective
    training = spec.training
    method = METHODS[objective.method]
    use_deterministic_kernels()
    device = ray.train.torch.get_device()
    fence = Fence.of_workers(spec.run, spec.attempt)
    if rank == 0:
        fence.take()

    # Set up policy with its frozen reference, pairs, optimizer, calibration.
    folder = ModelFolder(*models.fetch(spec.model))
    schedule = folder.schedule()
    policy = Policy(folder, training, device, world_size, objective.method)
    preemption = Preemption(spec, rank, world_size, device)
    pairs: PairSource
    if method.on_policy:
        pairs = RoundPairs(spec, folder, policy, device, rank, world_size, preemption, fence)
    else:
        pairs = ShardPairs(spec, folder, schedule, device, rank, world_size)
    errors_of_model = errors_of(objective)
    optimizer = make_optimizer(policy.parameters(), training)
    calibration = Calibration(schedule, objective)
    # What fits in memory with all workers must still fit when some are missing.
    max_pairs = max_micro_batch(training, most_workers(spec.workers))
    num_parts = num_micro_batches(training.batch_size, world_size, max_pairs)

    # Resume.
    identity = run_identity(spec, pairs.identity())
    state = TrainState(policy, optimizer, calibration)
    progress = resume(spec.run, identity, state, rank, Journal(spec.prefix))
    recorder = None
    if rank == 0:
        recorder = Recorder(spec, fence, identity, policy, schedule, pairs.num_pairs, progress)
        pairs.report_to(recorder)
    if recorder:
        parallelism = f" ({policy.parallelism})" if world_size > 1 else ""
        recorder.event(f"training on {world_size} workers{parallelism} from step {progress.step}")
    timer = StepTimer(training.batch_size, training.steps)
    stored_step = progress.step

    with closing(preemption), recorder or nullcontext(), pairs:
        for step in range(progress.step, training.steps):
            if preemption.stop_requested:
                break
            timer.begin()

            # Get this worker's pairs of the global batch. A checkpoint may be needed before they are there.
            with timer.data_wait():
                is_ready = pairs.ready(step)
            while not is_ready:
                if recorder:
                    recorder.wait()
                if stored_step < progress.step and pairs.settle():
                    snapshot = checkpoint.snapshot(policy, optimizer, calibration, progress, rank)
                    stored_step = progress.step
                    if recorder and snapshot:
                        recorder.store(snapshot, world_size)
                if preemption.stop_requested:
                    break
                preemption.answered()
                with timer.data_wait():
                    is_ready = pairs.ready(step)
            if not is_ready:
                break
            with timer.data_wait():
                rows = pairs.rows(step)

            # Forward and backward, one micro-batch after the other.
            optimizer.zero_grad(set_to_none=True)
            parts = []
            for part, is_last_part in micro_batches(rows, num_parts):
                with timer.data_wait():
                    batch = pairs.make(part)
                with synchronized(policy.trained, is_last_part):
                    with policy.autocast():
                        ref = pairs.stored_errors(part)
                        if ref is None and method.has_reference:
                            ref = errors_of_model(policy.reference, schedule, batch)
                        theta = errors_of_model(policy.trained, schedule, batch)
                    correction = calibration.correction(batch.t)
                    terms = step_losses(theta, ref, batch.t, objective, schedule, correction, batch.share)
                    check_finite("loss", terms.loss)
                    loss = terms.loss.sum() / training.batch_size * world_size
                    loss.backward()  # type: ignore[no-untyped-call]  # torch has no types here
                parts.append((batch.t, batch.share, theta, ref))

            # Update the policy.
            grad_norm = policy.clip_gradients()
            check_finite("gradient", grad_norm)
            lr = learning_rate(training, step)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            if policy.ema:
                policy.ema.step(policy.parameters())

            # Update the calibration from the errors of the global batch: every worker holds the same arrays.
            t, share, theta, ref = gather_errors(parts, rows.positions, training.batch_size)
            terms = step_losses(theta, ref, t, objective, schedule, calibration.correction(t), share)
            if ref is not None and method.corrected:
                calibration.update(t, theta, ref)

            # Store a checkpoint if one is needed, or if one is due and the previous one is stored.
            progress = Progress(
                step=step + 1,
                pairs_seen=progress.pairs_seen + training.batch_size,
                images_seen=progress.images_seen + training.batch_size * method.samples,
            )
            preemption.poll()
            is_needed = preemption.checkpoint_needed or progress.step == training.steps
            is_due = progress.step % training.checkpoint_every == 0
            snapshot = None
            if is_needed or (is_due and not is_storing(recorder, device)):
                with timer.checkpoint_stall():
                    if recorder:
                        recorder.wait()
                    if pairs.settle():
                        snapshot = checkpoint.snapshot(policy, optimizer, calibration, progress, rank)
                        stored_step = progress.step
                        preemption.answered()
            elif is_due and recorder:
                recorder.skip_checkpoint(progress.step)

            # Record.
            if recorder:
                extra = {"grad_norm": float(grad_norm), "learning_rate": lr}
                extra |= timer.metrics(progress.step, device) | pairs.metrics(step)
                recorder.log_step(progress, PairValues(t, theta, ref, terms), extra)
                if snapshot:
                    recorder.store(snapshot, world_size)
