"""What the train stage's driver does while its workers train: validation beside them, and every reason to end early.

Ray Train starts workers again after they die, and with more or fewer of them as nodes come and go. What Ray Train cannot
know is decided here: that an error would only come again, that too few workers can ever start, that somebody asked to stop.
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
from services.api.requests import least_workers, most_workers
from services.artifacts import checkpoints
from services.errors import ServiceError, Stopped, Unavailable
from services.stages.journal import Journal
from services.stages.layout import HEARD, STOP
from services.stages.specs import StageFailure, StopRequest, TrainSpec
from services.storage import files
from services.training import selection
from services.training.driver.capacity import lacking, needs
from services.training.fence import Fence
from services.training.tracking.feed import Tracking
from services.training.validation.validate import validate
from services.training.worker.errors import FAILED

log = logging.getLogger("dde")
LOOK_EVERY_S = 2.0
GROWS_WITHIN_S = 300.0
"""How long the cluster may be too small for what a run needs at least."""
UNHEARD_AFTER_S = 90.0
"""A worker that runs hears a request to stop within seconds, where storage does not hang."""
TRIES = 3
"""Of one validation."""


def supervise(trainer: TorchTrainer, spec: TrainSpec, journal: Journal) -> None:
    """Run the trainer to its end, or to a stop. Raises Stopped, Unavailable for workers that do not come, and workers' errors
    that starting again would not mend."""
    tracking = Tracking(spec, journal)
    try:
        _watch(Fit(trainer), spec, journal)
    except Stopped:  # the machine may go any moment
        tracking.close(within_s=5.0)
        raise
    except Exception:  # not where the stage is cancelled: then its workers are freed at once
        tracking.close()
        raise
    tracking.close()


def _watch(fit: Fit, spec: TrainSpec, journal: Journal) -> None:
    validator, stop, workers = Validator(spec, journal), StopRequests(spec), least_workers(spec.workers)
    missing = Missing(f"workers = {workers} need", needs(spec, workers), journal)
    missing_after = Missing("validation needs", needs(spec), journal)
    with stop.on_sigterm():
        while not fit.over(LOOK_EVERY_S):
            missing.look()
            with _storage_may_be_away():
                _raise_final(spec)
                stop.look()
                validator.look()
        _raise_final(spec)
        fit.result()
        stop.raise_before_the_last_step()
        validator.workers_have_gone()
        while not validator.is_done:
            missing_after.look()
            with _storage_may_be_away():
                stop.look()
                validator.look()
            if not validator.is_done:
                time.sleep(LOOK_EVERY_S)


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


def _raise_final(spec: TrainSpec) -> None:
    """Raises a worker's error that would come again."""
    with suppress(FileNotFoundError):
        failure = StageFailure.model_validate_json(files.read_bytes(files.join(spec.prefix, FAILED)))
        raise ServiceError(failure.message, failure.param, failure.code)


class StopRequests:
    """Requests to stop: from the control plane by a file, from the machine by SIGTERM, which is passed on as that file. Workers
    hear it, store a checkpoint and end; where nobody hears it, because no worker could start, the stage ends here."""

    def __init__(self, spec: TrainSpec) -> None:
        self._spec, self._received = spec, threading.Event()
        self._since: float | None = None

    @contextmanager
    def on_sigterm(self) -> Iterator[None]:
        """Receive the signal, in the main thread, while the block runs."""
        before = signal.signal(signal.SIGTERM, lambda *_: self._received.set())
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def look(self) -> None:
        """Pass a signal on. Raises Stopped where a request goes unheard, or there is nobody left to hear it."""
        uri = files.join(self._spec.prefix, STOP)
        if self._received.is_set():
            files.create_bytes(uri, StopRequest(why="signal").model_dump_json().encode())
        if (why := self._why()) is None:
            return
        self._since = self._since or time.monotonic()
        heard = (
            files.exists(files.join(self._spec.prefix, HEARD))
            and self._steps_done() < self._spec.training.steps
        )
        if not heard and time.monotonic() - self._since >= UNHEARD_AFTER_S:
            raise Stopped(why, self._steps_done())

    def raise_before_the_last_step(self) -> None:
        """Raises Stopped where workers have ended, as they were asked to, before the last step."""
        if self._steps_done() < self._spec.training.steps and (why := self._why()):
            raise Stopped(why, self._steps_done())

    def _why(self) -> Literal["pause", "signal"] | None:
        with suppress(FileNotFoundError):
            return StopRequest.model_validate_json(files.read_bytes(files.join(self._spec.prefix, STOP))).why
        return None

    def _steps_done(self) -> int:
        return max(checkpoints.steps(self._spec.run), default=0)


