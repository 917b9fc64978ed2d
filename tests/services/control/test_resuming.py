"""Resuming failed jobs: at their stage, from what is stored, never beside the run that they left."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import update

from services.control.tables import Job
from services.storage import files
from tests.services.control import fakes
from tests.services.control.conftest import write_base

JOBS = "/v1/alignment/jobs"
LEDGER = {"steps": 2, "batch_size": 4, "reference": "ledger"}


def resume(plane, job: str, status: int = 200) -> dict:
    return plane.post(f"{JOBS}/{job}/resume", None, status)


def refusal(plane, job: str) -> tuple[str, str]:
    error = resume(plane, job, 409)["error"]
    assert error["param"] == "id"
    return error["message"], error["code"]


def status(plane, job: str) -> str:
    return plane.get(f"{JOBS}/{job}")["status"]


def failed_at(plane, stage: str, play=fakes.fails, **overrides) -> str:
    """The id of a job that has failed at this stage; the next attempt at it would succeed."""
    plane.launcher.plays[stage] = play
    job = plane.job(training=LEDGER, **overrides)["id"]
    plane.settle(40)
    ended = plane.get(f"{JOBS}/{job}")
    assert (ended["status"], ended["stage"]) == ("failed", stage)
    plane.launcher.plays[stage] = getattr(fakes, stage)
    return job


def left_by_ray(plane) -> str:
    """The id of a job that has failed because Ray was away, and whose training still runs."""
    plane.launcher.plays["train"] = fakes.runs
    job = plane.job()["id"]
    plane.settle()
    plane.launcher.down = True
    plane.settle(3)
    plane.clock.now += plane.settings.unreachable_s
    plane.settle(3)
    assert plane.get(f"{JOBS}/{job}")["reason"]["code"] == "cluster_unreachable"
    assert plane.launcher.states[f"{job}-train-a1"] == "running"
    plane.launcher.plays["train"] = fakes.train
    return job


def test_a_failed_training_resumes_in_the_same_run_and_its_job_succeeds(any_plane):
    plane = any_plane
    job = failed_at(plane, "train")
    num_events = len(plane.events(job))
    answer = resume(plane, job)
    shown = ("status", "stage", "reason", "finished_at", "pause_requested_at")
    assert [answer[name] for name in shown] == ["queued", "train", None, None, None]
    plane.settle(40)
    ended = plane.get(f"{JOBS}/{job}")
    assert (ended["status"], ended["reason"]) == ("succeeded", None)
    runs = ("encode-a1", "ledger-a1", "train-a1", "train-a2", "evaluate-a1")
    assert plane.launcher.submitted == [f"{job}-{run}" for run in runs]
    one, two = (plane.launcher.specs[f"{job}-train-a{number}"] for number in (1, 2))
    assert (one.run, one.output, one.dataset, one.ledger) == (two.run, two.output, two.dataset, two.ledger)
    assert plane.events(job)[num_events : num_events + 3] == [
        "failed -> queued: resumed on request",
        "queued -> running: stage train resumes as attempt 2",
        f"submitted {job}-train-a2",
    ]


@pytest.mark.parametrize("stage", ["encode", "ledger", "evaluate"])
def test_a_job_resumes_at_the_stage_that_failed_and_repeats_no_other(plane, stage):
    job = failed_at(plane, stage)
    resume(plane, job)
    plane.settle(40)
    assert status(plane, job) == "succeeded"
    runs = [f"{job}-{each}-a1" for each in ("encode", "ledger", "train", "evaluate")]
    runs.insert(runs.index(f"{job}-{stage}-a1") + 1, f"{job}-{stage}-a2")
    assert plane.launcher.submitted == runs


def test_a_resumed_job_may_be_started_again_as_often_as_a_new_one(plane):
    plane.settings.max_attempts = 2
    plane.launcher.plays["train"] = fakes.lacks
    job = plane.job()["id"]
    for number in (2, 4, 6):
        plane.settle(60)
        assert (status(plane, job), plane.launcher.submitted[-1]) == ("failed", f"{job}-train-a{number}")
        resume(plane, job)


def test_a_job_that_has_failed_is_resumed_once_and_pausing_it_names_its_status(plane):
    job = failed_at(plane, "train")
    paused = plane.error(f"{JOBS}/{job}/pause", None, 409)
    assert (paused["message"], paused["code"]) == (f"job {job} has ended already: it is failed", "job_failed")
    resume(plane, job)
    assert refusal(plane, job) == (f"job {job} is neither paused nor failed: it is queued", "job_queued")


def test_a_job_that_failed_before_its_first_stage_is_refused(plane):
    dataset = plane.dataset
    job = plane.job()["id"]
    files.delete_folder(dataset["uri"])
    plane.settle()
    assert refusal(plane, job) == (
        f"job {job} failed before its first stage: it has nothing to resume; create a new job",
        "job_failed",
    )


def test_an_evaluation_that_failed_is_not_among_the_jobs_that_are_resumed(plane):
    plane.launcher.plays["evaluate"] = fakes.fails
    body = plane.evaluation_body()
    evaluation = plane.post("/v1/evaluations", body)["id"]
    plane.settle()
    assert resume(plane, evaluation, 404)["error"]["message"] == f'job "{evaluation}" does not exist'


def test_the_run_that_a_failed_job_has_left_is_over_before_its_next_attempt_starts(any_plane):
    plane = any_plane
    job = left_by_ray(plane)
    first = f"{job}-train-a1"
    fakes.journal(plane.launcher.specs[first], 4)
    plane.launcher.down = False
    plane.launcher.deaf.add(first)
    resume(plane, job)
    plane.settle(8)
    assert first in plane.launcher.stopped
    assert (status(plane, job), plane.launcher.submitted[-1]) == ("queued", first), (
        "Ray says that it still runs"
    )
    plane.launcher.states[first] = "stopped"
    plane.settle(40)
    assert (status(plane, job), plane.launcher.submitted.count(f"{job}-train-a2")) == ("succeeded", 1)
    assert "step 4" in plane.events(job), "what it wrote after its job had failed is recorded too"


def test_a_job_that_is_resumed_while_ray_is_still_away_starts_nothing_and_can_be_resumed_later(plane):
    job = left_by_ray(plane)
    resume(plane, job)
    plane.settle(3)
    assert (status(plane, job), plane.launcher.submitted[-1]) == ("queued", f"{job}-train-a1")
    plane.clock.now += plane.settings.unreachable_s
    plane.settle(3)
    assert plane.get(f"{JOBS}/{job}")["reason"]["code"] == "cluster_unreachable"
    plane.launcher.down = False
    resume(plane, job)
    plane.settle(40)
    assert status(plane, job) == "succeeded"
    assert plane.launcher.stopped[0] == f"{job}-train-a1"
    assert plane.launcher.submitted[2] == f"{job}-train-a2"


def test_a_run_whose_submission_went_unanswered_is_ended_too(plane):
    submit = plane.launcher.submit

    def unanswered(submission: str, *rest) -> None:
        submit(submission, *rest)
        plane.launcher.down = True
        plane.launcher._answer()

    plane.launcher.plays["encode"] = fakes.runs
    plane.launcher.submit = unanswered
    job = plane.job()["id"]
    plane.settle(8)
    plane.clock.now += plane.settings.unreachable_s
    plane.settle(3)
    assert (status(plane, job), plane.launcher.states[f"{job}-encode-a1"]) == ("failed", "running")
    plane.launcher.submit, plane.launcher.down = submit, False
    plane.launcher.plays["encode"] = fakes.encode
    resume(plane, job)
    plane.settle(40)
    assert (status(plane, job), plane.launcher.states[f"{job}-encode-a1"]) == ("succeeded", "stopped")


@pytest.mark.parametrize(("verb", "rests"), [("pause", "paused"), ("cancel", "cancelled")])
def test_a_resumed_job_that_is_paused_or_cancelled_while_it_waits_leaves_no_run_behind(plane, verb, rests):
    job = left_by_ray(plane)
    plane.launcher.down = False
    plane.settings.max_active_jobs = 0
    resume(plane, job)
    plane.settle(5)
    assert (status(plane, job), plane.launcher.states[f"{job}-train-a1"]) == ("queued", "running")
    plane.post(f"{JOBS}/{job}/{verb}", None)
    plane.settle(5)
    assert (status(plane, job), plane.launcher.states[f"{job}-train-a1"]) == (rests, "stopped")
    assert plane.launcher.submitted[-1] == f"{job}-train-a1"


def test_a_resumed_job_takes_its_turn_among_those_that_wait(plane):
    job = failed_at(plane, "train")
    plane.settings.max_active_jobs = 1
    plane.launcher.plays["encode"] = fakes.runs
    other = plane.job()["id"]
    plane.settle()
    resume(plane, job)
    plane.settle()
    assert [status(plane, each) for each in (job, other)] == ["queued", "preparing"]
    plane.post(f"{JOBS}/{other}/cancel", None)
    plane.settle(40)
    assert status(plane, job) == "succeeded"


def test_a_cancellation_that_a_failure_has_overtaken_is_forgotten_with_it(plane):
    job = failed_at(plane, "train")
    with plane.database.write() as session:
        session.execute(update(Job).values(cancel_requested_at=plane.clock.now))
    resume(plane, job)
    plane.settle(40)
    assert status(plane, job) == "succeeded"


def test_the_time_for_which_a_job_had_failed_is_none_of_a_stages_seconds(plane):
    job = failed_at(plane, "train")
    with plane.database.write() as session:  # a day ago
        earlier = {name: getattr(Job, name) - 86_400 for name in ("stage_started_at", "finished_at")}
        session.execute(update(Job).values(**earlier))
    resume(plane, job)
    plane.settle(40)
    assert plane.get(f"{JOBS}/{job}")["stage_seconds"]["train"] < 3_600


def test_a_job_whose_model_was_deleted_since_it_failed_is_refused(plane):
    job = failed_at(plane, "train")
    model = plane.get("/v1/models/shapes")["version"]
    assert plane.http.delete(f"/v1/models/{model}").status_code == 200
    assert refusal(plane, job) == (
        f"job {job} cannot resume: its model {model} was deleted",
        "model_not_found",
    )
    assert status(plane, job) == "failed"


def test_a_job_whose_trained_model_was_deleted_is_not_evaluated(plane):
    job = failed_at(plane, "evaluate")
    model = plane.get(f"{JOBS}/{job}")["aligned_model"]
    assert plane.http.delete(f"/v1/models/{model}").status_code == 200
    assert refusal(plane, job) == (
        f"job {job} cannot resume: its model {model} was deleted",
        "model_not_found",
    )


@pytest.mark.parametrize("stage", ["encode", "train"])
def test_a_dataset_that_was_deleted_since_is_missed_only_while_it_is_encoded(plane, stage):
    job = failed_at(plane, stage)
    dataset = plane.get(f"{JOBS}/{job}")["dataset"]
    assert plane.http.delete(f"/v1/datasets/{dataset}").status_code == 200
    if stage == "encode":
        assert refusal(plane, job) == (
            f"job {job} cannot resume: its dataset {dataset} was deleted",
            "dataset_not_found",
        )
        return
    resume(plane, job)
    plane.settle(40)
    assert status(plane, job) == "succeeded"


def test_a_job_whose_name_a_base_model_got_since_is_refused(plane):
    job = failed_at(plane, "train", name="aligned")
    base = plane.post("/v1/models", {"name": "aligned", "uri": write_base(plane.root / "second")})["version"]
    message = f"job {job} cannot resume: its name 'aligned' belongs to the base model {base}"
    assert refusal(plane, job) == (message, "name_taken")


def test_what_a_resumed_job_needs_is_kept_and_its_name_is_taken_again(plane):
    job = failed_at(plane, "train", name="aligned")
    resume(plane, job)
    model, dataset = plane.get("/v1/models/shapes")["version"], plane.get(f"{JOBS}/{job}")["dataset"]
    for path in (f"/v1/models/{model}", f"/v1/datasets/{dataset}"):
        assert plane.http.delete(path).json()["error"]["code"] == "in_use"
    taken = plane.error("/v1/models", {"name": "aligned", "uri": write_base(plane.root / "second")})
    assert taken["code"] == "name_taken"


def test_a_stream_that_ended_with_a_failure_continues_once_the_job_is_resumed(plane):
    job = failed_at(plane, "train")
    last = plane.get(f"{JOBS}/{job}/events?limit=1000")["data"][-1]["id"]
    path, headers = f"{JOBS}/{job}/events", {"accept": "text/event-stream", "last-event-id": last}
    assert plane.http.get(path, headers=headers).status_code == 204
    resume(plane, job)
    plane.settle(40)
    text = plane.http.get(path, headers=headers).text
    assert text.index("failed -> queued: resumed on request") < text.index(
        "evaluating -> succeeded: the job is done"
    )


def test_of_requests_to_resume_at_once_one_queues_the_job(each_plane):
    plane = each_plane
    job = failed_at(plane, "train")
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: plane.http.post(f"{JOBS}/{job}/resume").status_code, range(4)))
    assert sorted(answers) == [200, 409, 409, 409]
    assert plane.events(job).count("failed -> queued: resumed on request") == 1
    plane.settle(40)
    assert (status(plane, job), plane.launcher.submitted.count(f"{job}-train-a2")) == ("succeeded", 1)


def test_a_result_that_came_after_the_job_had_failed_is_taken_and_nothing_is_done_again(plane):
    job = left_by_ray(plane)
    first = f"{job}-train-a1"
    fakes.train(plane.launcher.specs[first])
    plane.launcher.states[first], plane.launcher.down = "succeeded", False
    resume(plane, job)
    plane.settle(40)
    assert status(plane, job) == "succeeded"
    assert [each for each in plane.launcher.submitted if "train" in each] == [first]
    assert "queued -> running: stage train had already finished" in plane.events(job)


def test_training_that_is_cancelled_while_ray_is_unreachable_is_stopped_through_storage(plane):
    plane.launcher.plays["train"] = fakes.runs
    job = plane.job()["id"]
    plane.settle()
    plane.launcher.down = True
    plane.post(f"{JOBS}/{job}/cancel", None)
    plane.settle(3)
    assert status(plane, job) == "running"
    assert files.exists(f"{plane.launcher.specs[f'{job}-train-a1'].prefix}/stop.json")
