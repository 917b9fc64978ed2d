"""Everything that rank 0 writes, in order, on a thread of its own: events, metrics, pair log, checkpoints.

Training does not wait for a write. If storage fails (an outage, a full disk), the write is retried for
``storage_retry_s`` while training continues. A checkpoint that falls due while the previous one is being
stored is skipped, unless it is needed: then it waits.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from jaxtyping import Int
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    stop_after_delay,
    wait_exponential_jitter,
)
from torch import Tensor

from dde_core.alarms import Alarms
from dde_core.checkpoint import Progress, Snapshot
from dde_core.methods import METHODS
from dde_core.models.policy import Policy
from dde_core.schedule import Schedule
from dde_core.step_metrics import format_metrics, logit_deviation, step_metrics
from dde_core.train_step import PairErrors, StepTerms
from services.api.records import CHECKPOINT_SECONDS
from services.artifacts import checkpoints
from services.artifacts.checkpoints import CheckpointRecord, ReaderPosition
from services.errors import Unavailable
from services.rollout import store as rounds
from services.settings import TrainingSettings
from services.stages.journal import Journal
from services.stages.specs import Level, TrainSpec
from services.training import selection
from services.training.fence import Fence
from services.training.pair_log import PairLog
from services.training.worker.collectives import any_worker

FLUSH_EVERY_S = 1.0
ABANDON_AFTER_S = 10.0
"""After an error of the loop the worker is to end soon: others wait for it."""


@dataclass(frozen=True, eq=False)
class PairValues:
    """One step's values for each pair of the global batch, on the host."""

    t: Int[Tensor, " b"]
    theta: PairErrors
    ref: PairErrors | None
    terms: StepTerms


