"""What rank 0 tells and keeps: metrics, the pair log, checkpoints. On a thread of its own, so training waits for none of it.

Writes go out in order. Where storage does not take one (an outage, a full disk) it is tried again for PATIENCE_S, while
training goes on; a checkpoint that comes due while another is still on its way is left out, and one that is needed waits.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

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
from dde_core.metrics import format_metrics, logit_deviation, step_metrics
from dde_core.models.policy import Policy
from dde_core.schedule import Schedule
from dde_core.train_step import PairErrors, StepTerms
from services.artifacts import checkpoints
from services.artifacts.checkpoints import CheckpointRecord, ReaderPosition
from services.errors import Unavailable
from services.stages.journal import Journal
from services.stages.specs import TrainSpec
from services.training.fence import Fence
from services.training.pair_log import PairLog
from services.training.selection import superfluous

PATIENCE_S = 1800.0
FLUSH_EVERY_S = 1.0
ABANDONED_AFTER_S = 10.0


@dataclass(frozen=True, eq=False)
class PairValues:
    """What a step says of each pair of the global batch, on the host."""

    t: Int[Tensor, " b"]
    theta: PairErrors
    ref: PairErrors | None
    terms: StepTerms


def _nothing() -> None:
    """Before the first thing that is to be done."""


class Recorder:
    """Raises, at ``step`` and ``close``, what ended its thread: Unavailable where storage was away too long, Overtaken where
    somebody else goes on with the run."""

    def __init__(
        self,
        spec: TrainSpec,
        fence: Fence,
        same: dict[str, Any],
        policy: Policy,
        schedule: Schedule,
        num_pairs: int,
        done: Progress,
    ) -> None:
        self._spec, self._fence, self._same, self._policy = spec, fence, same, policy
        self._schedule, self._num_pairs = schedule, num_pairs
        self._journal = Journal(
            spec.prefix, flush_every_s=math.inf
        )  # by this thread alone, which tries again
        self._pair_log, self._alarms = PairLog(spec.run), Alarms(spec.objective)
        if done.step:
            self._alarms.load_state_dict(checkpoints.read(spec.run, done.step).alarms)
        self._metrics: dict[str, float] = {}
        self._todo: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._has_stored = threading.Event()
        self._has_stored.set()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="recorder")
        self._thread.start()

    # ---- called by training

    def event(self, message: str) -> None:
        """Tell people something."""
        self._todo.put(partial(self._journal.event, message))

    def step(self, done: Progress, pairs: PairValues, more: dict[str, float]) -> None:
        """Tell of a step from the values of the global batch, which are not changed any more, and of its time."""
        self._raise_failure()
        self._todo.put(partial(self._tell, done.step, pairs, more))

    def leaves_out(self, step: int) -> bool:
        """Whether there is no checkpoint of this step, because one is still on its way. It is told."""
        if self._has_stored.is_set():
            return False
        warning = f"no checkpoint of step {step}: the one before is still on its way"
        self._todo.put(partial(self._journal.event, warning, "warning"))
        return True

    def wait(self) -> None:
        """Return once no checkpoint is on its way: the host has memory for one copy of the state."""
        self._has_stored.wait()
        self._raise_failure()

    def checkpoint(self, state: Snapshot, workers: int) -> None:
        """Store a state."""
        self._has_stored.clear()
        self._todo.put(partial(self._commit, state, workers))
        self._todo.put(partial(self._patiently, self._prune))

    def close(self) -> None:
        """Return once all is written."""
        self._todo.put(None)
        self._thread.join()
        self._raise_failure()

    def abandon(self) -> None:
        """Training has failed, and what it failed of counts: write what can be written at once."""
        self._todo.put(None)
        self._thread.join(ABANDONED_AFTER_S)

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure:
            raise failure

    # ---- the thread

    def _run(self) -> None:
        flushed_at = 0.0
        todo: Callable[[], None] | None = _nothing
        try:
            while todo is not None:
                with suppress(queue.Empty):
                    if todo := self._todo.get(timeout=FLUSH_EVERY_S):
                        todo()
                        todo = _nothing  # a state that is stored is let go
                if time.monotonic() - flushed_at >= FLUSH_EVERY_S:
                    self._patiently(self._journal.flush)
                    flushed_at = time.monotonic()
            self._patiently(self._pair_log.flush)
            self._patiently(self._journal.flush)
        except (OSError, Unavailable) as error:
            minutes = f"{PATIENCE_S / 60:.0f} minutes"
            self._failure = Unavailable(f"storage has not taken what training stores for {minutes}: {error}")
        except BaseException as error:  # told to training, which ends
            self._failure = error
        finally:
            self._has_stored.set()

    def _patiently(self, call: Callable[[], Any]) -> Any:
        again = Retrying(
            retry=retry_if_exception_type((OSError, Unavailable)),
            wait=wait_exponential_jitter(multiplier=0.5, max=30),
            stop=stop_after_delay(PATIENCE_S),
            before_sleep=self._say_once,
            reraise=True,
        )
        return again(call)

    def _say_once(self, state: RetryCallState) -> None:
        if state.attempt_number == 1 and state.outcome:
            error = state.outcome.exception()
            self._journal.event(f"storage is tried again, while training goes on: {error}", "warning")

    def _tell(self, step: int, pairs: PairValues, more: dict[str, float]) -> None:
        t, terms, schedule = pairs.t, pairs.terms, self._schedule
        self._metrics = {**step_metrics(t, pairs.theta, pairs.ref, terms, schedule.T), **more}
        if step == 1 and terms.margin is not None:  # the policy was still its reference
            beta = self._spec.objective.beta
            noise = logit_deviation(t, terms.margin, schedule.snr[t], beta, schedule.T)
            self._metrics |= noise
            self._journal.event(f"rounding moves the logits of step 0: {format_metrics(noise)}")
        self._pair_log.add(step, t, terms.margin, terms.gradient_weight)
        self._journal.metrics(step, self._metrics)
        for message in self._alarms.step(self._metrics):
            self._journal.event(message, "info" if " is over: " in message else "warning")

    def _commit(self, state: Snapshot, workers: int) -> None:
        """What was told up to this step goes first: a run that goes on from here does not tell it again."""
        self._patiently(self._journal.flush)
        self._patiently(self._pair_log.flush)
        self._patiently(partial(self._write, state, self._record(state.progress, workers)))
        self._has_stored.set()

    def _write(self, state: Snapshot, record: CheckpointRecord) -> None:
        with checkpoints.committed(self._spec.run, record, before_record=self._fence.check) as folder:
            state.write(folder, self._policy)

    def _prune(self) -> None:
        for step in superfluous(self._spec):
            checkpoints.delete(self._spec.run, step)

    def _record(self, done: Progress, workers: int) -> CheckpointRecord:
        epoch, pair = divmod(done.pairs_seen, self._num_pairs)
        return CheckpointRecord(
            step=done.step,
            pairs_seen=done.pairs_seen,
            images_seen=done.images_seen,
            reader=ReaderPosition(epoch=epoch, pair=pair),
            ledger=self._same["ledger"],
            identity=self._same,
            workers=workers,
            attempt=self._spec.attempt,
            created_at=time.time(),
            metrics=self._metrics,
            alarms=self._alarms.state_dict(),
            files={},
        )