class Missing:
    """Ray waits for ever for what a cluster is too small for; here that has an end. What others hold is not looked at here, but
    by Ray Train (train.MAX_START_FAILURES)."""

    def __init__(self, who: str, needed: dict[str, float], journal: Journal) -> None:
        self._who, self._needed, self._journal = who, needed, journal
        self._since: float | None = None

    def look(self) -> None:
        """Raises Unavailable where the cluster has been too small for GROWS_WITHIN_S: it may grow until then."""
        there = ray.cluster_resources()
        if (name := lacking(self._needed, there)) is None:
            self._since = None
            return
        message = f"{self._who} {self._needed[name]:g} {name}, the cluster has {there.get(name, 0):g}"
        if self._since is None:
            self._since = time.monotonic()
            with _storage_may_be_away():
                self._journal.event(f"{message}: waiting {GROWS_WITHIN_S:.0f} s for more", "warning")
        elif time.monotonic() - self._since >= GROWS_WITHIN_S:
            raise Unavailable(message, param="workers")


class Validator:
    """Has one checkpoint after the other looked at, by a task of its own. What was looked at stands in storage, so a run that
    goes on looks at what is missing. ``is_done``: nothing is due.

    A task takes what a worker takes. It must not be what workers wait for, at their start or after they have died; so it is
    begun where the cluster has room for it beside all workers, and after training where it has not.
    """

    def __init__(self, spec: TrainSpec, journal: Journal) -> None:
        self._spec, self._journal = spec, journal
        self._running: tuple[int, ray.ObjectRef] | None = None
        self._tries: Counter[int] = Counter()
        self._needs, self._beside = needs(spec), needs(spec, most_workers(spec.workers) + 1)
        self._workers_run, self._is_told = True, False
        self.is_done = False
        self._validate = ray.remote(num_cpus=self._needs["CPU"], num_gpus=self._needs["GPU"], max_retries=0)(
            validate
        )

    def look(self) -> None:
        """Take what is ready, begin what is due."""
        if self._running and ray.wait([self._running[1]], timeout=0)[0]:
            ready, self._running = self._running, None
            self._take(*ready)
        elif (
            self._running and self._workers_run and self._is_too_small()
        ):  # a node has gone, and workers want what is left
            (step, task), self._running = self._running, None
            ray.cancel(task, force=True)
            self._tries[step] -= 1
        due = None if self._running else self._next()
        if due is not None and self._has_room():
            self._tries[due] += 1
            self._running = due, self._validate.remote(self._spec, due)
        self.is_done = self._running is None and due is None

    def workers_have_gone(self) -> None:
        """From now on there is nobody to keep room for, and nothing more falls due."""
        self._workers_run = self.is_done = False

    def _has_room(self) -> bool:
        if not self._workers_run:
            return True
        if self._is_too_small():
            if self._spec.validation and not self._is_told:
                self._is_told = True
                message = "the cluster has no room for validation beside the workers: it waits for room, or for their end"
                self._journal.event(message, "warning")
            return False
        return (
            not lacking(self._needs, ray.available_resources())
            and Fence(self._spec.run, self._spec.attempt).has_workers()
        )

    def _is_too_small(self) -> bool:
        return lacking(self._beside, ray.cluster_resources()) is not None

    def _next(self) -> int | None:
        first = [0] if self._spec.validation else []
        due = [
            step for step in first + checkpoints.steps(self._spec.run) if selection.is_due(self._spec, step)
        ]
        there = selection.looked_at(self._spec.run) if due else set()
        return next((step for step in due if step not in there), None)

    def _take(self, step: int, ref: ray.ObjectRef) -> None:
        """Tell of it. A checkpoint that cannot be looked at, not at the third time either, costs a warning and not the run."""
        try:
            found = ray.get(ref)
        except ray.exceptions.RayError as error:
            why = str(error).strip().splitlines()[-1]
            if self._tries[step] < TRIES:
                return
            found = Validated(step=step, seconds=0.0, error=why)
            files.write_json(checkpoints.outcome_uri(self._spec.run, step), found.model_dump())
            return self._journal.event(
                f"the model after step {step} could not be validated: {why}", "warning"
            )
        said = ", ".join(f"{name} {value:.4g}" for name, value in found.metrics.items())
        pictures = f"; pictures {found.picture}" if found.picture else ""
        self._journal.event(f"the model after step {step}: {said}{pictures}")
        self._journal.metrics(step, found.metrics)
