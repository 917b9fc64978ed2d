"""A driver without machines: what it reports, when it stops, and which failures to start it counts."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray.train
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.controller.state import (
    InitializingState,
    ReschedulingState,
    RunningState,
)

from services.errors import Stopped, Unavailable
from services.settings import TrainingSettings
from services.stages import layout
from services.stages.journal import Journal, read_journal
from services.stages.specs import StopRequest
from services.storage import files
from services.training.driver import room
from services.training.driver.room import WaitReport
from services.training.driver.starts import StartFailures
from services.training.driver.supervision import StopRequests

DAY_S = 86_400.0
SHORTAGE = "workers = 2 need 2 GPU; the cluster has 0 free of 8"


def reported(prefix: str) -> list[str]:
    entries = [entry for _, some in read_journal(prefix, 0) for entry in some]
    assert all(entry.message is None for entry in entries), "the control plane makes the events"
    return [str(entry.waiting_for) for entry in entries]


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """The time that reports are measured by."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(room, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_a_wait_of_a_day_is_reported_when_it_begins_then_ever_more_seldom_and_when_it_ends(tmp_path, clock):
    prefix = files.as_uri(tmp_path)
    at: list[float] = []
    began = clock.now

    class Timed(Journal):
        def waiting(self, what: str) -> None:
            super().waiting(what)
            at.append(clock.now - began)

    report = WaitReport(Timed(prefix))
    while clock.now < began + DAY_S:
        report.update(SHORTAGE)
        clock.now += 10.0
    pauses = [later - earlier for earlier, later in itertools.pairwise(at)]
    assert at[0] <= 10.0
    assert pauses[:7] == [60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 3600.0]
    assert set(pauses[6:]) == {3600.0}
    assert len(at) == 29
    report.update(None)
    report.update(None)
    assert reported(prefix) == [SHORTAGE] * 29 + [""]


def test_resources_that_are_taken_for_a_moment_are_no_wait(tmp_path, clock):
    report = WaitReport(Journal(files.as_uri(tmp_path)))
    for shortage in (SHORTAGE, SHORTAGE, None, SHORTAGE, None):
        report.update(shortage)
        clock.now += 2.0
    assert reported(files.as_uri(tmp_path)) == []


def rescheduling(error: Exception) -> ReschedulingState:
    return ReschedulingState(training_failed_error=ray.train.ControllerError(error))


def test_no_number_of_start_timeouts_ends_a_run_but_workers_that_die_at_every_start_do():
    failures = StartFailures(TrainingSettings().max_start_failures)
    previous = InitializingState()
    for _ in range(100_000):
        failures.after_controller_state_update(previous, rescheduling(WorkerGroupStartupTimeoutError(2)))
    died = rescheduling(WorkerGroupStartupFailedError("the worker died: no libcuda.so.1"))
    for _ in range(30):
        failures.after_controller_state_update(previous, died)
    failures.after_controller_state_update(previous, RunningState())
    for _ in range(30):
        failures.after_controller_state_update(previous, died)
    with pytest.raises(Unavailable, match=r"workers died 31 times while they started: .*no libcuda\.so\.1"):
        failures.after_controller_state_update(previous, died)


def test_a_request_to_stop_a_run_without_workers_ends_it_at_once_and_one_with_workers_waits_for_them(
    tmp_path: Path,
):
    spec = SimpleNamespace(
        prefix=files.as_uri(tmp_path / "a1"),
        run=files.as_uri(tmp_path / "run"),
        training=SimpleNamespace(steps=10),
    )
    requests = StopRequests(spec)
    requests.check(has_workers=False)
    files.write_json(layout.stop_uri(spec.prefix), StopRequest(why="pause").model_dump())
    requests.check(has_workers=True)
    began = time.monotonic()
    with pytest.raises(Stopped) as stopped:
        requests.check(has_workers=False)
    assert (stopped.value.why, stopped.value.step) == ("pause", 0)
    assert time.monotonic() - began < 10
