"""What the train stage's driver does while its workers train: validation beside them, and every reason to end early.

Ray Train starts workers again after they die, and with more or fewer of them as nodes come and go. What Ray Train cannot
know is decided here: that an error would only come again, that too few workers can ever start, that somebody asked to stop.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import ray
from ray.train.torch import TorchTrainer

from services import checkpoints, storage
from services.contracts import StageFailure, StopRequest, TrainSpec, Validated, least_workers
from services.errors import ServiceError, Stopped, Unavailable
from services.observability import Journal
from services.training import selection
from services.training.loop import FAILED
from services.training.tracking import Tracking
from services.training.validating import validate

log = logging.getLogger("dde")
LOOK_EVERY_S = 2.0
CPUS_PER_WORKER = 1
WORKERS_WITHIN_S = 300.0
"""How long the cluster may lack the workers that a run needs at least."""


def supervise(trainer: TorchTrainer, spec: TrainSpec, journal: Journal) -> None:
    """Run the trainer to its end, or to a stop. Raises Stopped, Unavailable for workers that do not come, and workers' errors
    that starting again would not mend."""
    tracking = Tracking(spec, journal)
    try:
        _watch(Fit(trainer), spec, Validator(spec, journal))
    except Exception:  # not where the stage is cancelled: then its workers are freed at once
        tracking.close()
        raise
    tracking.close()


def _watch(fit: Fit, spec: TrainSpec, validator: Validator) -> None:
    missing = MissingWorkers(spec)
    with stop_on_sigterm(spec.prefix) as ask_to_stop:
        while not fit.over(LOOK_EVERY_S):
            missing.look()
            with _storage_may_be_away():
                ask_to_stop()
                _raise_final(spec)
                if missing.lacking:
                    _raise_asked_to_stop(spec)  # nobody else would see the request
                validator.look()
    _raise_final(spec)
    fit.result()
    _raise_stopped(spec)
    validator.finish()


@contextmanager
def _storage_may_be_away() -> Iterator[None]:
    """Workers ride out an outage or a full disk, and so does the driver: what was not seen now is seen later."""
    try:
        yield
    except (OSError, Unavailable) as error:
        log.warning("storage is looked at again later: %s", error)


class Fit:
    """``trainer.fit()`` on a thread of its own: signals reach the main thread alone, which must be free for them."""

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

    def over(self, timeout_s: float) -> bool:
        """Whether it has ended within this time."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def result(self) -> None:
        """Raises what ended it."""
        if self._error is not None:
            raise self._error


@contextmanager
def stop_on_sigterm(prefix: str) -> Iterator:
    """SIGTERM asks training to write a checkpoint and end. The block calls what it is given now and then, to pass that on."""
    received = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: received.set())

    def ask_to_stop() -> None:
        if received.is_set():
            storage.create_bytes(stop_uri(prefix), StopRequest(why="signal").model_dump_json().encode())

    try:
        yield ask_to_stop
    finally:
        signal.signal(signal.SIGTERM, before)


def stop_uri(prefix: str) -> str:
    """Where training looks for a request to stop."""
    return storage.join(prefix, "stop.json")


def _raise_final(spec: TrainSpec) -> None:
    """Raises a worker's error that would come again."""
    with suppress(FileNotFoundError):
        failure = StageFailure.model_validate_json(storage.read_bytes(storage.join(spec.prefix, FAILED)))
        raise ServiceError(failure.message, failure.param, failure.code)


def _raise_stopped(spec: TrainSpec) -> None:
    """Raises Stopped where workers have ended before the last step."""
    if max(checkpoints.steps(spec.run), default=0) < spec.training.steps:
        _raise_asked_to_stop(spec)


def _raise_asked_to_stop(spec: TrainSpec) -> None:
    """Raises Stopped where somebody asked for it."""
    with suppress(FileNotFoundError):
        request = StopRequest.model_validate_json(storage.read_bytes(stop_uri(spec.prefix)))
        raise Stopped(request.why, max(checkpoints.steps(spec.run), default=0))


class MissingWorkers:
    """Ray Train waits for ever for workers that a cluster has no room for; here that has an end. ``lacking``: what there is too
    little of."""

    def __init__(self, spec: TrainSpec) -> None:
        workers = least_workers(spec.workers)
        self._workers, self._since, self.lacking = workers, time.monotonic(), ""
        self._needed = {"CPU": workers * CPUS_PER_WORKER, "GPU": workers if spec.use_gpu else 0}

    def look(self, patience_s: float = WORKERS_WITHIN_S) -> None:
        """Raises Unavailable where the cluster has been too small for so long. Asks Ray, not storage."""
        there = ray.cluster_resources()
        self.lacking = next((name for name, amount in self._needed.items() if amount > there.get(name, 0)), "")
        if not self.lacking:
            self._since = time.monotonic()
        elif time.monotonic() - self._since >= patience_s:
            needed, found = self._needed[self.lacking], there.get(self.lacking, 0)
            message = f"workers = {self._workers} need {needed} {self.lacking}, the cluster has {found:g}"
            raise Unavailable(message, param="workers")


class Validator:
    """Has one checkpoint after the other looked at, by a task of its own. What was looked at stands in storage, so a run that
    goes on looks at what is missing."""

    def __init__(self, spec: TrainSpec, journal: Journal) -> None:
        self._spec, self._journal = spec, journal
        self._running: tuple[int, ray.ObjectRef] | None = None
        self._validate = ray.remote(num_cpus=1, num_gpus=1 if spec.use_gpu else 0)(validate)

    def look(self) -> None:
        """Take what is ready, begin what is due."""
        if self._running and ray.wait([self._running[1]], timeout=0)[0]:
            self._take(*self._running)
            self._running = None
        if self._running is None and (step := self._next()) is not None:
            self._running = step, self._validate.remote(self._spec, step)

    def finish(self) -> None:
        """Return once everything that is due was looked at."""
        self.look()
        while self._running:
            ray.wait([self._running[1]])
            self.look()

    def _next(self) -> int | None:
        there = selection.outcomes(self._spec.run)
        steps = [0, *checkpoints.steps(self._spec.run)] if self._spec.validation else checkpoints.steps(self._spec.run)
        return next((step for step in steps if selection.is_due(self._spec, step) and step not in there), None)

    def _take(self, step: int, ref: ray.ObjectRef) -> None:
        """Tell of it. A checkpoint that cannot be looked at costs a warning, not the run."""
        try:
            found = ray.get(ref)
        except ray.exceptions.RayError as error:
            why = str(error).strip().splitlines()[-1]
            found = Validated(step=step, seconds=0.0, error=why)
            storage.write_json(checkpoints.outcome_uri(self._spec.run, step), found.model_dump())
            return self._journal.event(f"the model after step {step} could not be validated: {why}", "warning")
        said = ", ".join(f"{name} {value:.4g}" for name, value in found.metrics.items())
        pictures = f"; pictures {found.picture}" if found.picture else ""
        self._journal.event(f"the model after step {step}: {said}{pictures}")
        self._journal.metrics(step, found.metrics)
