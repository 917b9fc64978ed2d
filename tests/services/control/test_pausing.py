"""Pause, resume and cancel at every point of a job: no work is lost and nothing runs twice."""

from __future__ import annotations

import re
import time

import pytest
from sqlalchemy import select, update

from services.control import attempt
from services.control.job_update import JobUpdate
from services.control.reconciler import StaleToken
from services.control.tables import Job
from services.errors import Unavailable
from services.stages import layout
from services.storage import files
from tests.services.control import fakes

JOBS = "/v1/alignment/jobs"
LEDGER = {"steps": 2, "batch_size": 4, "reference": "ledger"}


def request(plane, verb: str, job: str, status: int = 200) -> dict:
    return plane.post(f"{JOBS}/{job}/{verb}", None, status)


def status(plane, job: str) -> str:
    return plane.get(f"{JOBS}/{job}")["status"]


def training(plane) -> str:
    """The id of a job that trains until it gets a request to stop."""
    plane.launcher.plays["train"] = fakes.runs
    job = plane.job()["id"]
    plane.settle()
    assert status(plane, job) == "running"
    return job


def has_stop_request(plane, submission: str) -> bool:
    return files.exists(f"{plane.launcher.specs[submission].prefix}/stop.json")


def test_training_is_requested_to_store_its_state_and_resumes_in_the_same_run(any_plane):
    plane = any_plane
    job = training(plane)
    first = f"{job}-train-a1"
    answer = request(plane, "pause", job)
    assert (answer["status"], type(answer["pause_requested_at"])) == ("running", int)
    plane.settle(10)
    assert has_stop_request(plane, first)
    assert files.read_json(f"{plane.launcher.specs[first].prefix}/stop.json") == {"why": "pause"}
    assert (status(plane, job), plane.launcher.stopped) == ("running", []), "its step may finish"

    plane.launcher.leave(first, 7)
    plane.settle(10)
    paused = plane.get(f"{JOBS}/{job}")
    assert (paused["status"], paused["stage"], paused["reason"], paused["finished_at"]) == (
        "paused",
        "train",
        None,
        None,
    )
    plane.settle(10)
    assert plane.launcher.submitted[-1] == first, "a paused job stays as it is"

    plane.launcher.plays["train"] = fakes.train
    assert (request(plane, "resume", job)["status"], status(plane, job)) == ("queued", "queued")
    plane.settle()
    ended = plane.get(f"{JOBS}/{job}")
    assert (ended["status"], ended["pause_requested_at"]) == ("succeeded", None)
    one, two = plane.launcher.specs[first], plane.launcher.specs[f"{job}-train-a2"]
    assert (one.run, two.attempt) == (two.run, 2)
    moves = [text for text in plane.events(job) if " -> " in text]
    assert moves[3:6] == [
        "running -> paused: paused on request",
        "paused -> queued: resumed on request",
        "queued -> running: stage train resumes as attempt 2",
    ]


@pytest.mark.parametrize("stage", ["encode", "ledger", "evaluate"])
def test_other_stages_are_stopped_and_start_again_from_what_they_committed(plane, stage):
    plane.launcher.plays[stage] = fakes.runs
    job = plane.job(training=LEDGER)["id"]
    plane.settle(40)
    assert plane.get(f"{JOBS}/{job}")["stage"] == stage
    request(plane, "pause", job)
    plane.settle(10)
    assert (status(plane, job), plane.get(f"{JOBS}/{job}")["stage"]) == ("paused", stage)
    assert f"{job}-{stage}-a1" in plane.launcher.stopped
    plane.launcher.plays[stage] = getattr(fakes, stage)
    request(plane, "resume", job)
    plane.settle(40)
    assert status(plane, job) == "succeeded"
    assert plane.launcher.submitted.count(f"{job}-{stage}-a2") == 1


def test_a_job_that_waits_is_paused_at_once_and_takes_its_turn_later(plane):
    plane.settings.max_active_jobs = 1
    plane.launcher.plays["encode"] = fakes.runs
    first, second, third = (plane.job()["id"] for _ in range(3))
    plane.settle()
    request(plane, "pause", second)
    plane.settle(5)
    assert (status(plane, second), plane.get(f"{JOBS}/{second}")["stage"]) == ("paused", None)
    request(plane, "cancel", first)
    plane.settle()
    assert [status(plane, job) for job in (second, third)] == ["paused", "preparing"], (
        "a paused job holds up nobody"
    )
    request(plane, "resume", second)
    plane.settle()
    assert status(plane, second) == "queued"
    request(plane, "pause", third)
    plane.settle()
    assert [status(plane, job) for job in (second, third)] == ["preparing", "paused"], "and takes no place"


