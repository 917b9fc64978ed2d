"""Delivers a run's metrics to its trackers: TensorBoard, and MLflow and Weights & Biases if configured.

No tracker can end training or make it wait. Each has an outbox that one thread empties, and at the end a
thread of its own. What cannot be delivered (a server that is down, storage that fails) stays in the outbox,
in order, and is retried. One event reports that a tracker fails, one that it works again. A resumed run sends
every step again: a tracker shows it once.
"""

from __future__ import annotations

import importlib.util
import re
import threading
import time
from collections import deque
from collections.abc import Callable

from services.errors import ServiceError
from services.settings import TrackerSettings
from services.stages.specs import Level, TrainSpec
from services.training.tracking.clients import GIVES_UP_AFTER_S, MLflow, TensorBoard, Tracker, WandB

FLUSH_EVERY_S = 10.0
"""Every flush uploads TensorBoard's whole file."""
MAX_PAUSE_S = 300.0
MAX_WAITING = 5000
"""Updates in an outbox, about 14 KB each; the oldest go first. The published runs have 2,000 steps."""

Update = Callable[[Tracker], None]
LogEvent = Callable[[str, Level], None]


def check_trackers(settings: TrackerSettings) -> None:
    """Raises ServiceError if a tracker is configured and its client is not installed."""
    for is_configured, variable, package in (
        (settings.mlflow, "MLFLOW_TRACKING_URI", "mlflow"),
        (settings.wandb, "WANDB_API_KEY or WANDB_MODE", "wandb"),
    ):
        if is_configured and importlib.util.find_spec(package) is None:
            message = f"{variable} is set, but {package} is not installed: pip install 'dde-align[{package}]'"
            raise ServiceError(message, code="tracker_not_installed")


def open_trackers(settings: TrackerSettings, spec: TrainSpec, log_event: LogEvent) -> Trackers:
    """The configured trackers. They connect on the first delivery.

    ``log_event`` gets messages with their level, from several threads. It must not raise.
    """
    openers: dict[str, Callable[[], Tracker]] = {"TensorBoard": lambda: TensorBoard(spec)}
    if settings.mlflow:
        openers["MLflow"] = lambda: MLflow(settings, spec)
    if settings.wandb:
        openers["Weights & Biases"] = lambda: WandB(settings, spec)
    return Trackers(openers, log_event)


class Trackers:
    """All trackers as one, for one thread. Their errors are never raised. ``openers`` opens each by name."""

    def __init__(self, openers: dict[str, Callable[[], Tracker]], log_event: LogEvent) -> None:
        self._outboxes = {name: Outbox(name, opener, log_event) for name, opener in openers.items()}
        self._log_event = log_event

    def log_metrics(self, step: int, values: dict[str, float]) -> None:
        """Queue the metrics of a training step. ``values`` must not change afterwards."""
        self._put(lambda tracker: tracker.log_metrics(step, values))

    def log_validation(self, step: int, values: dict[str, float], image: bytes | None) -> None:
        """Queue what validation measured after ``step`` steps. A resumed run queues all of it again."""
        self._put(lambda tracker: tracker.log_validation(step, values, image))

    def deliver(self) -> None:
        """Deliver what is waiting, for at most GIVES_UP_AFTER_S a tracker."""
        for outbox in self._outboxes.values():
            outbox.deliver()

    def close(self, within_s: float) -> None:
        """Deliver what can be delivered, and close all trackers. One that takes longer is left behind."""
        ends_at = time.monotonic() + within_s
        threads: dict[str, threading.Thread] = {}
        for name, outbox in self._outboxes.items():
            threads[name] = threading.Thread(
                target=outbox.close, args=(within_s,), name=f"close {name}", daemon=True
            )
            threads[name].start()
        for name, thread in threads.items():
            thread.join(max(0.0, ends_at - time.monotonic()))
            if thread.is_alive():
                message = f"{name} was not closed within {within_s:.1f} s, and may lack the last steps"
                self._log_event(message, "warning")

    def _put(self, update: Update) -> None:
        for outbox in self._outboxes.values():
            outbox.put(update)


class Outbox:
    """The updates that one tracker has not received. Each failure doubles the pause before a retry."""

    def __init__(self, name: str, opener: Callable[[], Tracker], log_event: LogEvent) -> None:
        self._name = name
        self._opener = opener
        self._log_event = log_event
        self._tracker: Tracker | None = None
        self._waiting: deque[Update] = deque(maxlen=MAX_WAITING)
        self._failures = 0
        self._dropped = 0
        self._retry_at = 0.0
        self._flush_at = 0.0

    def put(self, update: Update) -> None:
        """Add an update; a full outbox drops its oldest one."""
        if len(self._waiting) == MAX_WAITING:
            self._dropped += 1
        self._waiting.append(update)

    def deliver(self, within_s: float = GIVES_UP_AFTER_S) -> None:
        """Deliver what is waiting, as far as time allows, and flush every FLUSH_EVERY_S."""
        if time.monotonic() < self._retry_at:
            return
        try:
            self._send(ends_at=time.monotonic() + within_s)
        except Exception as error:  # whatever a client raises: no tracker is worth a run
            self._pause(error)
            return
        if self._failures:
            self._log_event(f"{self._name} works again, {self._dropped} steps were lost", "info")
        self._failures = 0
        self._dropped = 0

    def _send(self, ends_at: float) -> None:
        self._tracker = self._tracker or self._opener()
        while self._waiting and time.monotonic() < ends_at:
            self._waiting[0](self._tracker)
            self._waiting.popleft()
        if self._failures or time.monotonic() >= self._flush_at:
            self._tracker.flush()
            self._flush_at = time.monotonic() + FLUSH_EVERY_S

    def _pause(self, error: Exception) -> None:
        self._failures += 1
        self._retry_at = time.monotonic() + min(2.0 ** (self._failures - 1), MAX_PAUSE_S)
        if self._failures == 1:
            message = f"{self._name} failed and is retried while training continues: {_summary(error)}"
            self._log_event(message, "warning")

    def close(self, within_s: float) -> None:
        """Deliver what is waiting, with retries for half of the time, report what is lost, and close."""
        gives_up_at = time.monotonic() + within_s / 2
        self._retry_at = 0.0
        self.deliver(within_s / 2)
        while (self._waiting or self._failures) and time.monotonic() < gives_up_at:
            time.sleep(0.1)
            self.deliver(gives_up_at - time.monotonic())
        if self._waiting:
            message = f"{self._name} did not receive the last {len(self._waiting)} updates"
            self._log_event(message, "warning")
        if self._tracker:
            try:
                self._tracker.close()
            except Exception as error:
                self._log_event(f"{self._name} was not closed: {_summary(error)}", "warning")


def _summary(error: Exception) -> str:
    """Its first line, without the user and password that a URI may contain."""
    message = re.sub(r"//[^/@\s]+@", "//", f"{type(error).__name__}: {error}")
    return message.splitlines()[0][:300]
