"""Where people look at a run: TensorBoard always, MLflow and Weights & Biases where they are configured, by their own clients.

None of them may end or hold up training. Each has an outbox, emptied by the one thread that calls this module, and at the end
by one of its own; what cannot be delivered (a server that is down, storage that fails) stays there, in order, and is tried
again. That a tracker fails is said once, and once that it works again.
A run that goes on after a kill tells every step again: trackers show each once.
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
"""TensorBoard's file is uploaded whole, each time."""
LONGEST_PAUSE_S = 300.0
MAX_WAITING = 5000
"""Steps that an outbox holds, about 14 KB each; the oldest go first. The published runs have 2,000."""


def check_trackers(settings: TrackerSettings) -> None:
    """Raises ServiceError where a tracker is configured whose client is not installed."""
    for wanted, variable, package in (
        (settings.mlflow, "MLFLOW_TRACKING_URI", "mlflow"),
        (settings.wandb, "WANDB_API_KEY or WANDB_MODE", "wandb"),
    ):
        if wanted and importlib.util.find_spec(package) is None:
            message = f"{variable} is set, but {package} is not installed: it comes with dde-align[{package}]"
            raise ServiceError(message, code="tracker_not_installed")


def open_trackers(settings: TrackerSettings, spec: TrainSpec, tell: Callable[[str, Level], None]) -> Trackers:
    """What is configured. ``tell`` gets events, a message and its level, from several threads; it raises nothing.

    Connections are made by the first delivery.
    """
    made: dict[str, Callable[[], Tracker]] = {"TensorBoard": lambda: TensorBoard(spec)}
    if settings.mlflow:
        made["MLflow"] = lambda: MLflow(settings, spec)
    if settings.wandb:
        made["Weights & Biases"] = lambda: WandB(settings, spec)
    return Trackers(made, tell)


class Trackers:
    """All of them as one, for one thread. ``made`` opens each by name. Raises nothing that a tracker raises."""

    def __init__(self, made: dict[str, Callable[[], Tracker]], tell: Callable[[str, Level], None]) -> None:
        self._outboxes = {name: Outbox(name, make, tell) for name, make in made.items()}
        self._tell = tell

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Of a training step. The values are not changed any more."""
        self._put(lambda tracker: tracker.metrics(step, values))

    def validation(self, step: int, values: dict[str, float], picture: bytes | None) -> None:
        """Of the model after ``step`` steps. A run that goes on tells all that is known, from the first one on."""
        self._put(lambda tracker: tracker.validation(step, values, picture))

    def deliver(self) -> None:
        """Tell what waits, for GIVES_UP_AFTER_S each at most."""
        for outbox in self._outboxes.values():
            outbox.deliver()

    def close(self, within_s: float) -> None:
        """Deliver what can be delivered, and let go; one that takes longer is left to itself."""
        ends_at, closing = time.monotonic() + within_s, dict[str, threading.Thread]()
        for name, outbox in self._outboxes.items():
            closing[name] = threading.Thread(
                target=outbox.close, args=(within_s,), name=f"close {name}", daemon=True
            )
            closing[name].start()
        for name, thread in closing.items():
            thread.join(max(0.0, ends_at - time.monotonic()))
            if thread.is_alive():
                self._tell(
                    f"{name} was not closed within {within_s:.1f} s, and may lack the last steps", "warning"
                )

    def _put(self, call: Callable[[Tracker], None]) -> None:
        for outbox in self._outboxes.values():
            outbox.put(call)


class Outbox:
    """What one tracker is still to be told. After a failure it is left alone for a second, then twice as long, and so on."""

    def __init__(self, name: str, make: Callable[[], Tracker], tell: Callable[[str, Level], None]) -> None:
        self._name, self._make, self._tell = name, make, tell
        self._tracker: Tracker | None = None
        self._waiting: deque[Callable[[Tracker], None]] = deque(maxlen=MAX_WAITING)
        self._failures, self._lost = 0, 0
        self._again_at, self._flush_at = 0.0, 0.0

    def put(self, call: Callable[[Tracker], None]) -> None:
        """One more thing to tell."""
        self._lost += len(self._waiting) == MAX_WAITING
        self._waiting.append(call)

    def deliver(self, within_s: float = GIVES_UP_AFTER_S) -> None:
        """Tell what waits, as far as there is time, and let it be seen every FLUSH_EVERY_S."""
        ends_at = time.monotonic() + within_s
        if time.monotonic() < self._again_at:
            return
        try:
            self._tracker = self._tracker or self._make()
            while self._waiting and time.monotonic() < ends_at:
                self._waiting[0](self._tracker)
                self._waiting.popleft()
            if self._failures or time.monotonic() >= self._flush_at:
                self._tracker.flush()
                self._flush_at = time.monotonic() + FLUSH_EVERY_S
        except Exception as error:  # whatever a client raises: no tracker is worth a run
            self._failed(error)
        else:
            if self._failures:
                self._tell(f"{self._name} is told again, {self._lost} steps are lost", "info")
            self._failures = self._lost = 0

    def close(self, within_s: float) -> None:
        """Tell what waits, trying again for half of the time, then say what could not be told, and let go."""
        gives_up_at, self._again_at = time.monotonic() + within_s / 2, 0.0
        self.deliver(within_s / 2)
        while (self._waiting or self._failures) and time.monotonic() < gives_up_at:
            time.sleep(0.1)
            self.deliver(gives_up_at - time.monotonic())
        if self._waiting:
            self._tell(
                f"{self._name} lacks the last {len(self._waiting)} things that it was to be told", "warning"
            )
        if self._tracker:
            try:
                self._tracker.close()
            except Exception as error:
                self._tell(f"{self._name} was not closed: {_safe(error)}", "warning")

    def _failed(self, error: Exception) -> None:
        self._failures += 1
        self._again_at = time.monotonic() + min(2.0 ** (self._failures - 1), LONGEST_PAUSE_S)
        if self._failures == 1:
            self._tell(
                f"{self._name} is not told, and tried again while training goes on: {_safe(error)}", "warning"
            )


def _safe(error: Exception) -> str:
    """Its first line, without the user and password that a URI may hold."""
    said = re.sub(r"//[^/@\s]+@", "//", f"{type(error).__name__}: {error}")
    return said.splitlines()[0][:300]
