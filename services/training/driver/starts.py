"""Ends a run whose workers die while they start, again and again.

Ray Train counts two things as one (``controller_failure_limit``): workers that found no room within
RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S, and workers that died before they trained. The first may take days and
is not a failure, so Ray Train's own limit is off; this counts the second.
"""

from __future__ import annotations

from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import (
    ReschedulingState,
    RunningState,
    TrainControllerState,
)

from services.errors import Unavailable
from services.stages.runner import describe


class StartFailures(ControllerCallback):  # type: ignore[misc]  # Ray's class is untyped
    """Runs in Ray Train's controller. An error that it raises ends the run."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._failures = 0

    def after_controller_state_update(
        self, previous_state: TrainControllerState, current_state: TrainControllerState
    ) -> None:
        """Raises Unavailable after more than ``most`` failures without a start in between."""
        if isinstance(current_state, RunningState):
            self._failures = 0
        if not isinstance(current_state, ReschedulingState):
            return
        error = current_state.training_failed_error
        if isinstance(getattr(error, "controller_failure", None), WorkerGroupStartupFailedError):
            self._failures += 1
        if self._failures > self._most:
            raise Unavailable(f"workers died {self._failures} times while they started: {describe(error)}")
