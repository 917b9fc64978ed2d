"""The driver of the train stage while its workers train: validates checkpoints, and ends the run early.

Ray Train restarts workers that die, and changes their number as nodes come and go. The driver decides what
Ray Train cannot know: that an error would only come again, that somebody wants the run to stop. It
reports that the run waits for room.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Literal

import ray
from ray.train.torch import TorchTrainer

from services.api.records import Validated
from services.api.requests import most_workers
from services.artifacts import checkpoints
from services.errors import ServiceError, Stopped, Unavailable
from services.settings import TrainingSettings
from services.stages import layout
from services.stages.journal import Journal
from services.stages.runner import describe, recurs
from services.stages.specs import StageFailure, StopRequest, TrainSpec
from services.storage import files
from services.training import selection
from services.training.driver import capacity
from services.training.driver.room import WaitReport, WorkersRoom, validation_shortage
from services.training.fence import Fence
from services.training.tracking.feed import Tracking
from services.training.validation.validate import validate

log = logging.getLogger("dde")
POLL_EVERY_S = 2.0
"""How soon a request is noticed. A poll is a few reads of storage and of Ray's state: cheap enough."""
VALIDATION_TRIES = 3
"""A lost node costs one, and no more than one is lost in most validations; the run does not depend on it."""


def supervise(trainer: TorchTrainer, spec: TrainSpec, journal: Journal) -> None:
    """Run the trainer to its end, and validate its checkpoints.

    Raises Stopped after a request to stop, and a worker's error if a restart would end in the same one. Waits
    for room without an end.
    """
    tracking = Tracking(spec, journal)
    try:
        _train_and_validate(Fit(trainer), spec, journal)
    except Stopped:  # the machine may disappear at any moment
        tracking.close(within_s=5.0)
        raise
    except Exception:  # not KeyboardInterrupt: a canceled stage frees its workers at once
        tracking.close()
        raise
    tracking.close()


def _train_and_validate(fit: Fit, spec: TrainSpec, journal: Journal) -> None:
    room = WorkersRoom(spec)
    report = WaitReport(journal)
    validator = Validator(spec, journal)
    stop = StopRequests(spec)
    with stop.on_sigterm():
        while not fit.wait(POLL_EVERY_S):
            shortage = room.look()
            with _storage_outages_tolerated():
                _raise_final_error(spec)
                stop.check(has_workers=room.has_machines)
                report.update(shortage)
                validator.poll()
                stop.on_violation(journal)
        _raise_final_error(spec)
        fit.raise_error()
        stop.raise_if_stopped_early()
        validator.training_has_ended()
        while not validator.is_done:
            shortage = validation_shortage(spec)
            with _storage_outages_tolerated():
                stop.check(has_workers=False)
                report.update(shortage)
                validator.poll()
            if not validator.is_done:
                time.sleep(POLL_EVERY_S)


@contextmanager
def _storage_outages_tolerated() -> Iterator[None]:
    """Workers survive an outage or a full disk; so does the driver. The next poll catches up."""
    try:
        yield
    except (OSError, Unavailable) as error:
        log.warning("storage failed, the next poll reads it again: %s", error)


def _raise_final_error(spec: TrainSpec) -> None:
    """Raises a worker's error if a restart would end in the same one."""
    with suppress(FileNotFoundError):
        failure = StageFailure.model_validate_json(files.read_bytes(layout.worker_failed_uri(spec.prefix)))
        raise ServiceError(failure.message, failure.param, failure.code)


