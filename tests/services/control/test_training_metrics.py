"""When the running trainings logged their newest step and stored their newest checkpoint."""

from __future__ import annotations

import time

import pytest

from services.api.records import CHECKPOINT_SECONDS
from services.control.tables import Job, Metric
from tests.services.control import fakes

STEP = "dde_training_last_step_timestamp_seconds"
CHECKPOINT = "dde_training_last_checkpoint_timestamp_seconds"


def measured(plane, name: str) -> dict[str, float]:
    """The values of a metric by its job."""
    lines = [line for line in plane.http.get("/metrics").text.splitlines() if line.startswith(f"{name}{{")]
    return {line.split('"')[1]: float(line.rsplit(" ", 1)[1]) for line in lines}


def training(plane, *steps: tuple[int, float, dict[str, float]]) -> str:
    """A running job whose training logged these steps."""
    plane.launcher.plays["train"] = fakes.runs
    job_id = plane.job()["id"]
    plane.settle()
    with plane.database.write() as session:
        session.query(Metric).filter(Metric.stage == "train").delete()
        for step, at, values in steps:
            session.add(Metric(job=job_id, stage="train", step=step, at=at, values=values))
    return job_id


def test_a_job_that_has_trained_no_step_is_not_measured(any_plane):
    training(any_plane)
    assert (measured(any_plane, STEP), measured(any_plane, CHECKPOINT)) == ({}, {})


def test_without_a_checkpoint_the_first_step_counts(any_plane):
    job = training(any_plane, (1, 100.0, {"loss": 1.0}), (2, 160.0, {"loss": 0.5}))
    assert measured(any_plane, STEP) == {job: 160.0}
    assert measured(any_plane, CHECKPOINT) == {job: 100.0}


def test_the_newest_checkpoint_counts(each_plane):
    stored = {"loss": 1.0, CHECKPOINT_SECONDS: 2.5}
    steps = [(1, 100.0, {"loss": 1.0}), (2, 160.0, stored), (3, 220.0, stored), (4, 280.0, {"loss": 0.5})]
    job = training(each_plane, *steps)
    assert measured(each_plane, STEP) == {job: 280.0}
    assert measured(each_plane, CHECKPOINT) == {job: 220.0}


@pytest.mark.parametrize("status", ["paused", "failed", "evaluating"])
def test_a_job_that_does_not_train_is_not_measured(plane, status: str):
    job_id = training(plane, (1, time.time(), {"loss": 1.0}))
    with plane.database.write() as session:
        session.query(Job).filter(Job.id == job_id).one().status = status
    assert measured(plane, STEP) == {}