def test_a_job_paused_before_it_is_valid_is_looked_at_first(plane):
    job = plane.job()["id"]
    assert request(plane, "pause", job)["status"] == "validating"
    plane.settle(5)
    assert status(plane, job) == "paused"
    assert plane.launcher.submitted == []
    request(plane, "resume", job)
    plane.settle()
    assert status(plane, job) == "succeeded"


def test_a_stage_that_is_done_meanwhile_counts_and_the_next_one_is_not_started(plane):
    job = training(plane)
    request(plane, "pause", job)
    fakes.train(plane.launcher.specs[f"{job}-train-a1"])
    plane.launcher.states[f"{job}-train-a1"] = "succeeded"
    plane.settle(10)
    paused = plane.get(f"{JOBS}/{job}")
    assert (paused["status"], paused["stage"]) == ("paused", "evaluate")
    assert paused["result"]["train"] is not None
    assert plane.launcher.submitted[-1] == f"{job}-train-a1"
    request(plane, "resume", job)
    plane.settle()
    assert status(plane, job) == "succeeded"


def test_a_failure_while_a_pause_is_awaited_fails_the_job(plane):
    job = training(plane)
    request(plane, "pause", job)
    fakes.fails(plane.launcher.specs[f"{job}-train-a1"])
    plane.settle(5)
    ended = plane.get(f"{JOBS}/{job}")
    assert (ended["status"], ended["reason"]["code"], ended["pause_requested_at"]) == (
        "failed",
        "ConfigError",
        None,
    )


def test_training_whose_driver_dies_while_it_stops_is_paused_after_the_grace(plane):
    job = training(plane)
    request(plane, "pause", job)
    plane.settle(5)
    plane.launcher.states[f"{job}-train-a1"] = "failed"
    plane.settle(5)
    assert status(plane, job) == "running"
    plane.clock.now += plane.settings.driver_grace_s
    plane.settle(5)
    assert status(plane, job) == "paused"


def test_training_that_has_not_begun_is_not_waited_for(plane):
    job = training(plane)
    plane.launcher.states[f"{job}-train-a1"] = "pending"
    request(plane, "pause", job)
    plane.settle(5)
    assert status(plane, job) == "paused"
    assert f"{job}-train-a1" in plane.launcher.stopped


def test_a_pause_with_ray_out_of_reach_pauses_after_a_while_with_a_warning(plane):
    job = training(plane)
    plane.launcher.down = True
    request(plane, "pause", job)
    plane.settle(8)
    assert status(plane, job) == "running"
    assert has_stop_request(plane, f"{job}-train-a1"), "training itself may read it"
    plane.clock.now += plane.settings.unreachable_s
    plane.settle(5)
    assert status(plane, job) == "paused"
    assert "Ray did not confirm that the run ended; it may still be running" in plane.events(job)


@pytest.mark.parametrize("deaf", [False, True])
def test_training_that_hangs_is_ended_after_a_while_and_its_end_is_waited_for(plane, deaf):
    job = training(plane)
    request(plane, "pause", job)
    plane.settle(5)
    if deaf:
        plane.launcher.deaf.add(f"{job}-train-a1")
    plane.clock.now += plane.settings.pause_ack_s
    plane.settle(8)
    assert f"{job}-train-a1" in plane.launcher.stopped
    assert status(plane, job) == ("running" if deaf else "paused")
    plane.clock.now += plane.settings.unreachable_s
    plane.settle(8)
    assert status(plane, job) == "paused"
    events = plane.get(f"{JOBS}/{job}/events?limit=1000")["data"]
    ended = (
        r"stage train did not stop within 30\d s of the request and is being killed; "
        r"what it stored last is kept"
    )
    unconfirmed = "Ray did not confirm that the run ended; it may still be running"
    warnings = [event["message"] for event in events if event["level"] == "warning"]
    assert re.fullmatch(ended, warnings[0])
    assert warnings[1:] == [unconfirmed] * deaf
    plane.launcher.plays["train"] = fakes.train
    request(plane, "resume", job)
    plane.settle()
    assert status(plane, job) == "succeeded"