class Fit:
    """``trainer.fit()`` on a thread of its own. The main thread stays free for signals."""

    def __init__(self, trainer: TorchTrainer) -> None:
        self._trainer = trainer
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="fit", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._trainer.fit()
        except BaseException as error:
            self._error = error

    def wait(self, timeout_s: float) -> bool:
        """Wait for the end; whether it came within this time."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def raise_error(self) -> None:
        """Raises the error that ended training, if there was one."""
        if self._error is not None:
            raise self._error


class StopRequests:
    """Requests to stop: a file from the control plane, and SIGTERM, which is forwarded as that file.

    Workers acknowledge a request, store a checkpoint and end. If there are none, or none acknowledges it, the
    stage ends here.
    """

    def __init__(self, spec: TrainSpec) -> None:
        self._spec = spec
        self._ack_within_s = TrainingSettings().stop_ack_s
        self._is_unguarded = False
        self._sigterm = threading.Event()
        self._requested_since: float | None = None

    @contextmanager
    def on_sigterm(self) -> Iterator[None]:
        """Receive the signal while the block runs. Call it in the main thread."""
        previous = signal.signal(signal.SIGTERM, lambda *_: self._sigterm.set())
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous)

    def check(self, *, has_workers: bool) -> None:
        """Forward a signal. Raises Stopped if no worker acknowledges a request, or none is there to do so."""
        if self._sigterm.is_set():
            request = StopRequest(why="signal").model_dump_json()
            files.create_bytes(layout.stop_uri(self._spec.prefix), request.encode())
        why = self._why()
        if why is None or why == "guard":
            return
        if self._requested_since is None:
            self._requested_since = time.monotonic()
        is_acknowledged = files.exists(layout.stop_ack_uri(self._spec.prefix))
        if is_acknowledged and self._steps_done() < self._spec.training.steps:
            return
        if not has_workers or time.monotonic() - self._requested_since >= self._ack_within_s:
            raise Stopped(why, self._steps_done())

    def on_violation(self, journal: Journal) -> None:
        """End training if validation has found a violation of the guard."""
        if not (self._spec.rollouts and self._spec.rollouts.guard) or self._why():
            return
        outcomes = selection.outcomes(self._spec.run)
        missing = selection.unguarded(self._spec, outcomes)
        if missing and not self._is_unguarded:
            self._is_unguarded = True
            names = ", ".join(missing)
            journal.event(
                f"rollouts.guard does not hold: the base's {names} could not be measured", "warning"
            )
        found = selection.violation(self._spec, outcomes)
        if found:
            step, message = found
            request = StopRequest(why="guard").model_dump_json()
            files.create_bytes(layout.stop_uri(self._spec.prefix), request.encode())
            journal.event(f"training ends: after step {step} {message}", "warning")

    def raise_if_stopped_early(self) -> None:
        """Raises Stopped if the workers have ended before the last step, on request."""
        if self._steps_done() < self._spec.training.steps:
            why = self._why()
            if why and why != "guard":
                raise Stopped(why, self._steps_done())

    def _why(self) -> Literal["pause", "signal", "guard"] | None:
        """Who wants the run to stop, or None."""
        with suppress(FileNotFoundError):
            request = files.read_bytes(layout.stop_uri(self._spec.prefix))
            return StopRequest.model_validate_json(request).why
        return None

    def _steps_done(self) -> int:
        return max(checkpoints.steps(self._spec.run), default=0)


class Validator:
    """Validates checkpoints in Ray tasks, one after the other. A resumed run validates those that are left.

    A task needs as much as a worker, and workers must never wait for it, neither at their start nor after
    they have died. So it starts if the cluster has room for it beside all workers, else after training.
    ``is_done``: nothing is due.
    """

    def __init__(self, spec: TrainSpec, journal: Journal) -> None:
        self._spec = spec
        self._journal = journal
        self._running: tuple[int, ray.ObjectRef] | None = None
        self._tries: Counter[int] = Counter()
        self._needs = capacity.needed(spec)
        self._needs_with_workers = capacity.needed(
            spec, most_workers(spec.workers) + capacity.rollout_actors(spec) + 1
        )
        self._is_training = True
        self._has_warned = False
        self.is_done = False
        task = ray.remote(num_cpus=self._needs["CPU"], num_gpus=self._needs["GPU"], max_retries=0)
        self._validate = task(validate)

    def poll(self) -> None:
        """Report a validation that has finished; start the next one that is due."""
        if self._running:
            step, task = self._running
            if ray.wait([task], timeout=0)[0]:
                self._running = None
                self._report(step, task)
            elif self._is_training and self._is_cluster_too_small():  # a node has left: make room for workers
                self._running = None
                ray.cancel(task, force=True)
                self._tries[step] -= 1
        due = None if self._running else self._next_due()
        if due is not None and self._can_start():
            self._tries[due] += 1
            self._running = (due, self._validate.remote(self._spec, due))
        self.is_done = self._running is None and due is None

    def training_has_ended(self) -> None:
        """From now on no worker needs room, and no further checkpoint appears."""
        self._is_training = False
        self.is_done = False

    def _next_due(self) -> int | None:
        base = [0] if self._spec.validation else []
        steps = base + checkpoints.steps(self._spec.run)
        due = [step for step in steps if selection.is_due(self._spec, step)]
        validated = selection.validated_steps(self._spec.run) if due else set()
        return next((step for step in due if step not in validated), None)

    def _can_start(self) -> bool:
        if not self._is_training:
            return True
        if self._is_cluster_too_small():
            self._warn_once()
            return False
        has_room = capacity.missing(self._needs, ray.available_resources()) is None
        return has_room and Fence(self._spec.run, self._spec.attempt).has_workers()

    def _is_cluster_too_small(self) -> bool:
        return capacity.missing(self._needs_with_workers, ray.cluster_resources()) is not None

    def _warn_once(self) -> None:
        if self._spec.validation and not self._has_warned:
            self._has_warned = True
            message = "the cluster has no room for validation beside the workers"
            self._journal.event(f"{message}: it waits for room, or for the end of training", "warning")

    def _report(self, step: int, task: ray.ObjectRef) -> None:
        """Log the outcome. After an error of its own, such as NaN weights, or VALIDATION_TRIES failures of
        other kinds, such as lost nodes, a checkpoint is given up; the run continues.
        """
        try:
            outcome = ray.get(task)
        except ray.exceptions.RayError as error:
            if recurs(error) or self._tries[step] >= VALIDATION_TRIES:
                self._give_up(step, describe(error))
            return
        metrics = ", ".join(f"{name} {value:.4g}" for name, value in outcome.metrics.items())
        images = f"; images {outcome.picture}" if outcome.picture else ""
        self._journal.event(f"the model after step {step}: {metrics}{images}")
        self._journal.metrics(step, outcome.metrics)

    def _give_up(self, step: int, why: str) -> None:
        outcome = Validated(step=step, seconds=0.0, error=why)
        files.write_json(layout.outcome_uri(self._spec.run, step), outcome.model_dump())
        self._journal.event(f"the model after step {step} could not be validated: {why}", "warning")
