"""Restarts after transient failures: limited in number, and never beside the old run."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
from sqlalchemy import select

from services.artifacts import checkpoints
from services.control.job_update import JobUpdate
from services.control.reconciler import StaleToken
from services.control.tables import Job
from services.storage import files
from tests.services.control import fakes

JOBS = "/v1/alignment/jobs"


def at_most_twice(plane):
    plane.settings.max_attempts = 2


def row_of(plane, job_id: str) -> Job:
    with plane.database.read() as session:
        return session.scalar(select(Job).where(Job.id == job_id))


def after_the_grace(plane, looks: int = 6) -> None:
    """Let a driver that is gone be noticed, and what follows be done."""
    plane.settle(8)
    plane.clock.now += plane.settings.driver_grace_s
    plane.settle(looks)


def test_a_driver_that_dies_without_a_marker_is_started_again_and_the_job_succeeds(any_plane):
    plane = any_plane
    plane.launcher.plays["encode"] = fakes.dies
    job = plane.job()["id"]
    plane.settle(8)
    assert row_of(plane, job).attempt == 1, "the grace is not over"
    plane.launcher.plays["encode"] = fakes.encode
    plane.clock.now += plane.settings.driver_grace_s
    plane.settle(40)
    ended = plane.get(f"{JOBS}/{job}")
    assert (ended["status"], ended["reason"]) == ("succeeded", None)
    assert plane.launcher.submitted == [
        f"{job}-{run}" for run in ("encode-a1", "encode-a2", "train-a1", "evaluate-a1")
    ]
    assert f"{job}-encode-a1" in plane.launcher.stopped, "Ray may call a driver failed that lives"
    events = plane.get(f"{JOBS}/{job}/events?limit=1000")["data"]
    warned = [event["message"] for event in events if event["level"] == "warning"]
    why = "the driver of stage encode ended without a result; Ray says failed"
    assert warned == [f"last words of {job}-encode-a1", f"stage encode restarts as attempt 2: {why}"]


def test_after_the_last_attempt_the_job_fails_with_the_reason_of_the_last(plane):
    at_most_twice(plane)
    plane.launcher.plays["encode"] = fakes.dies
    job = plane.job()["id"]
    after_the_grace(plane)
    assert plane.get(f"{JOBS}/{job}")["status"] == "preparing"
    after_the_grace(plane)
    ended = plane.get(f"{JOBS}/{job}")
    assert (ended["status"], ended["reason"]["code"], ended["stage"]) == ("failed", "driver_died", "encode")
    assert ended["reason"]["message"] == "the driver of stage encode ended without a result; Ray says failed"
    assert f"last words of {job}-encode-a2" in plane.events(job)
    assert plane.launcher.submitted == [f"{job}-encode-a1", f"{job}-encode-a2"]


def test_a_submission_that_ray_forgot_is_started_again(plane):
    plane.launcher.plays["encode"] = fakes.runs
    job = plane.job()["id"]
    plane.settle(5)
    plane.launcher.states.clear()
    plane.launcher.plays["encode"] = fakes.encode
    after_the_grace(plane, looks=40)
    assert plane.get(f"{JOBS}/{job}")["status"] == "succeeded"
    assert any("Ray says unknown" in text for text in plane.events(job))


def test_something_out_of_reach_is_waited_for_with_growing_pauses(plane):
    plane.launcher.plays["encode"] = fakes.lacks
    job = plane.job()["id"]
    starts = []
    for _ in range(400):
        if len(plane.launcher.submitted) > len(starts):
            starts.append(plane.clock.now)
        plane.settle(1)
    assert plane.launcher.submitted == [f"{job}-encode-a{number}" for number in range(1, 6)]
    pauses = [later - earlier for earlier, later in pairwise(starts)]
    assert all(longer > shorter for shorter, longer in pairwise(pauses))
    reason = plane.get(f"{JOBS}/{job}")["reason"]
    assert reason == {"code": "unavailable", "message": "the object store does not answer", "param": None}


def test_a_failure_that_would_come_again_is_not_tried_again(plane):
    plane.launcher.plays["train"] = fakes.fails
    job = plane.job()["id"]
    plane.settle()
    assert plane.get(f"{JOBS}/{job}")["status"] == "failed"
    assert f"{job}-train-a2" not in plane.launcher.submitted


@pytest.mark.parametrize("ends", ["stopped", "failed"])
def test_training_that_others_stopped_resumes_in_the_same_run(plane, ends):
    plane.launcher.plays["train"] = fakes.runs
    job = plane.job()["id"]
    plane.settle()
    first = f"{job}-train-a1"
    if ends == "stopped":
        plane.launcher.leave(first, 7, "signal")
    else:
        fakes.fail(plane.launcher.specs[first], "the stage was stopped", "stopped")
        plane.launcher.states[first] = "failed"
    plane.launcher.plays["train"] = fakes.train
    plane.settle(40)
    assert plane.get(f"{JOBS}/{job}")["status"] == "succeeded"
    one, two = (plane.launcher.specs[f"{job}-train-a{number}"] for number in (1, 2))
    assert (one.run, one.output, one.attempt + 1) == (two.run, two.output, two.attempt)
    assert one.prefix != two.prefix
    if ends == "stopped":
        message = "stage train restarts as attempt 2: the stage was stopped after step 7 (signal)"
        assert message in plane.events(job)


def fails_at(plane, job: str, number: int, step: int | None) -> None:
    """Let an attempt to train fail for a reason that may pass, after a checkpoint (or none)."""
    spec = plane.launcher.specs[f"{job}-train-a{number}"]
    if step is not None:
        fakes.checkpoint(spec.run, step)
    plane.launcher.states[f"{job}-train-a{number}"] = fakes.lacks(spec)
    plane.settle(20)


def test_training_that_comes_further_each_time_is_started_again_as_often_as_it_takes(any_plane):
    plane = any_plane
    at_most_twice(plane)
    plane.launcher.plays["train"] = fakes.runs
    job = plane.job()["id"]
    plane.settle()
    for number in range(1, 6):
        fails_at(plane, job, number, 10 * number)
        row = row_of(plane, job)
        assert (row.status, row.attempt, row.restarts, row.restart_step) == (
            "running",
            number + 1,
            1,
            10 * number,
        )
    fails_at(plane, job, 6, None)
    ended = plane.get(f"{JOBS}/{job}")
    assert (ended["status"], ended["reason"]["code"]) == ("failed", "unavailable")


def test_steps_that_were_done_before_are_no_progress(plane):
    at_most_twice(plane)
    plane.launcher.plays["train"] = fakes.runs
    job = plane.job()["id"]
    plane.settle()
    fails_at(plane, job, 1, 20)
    checkpoints.invalidate(plane.launcher.specs[f"{job}-train-a1"].run, 20)
    fails_at(plane, job, 2, 10)
    assert plane.get(f"{JOBS}/{job}")["status"] == "failed"


def test_a_machine_that_drains_properly_uses_up_no_attempt(plane):
    plane.settings.max_attempts = 1
    plane.launcher.plays["train"] = fakes.runs
    job = plane.job()["id"]
    plane.settle()
    for number in (1, 2, 3):
        plane.launcher.leave(f"{job}-train-a{number}", 7, "signal")
        plane.settle(8)
    row = row_of(plane, job)
    assert (row.status, row.attempt, row.restarts) == ("running", 4, 0)


def test_the_old_run_is_over_before_the_new_one_starts(plane):
    plane.launcher.plays["train"] = fakes.runs
    job = plane.job()["id"]
    plane.settle()
    first = f"{job}-train-a1"
    plane.launcher.deaf.add(first)
    fakes.fail(plane.launcher.specs[first], "a bucket is gone for a moment", "unavailable")
    plane.settle(10)
    assert first in plane.launcher.stopped
    assert f"{job}-train-a2" not in plane.launcher.submitted, "Ray still reports that the first one runs"
    plane.launcher.states[first] = "stopped"
    plane.settle(10)
    assert plane.launcher.submitted[-1] == f"{job}-train-a2"
    assert plane.launcher.submitted.count(f"{job}-train-a2") == 1


def test_a_run_whose_end_ray_never_confirms_is_not_waited_for_forever(plane):
    plane.launcher.plays["train"] = fakes.runs
    job = plane.job()["id"]
    plane.settle()
    plane.launcher.deaf.add(f"{job}-train-a1")
    fakes.fail(plane.launcher.specs[f"{job}-train-a1"], "gone for a moment", "unavailable")
    plane.settle(5)
    plane.clock.now += plane.settings.unreachable_s
    plane.settle(8)
    assert plane.launcher.submitted[-1] == f"{job}-train-a2"
    assert "Ray did not confirm that the run ended; it may still be running" in plane.events(job)


def test_every_stage_counts_its_own_attempts(plane):
    at_most_twice(plane)
    plays = {
        "encode": [fakes.lacks, fakes.encode],
        "train": [fakes.lacks, fakes.train],
        "evaluate": [fakes.lacks, fakes.evaluate],
    }
    for stage, scenes in plays.items():
        plane.launcher.plays[stage] = lambda spec, scenes=scenes: scenes.pop(0)(spec)
    job = plane.job()["id"]
    plane.settle(80)
    assert plane.get(f"{JOBS}/{job}")["status"] == "succeeded"
    assert plane.launcher.submitted == [f"{job}-{stage}-a{number}" for stage in plays for number in (1, 2)]


def test_the_journal_of_every_attempt_is_read(plane):
    def lacks(spec):
        fakes.journal(spec, 3)
        return fakes.lacks(spec)

    scenes = [lacks, fakes.train]
    plane.launcher.plays["train"] = lambda spec: scenes.pop(0)(spec)
    job = plane.job()["id"]
    plane.settle(60)
    steps = [text for text in plane.events(job) if text.startswith("step")]
    assert steps[3:-1] == [f"step {number}" for number in (1, 2, 3, 1, 2, 3, 4, 5)], (
        "those of training, between the others"
    )
    rows = plane.get(f"{JOBS}/{job}/metrics?stage=train")["data"]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]


def test_a_new_attempt_that_is_found_under_a_stale_token_is_not_started(each_plane):
    plane = each_plane
    plane.launcher.plays["encode"] = fakes.runs
    job = plane.job()["id"]
    plane.settle(8)
    slow, fast = plane.reconciler(), plane.reconciler()
    plane.clock.now = max(plane.clock.now, time.time()) + 1
    taken = slow.take()
    plane.clock.now += plane.settings.lock_s + 1
    assert fast.take().id == job
    with pytest.raises(StaleToken):
        slow.apply(
            JobUpdate(taken, plane.clock.now, values={"attempt": 2, "restarts": 1, "submitted_at": None})
        )
    assert (row_of(plane, job).attempt, row_of(plane, job).restarts) == (1, 0)


def test_a_cancelled_job_is_not_started_again(plane):
    plane.launcher.plays["train"] = fakes.runs
    job = plane.job()["id"]
    plane.settle()
    plane.post(f"{JOBS}/{job}/cancel", None)
    plane.settle()
    assert files.exists(f"{plane.launcher.specs[f'{job}-train-a1'].prefix}/failed.json")
    assert plane.get(f"{JOBS}/{job}")["status"] == "cancelled"
    assert f"{job}-train-a2" not in plane.launcher.submitted