class Recorder:
    """A context manager around the training loop.

    ``log_step``, ``wait`` and the end of the context raise the error that ended the thread: Unavailable if
    storage failed for too long, Overtaken if somebody else has taken over the run.
    """

    def __init__(
        self,
        spec: TrainSpec,
        fence: Fence,
        run_identity: dict[str, Any],
        policy: Policy,
        schedule: Schedule,
        num_pairs: int,
        progress: Progress,
    ) -> None:
        self._spec = spec
        self._fence = fence
        self._run_identity = run_identity
        self._policy = policy
        self._schedule = schedule
        self._num_pairs = num_pairs
        self._journal = Journal(spec.prefix, flush_every_s=math.inf)  # flushed by the thread, with retries
        self._pair_log = PairLog(spec.run)
        self._retry_for_s = TrainingSettings().storage_retry_s
        self._alarms = Alarms(spec.objective)
        if progress.step:
            self._alarms.load_state_dict(checkpoints.read(spec.run, progress.step).alarms)
        self._metrics: dict[str, float] = {}
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._is_idle = threading.Event()
        """Set while no checkpoint is being stored."""
        self._is_idle.set()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="recorder")
        self._thread.start()

    # ---- called by the training loop

    def event(self, message: str, level: Level = "info") -> None:
        """Log a message for people. The thread writes it."""
        self._journal.event(message, level)

    def waiting(self, what: str) -> None:
        """Log the room on the cluster that the run waits for; "" ends the wait."""
        self._journal.waiting(what)

    def log_step(self, progress: Progress, pairs: PairValues, extra: dict[str, float]) -> None:
        """Log the metrics of a step: of its global batch, and ``extra``. Neither may change afterwards."""
        self._raise_failure()
        self._tasks.put(partial(self._log_step, progress.step, pairs, extra))

    def is_storing(self) -> bool:
        """Whether a checkpoint is being stored."""
        return not self._is_idle.is_set()

    def skip_checkpoint(self, step: int) -> None:
        """Log that there is no checkpoint of this step."""
        message = f"checkpoint of step {step} skipped: the previous one is still being stored"
        self.event(message, "warning")

    def wait(self) -> None:
        """Return once no checkpoint is being stored: the host has memory for one copy of the state."""
        self._is_idle.wait()
        self._raise_failure()

    def store(self, state: Snapshot, workers: int) -> None:
        """Store a checkpoint, then prune older ones."""
        self._is_idle.clear()
        self._tasks.put(partial(self._store, state, workers))
        self._tasks.put(partial(self._with_retries, self._prune))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        """Write what is left; after an error in the loop, only within ABANDON_AFTER_S and raising nothing."""
        self._tasks.put(None)
        if error is not None:
            self._thread.join(ABANDON_AFTER_S)
            return
        self._thread.join()
        self._raise_failure()

    def _raise_failure(self) -> None:
        failure = self._failure
        self._failure = None
        if failure:
            raise failure

    # ---- the thread

    def _run(self) -> None:
        flushed_at = 0.0
        is_open = True
        try:
            while is_open:
                is_open = self._run_next_task()
                if time.monotonic() - flushed_at >= FLUSH_EVERY_S:
                    self._with_retries(self._journal.flush)
                    flushed_at = time.monotonic()
            self._with_retries(self._pair_log.flush)
            self._with_retries(self._journal.flush)
        except (OSError, Unavailable) as error:
            minutes = f"{self._retry_for_s / 60:g} minutes"
            self._failure = Unavailable(f"storage has accepted no write of training for {minutes}: {error}")
        except BaseException as error:  # raised in the training loop
            self._failure = error
        finally:
            self._is_idle.set()

    def _run_next_task(self) -> bool:
        """Run a task, if one comes within FLUSH_EVERY_S. False once the recorder is closed."""
        try:
            task = self._tasks.get(timeout=FLUSH_EVERY_S)
        except queue.Empty:
            return True
        if task is None:
            return False
        task()
        return True

    def _with_retries(self, call: Callable[[], None]) -> None:
        retrying = Retrying(
            retry=retry_if_exception_type((OSError, Unavailable)),
            wait=wait_exponential_jitter(multiplier=0.5, max=30),
            stop=stop_after_delay(self._retry_for_s),
            before_sleep=self._log_first_retry,
            reraise=True,
        )
        retrying(call)

    def _log_first_retry(self, state: RetryCallState) -> None:
        if state.attempt_number == 1 and state.outcome:
            error = state.outcome.exception()
            message = f"storage failed, the write is retried while training continues: {error}"
            self._journal.event(message, "warning")

    def _log_step(self, step: int, pairs: PairValues, extra: dict[str, float]) -> None:
        terms = pairs.terms
        timesteps = self._schedule.T
        self._metrics = {**step_metrics(pairs.t, pairs.theta, pairs.ref, terms, timesteps), **extra}
        is_on_policy = METHODS[self._spec.objective.method].on_policy
        if step == 1 and terms.margin is not None and not is_on_policy:  # the policy equals its reference
            snr = self._schedule.snr[pairs.t]
            noise = logit_deviation(pairs.t, terms.margin, snr, self._spec.objective.beta, timesteps)
            self._metrics |= noise
            self._journal.event(f"rounding moves the logits of step 0: {format_metrics(noise)}")
        self._pair_log.add(step, pairs.t, terms.margin, terms.gradient_weight, terms.share)
        self._journal.metrics(step, self._metrics)
        for alarm in self._alarms.step(self._metrics):
            self._journal.event(alarm.message, alarm.level)

    def _store(self, state: Snapshot, workers: int) -> None:
        """Journal and pair log go first: a run that resumes here does not write these steps again."""
        self._with_retries(self._journal.flush)
        self._with_retries(self._pair_log.flush)
        began = time.monotonic()
        self._with_retries(partial(self._commit, state, self._record(state.progress, workers)))
        self._journal.metrics(state.progress.step, {CHECKPOINT_SECONDS: time.monotonic() - began})
        self._is_idle.set()

    def _commit(self, state: Snapshot, record: CheckpointRecord) -> None:
        with checkpoints.committed(self._spec.run, record, before_record=self._fence.check) as folder:
            state.write(folder, self._policy)

    def _prune(self) -> None:
        for step in selection.prunable(self._spec):
            checkpoints.delete(self._spec.run, step)
        if self._spec.rollouts:
            first = min(checkpoints.steps(self._spec.run), default=0)
            rounds.prune(self._spec.run, first // self._spec.rollouts.updates_per_round)

    def _record(self, progress: Progress, workers: int) -> CheckpointRecord:
        epoch, pair = divmod(progress.pairs_seen, self._num_pairs)
        return CheckpointRecord(
            step=progress.step,
            pairs_seen=progress.pairs_seen,
            images_seen=progress.images_seen,
            reader=ReaderPosition(epoch=epoch, pair=pair),
            ledger=self._run_identity["ledger"],
            identity=self._run_identity,
            workers=workers,
            attempt=self._spec.attempt,
            created_at=time.time(),
            metrics=self._metrics,
            alarms=self._alarms.state_dict(),
            files={},
        )


def is_storing(recorder: Recorder | None, device: torch.device) -> bool:
    """Whether rank 0, the only one with a recorder, stores a checkpoint: the same answer on every worker."""
    return any_worker([recorder is not None and recorder.is_storing()], device)[0]