def test_training_that_acknowledged_a_stop_gets_the_time_of_its_step_and_its_checkpoint(plane):
    job = training(plane)
    request(plane, "pause", job)
    plane.settle(5)
    files.write_json(layout.stop_ack_uri(plane.launcher.specs[f"{job}-train-a1"].prefix), {})
    plane.clock.now += 2 * plane.settings.pause_ack_s
    plane.settle(8)
    assert (status(plane, job), plane.launcher.stopped) == ("running", [])
    plane.clock.now += plane.settings.stopping_s
    plane.settle(8)
    assert (status(plane, job), plane.launcher.stopped) == ("paused", [f"{job}-train-a1"])


def test_a_cancel_frees_the_workers_while_the_journal_cannot_be_read(plane, monkeypatch):
    job = training(plane)

    def away(*_):
        raise Unavailable("storage is away")

    with monkeypatch.context() as outage:
        outage.setattr(attempt, "read_journal", away)
        request(plane, "cancel", job)
        plane.settle(5)
        assert (status(plane, job), plane.launcher.states[f"{job}-train-a1"]) == ("running", "stopped")
    plane.clock.now += 60
    plane.settle(8)
    assert status(plane, job) == "cancelled"


def test_training_that_received_no_stop_gets_its_time_after_an_outage_of_the_control_plane(plane):
    job = training(plane)
    request(plane, "pause", job)
    plane.clock.now += 2 * plane.settings.unreachable_s
    plane.settle(8)
    assert has_stop_request(plane, f"{job}-train-a1")
    assert (status(plane, job), plane.launcher.stopped) == ("running", [])
    plane.launcher.leave(f"{job}-train-a1", 7)
    plane.settle(8)
    assert status(plane, job) == "paused"


def test_a_crash_between_submit_and_its_record_leaves_no_run_behind_a_pause(plane):
    plane.launcher.plays["encode"] = fakes.runs
    job = plane.job()["id"]
    plane.settle(6)
    with plane.database.write() as session:
        session.execute(update(Job).values(submitted_at=None, lock_token=None, lock_expires_at=None))
    request(plane, "pause", job)
    plane.settle(6)
    assert (status(plane, job), plane.launcher.states[f"{job}-encode-a1"]) == ("paused", "stopped")


def test_pausing_twice_gives_the_same_answer_and_requests_once(plane):
    job = training(plane)
    assert request(plane, "pause", job) == request(plane, "pause", job)
    plane.launcher.leave(f"{job}-train-a1", 3)
    plane.settle(5)
    paused = plane.get(f"{JOBS}/{job}")
    assert paused == request(plane, "pause", job)
    assert plane.events(job).count("pause requested") == 1


def test_a_pause_may_be_withdrawn_before_training_has_stopped(any_plane):
    plane = any_plane
    plane.settings.max_attempts = 1
    job = training(plane)
    request(plane, "pause", job)
    plane.settle(5)
    answer = request(plane, "resume", job)
    assert (answer["status"], answer["pause_requested_at"]) == ("running", None)
    plane.launcher.plays["train"] = fakes.train
    plane.launcher.leave(f"{job}-train-a1", 3)
    plane.settle(40)
    assert status(plane, job) == "succeeded"
    assert "pause withdrawn" in plane.events(job)
    assert plane.launcher.submitted.count(f"{job}-train-a2") == 1


def test_a_stage_whose_pause_was_withdrawn_too_late_starts_again_at_no_cost(plane):
    plane.settings.max_attempts = 1
    plane.launcher.plays["encode"] = fakes.runs
    job = plane.job()["id"]
    plane.settle()
    plane.launcher.deaf.add(f"{job}-encode-a1")
    request(plane, "pause", job)
    plane.settle(4)
    request(plane, "resume", job)
    plane.launcher.plays["encode"] = fakes.encode
    plane.launcher.states[f"{job}-encode-a1"] = fakes.fail(
        plane.launcher.specs[f"{job}-encode-a1"], "the stage was stopped", "stopped"
    )
    plane.settle(40)
    assert (status(plane, job), f"{job}-encode-a2" in plane.launcher.submitted) == ("succeeded", True)


@pytest.mark.parametrize("acknowledged", [False, True])
def test_pauses_that_are_withdrawn_give_no_attempts_away(plane, acknowledged):
    plane.settings.max_attempts = 1
    job = training(plane)
    for number in (1, 2, 3):
        request(plane, "pause", job)
        if acknowledged:
            plane.settle(4)
            plane.launcher.leave(f"{job}-train-a{number}", number)
        request(plane, "resume", job)
        plane.settle(8)
    last = f"{job}-train-a{4 if acknowledged else 1}"
    assert plane.launcher.submitted[-1] == last
    plane.launcher.states[last] = fakes.lacks(plane.launcher.specs[last])
    plane.settle(20)
    assert (status(plane, job), plane.launcher.submitted[-1]) == ("failed", last)


def test_a_job_may_be_paused_and_resumed_more_often_than_it_may_fail(plane):
    plane.settings.max_attempts = 1
    job = training(plane)
    for number in (1, 2, 3):
        request(plane, "pause", job)
        plane.launcher.leave(f"{job}-train-a{number}", number)
        plane.settle(6)
        request(plane, "resume", job)
        plane.settle(6)
    assert (status(plane, job), plane.launcher.submitted[-1]) == ("running", f"{job}-train-a4")


def test_the_time_of_a_pause_is_none_of_a_stages_seconds(plane):
    job = training(plane)
    request(plane, "pause", job)
    plane.launcher.leave(f"{job}-train-a1", 3)
    plane.settle(6)
    with plane.database.write() as session:  # a day ago
        earlier = {name: getattr(Job, name) - 86_400 for name in ("stage_started_at", "pause_requested_at")}
        session.execute(update(Job).values(**earlier))
    plane.launcher.plays["train"] = fakes.train
    request(plane, "resume", job)
    plane.settle()
    assert plane.get(f"{JOBS}/{job}")["stage_seconds"]["train"] < 3_600


@pytest.mark.parametrize("at_rest", [True, False])
def test_a_paused_job_and_one_that_is_being_paused_are_cancelled(plane, at_rest):
    job = training(plane)
    request(plane, "pause", job)
    if at_rest:
        plane.launcher.leave(f"{job}-train-a1", 3)
    plane.settle(5)
    assert status(plane, job) == ("paused" if at_rest else "running")
    request(plane, "cancel", job)
    assert request(plane, "pause", job, 409)["error"]["code"] == "job_cancelled"
    request(plane, "resume", job, 409)
    plane.settle(5)
    ended = plane.get(f"{JOBS}/{job}")
    assert (ended["status"], ended["pause_requested_at"]) == ("cancelled", None)
    assert plane.launcher.states[f"{job}-train-a1"] == ("succeeded" if at_rest else "stopped")


@pytest.mark.parametrize("ended", ["succeeded", "cancelled"])
def test_what_has_ended_is_neither_paused_nor_resumed(plane, ended):
    job = plane.job()["id"] if ended == "succeeded" else training(plane)
    if ended == "cancelled":
        request(plane, "cancel", job)
    plane.settle()
    paused, resumed = (request(plane, verb, job, 409)["error"] for verb in ("pause", "resume"))
    assert paused["message"] == f"job {job} has ended already: it is {ended}"
    assert resumed["message"] == f"job {job} is neither paused nor failed: it is {ended}"
    assert (paused["param"], paused["code"], resumed["code"]) == ("id", f"job_{ended}", f"job_{ended}")


def test_a_job_that_runs_is_not_resumed_and_what_is_no_job_is_named(plane):
    job = training(plane)
    assert request(plane, "resume", job, 409)["error"]["code"] == "job_running"
    unknown = "ajob_" + "0" * 24
    for verb in ("pause", "resume"):
        assert request(plane, verb, unknown, 404)["error"]["message"] == f'job "{unknown}" does not exist'


def test_a_model_that_a_paused_job_needs_is_kept(plane):
    job = training(plane)
    request(plane, "pause", job)
    plane.launcher.leave(f"{job}-train-a1", 3)
    plane.settle(5)
    model = plane.get("/v1/models/shapes")["version"]
    answer = plane.http.delete(f"/v1/models/{model}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "in_use")


def test_what_is_found_under_a_stale_token_neither_pauses_nor_undoes_a_resume(each_plane):
    plane = each_plane
    job = training(plane)
    request(plane, "pause", job)
    plane.clock.now = max(plane.clock.now, time.time()) + 1
    slow = plane.reconciler()
    taken = slow.take()
    assert taken.id == job
    request(plane, "resume", job)
    with pytest.raises(StaleToken):
        slow.apply(JobUpdate(taken, plane.clock.now, values={"status": "paused", "submitted_at": None}))
    with plane.database.read() as session:
        row = session.scalar(select(Job).where(Job.id == job))
    assert (row.status, row.pause_requested_at, row.submitted_at is None) == ("running", None, False)
    assert plane.reconciler().take().id == job, "nobody waits for the lock to expire"
