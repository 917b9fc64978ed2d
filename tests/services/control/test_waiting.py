"""Jobs that wait: in a fair order, with their place and reason shown, and never failing before their time."""

from __future__ import annotations

import random
import sqlite3
import time
from collections import defaultdict

import pytest
from sqlalchemy import insert, select, update

from services.control import queueing
from services.control.database import Database
from services.control.job_update import new_job
from services.control.launchers.contract import RunStatus
from services.control.tables import Job, new_id
from services.settings import Settings
from services.stages.journal import Journal
from tests.services.control import fakes
from tests.services.control.conftest import Plane

JOBS = "/v1/alignment/jobs"
POLL_S = 60.0
TWO_HOURS_S = 7200.0


def limit(plane: Plane, **limits) -> None:
    """Set limits for the reconciler and for the API."""
    for settings in (plane.settings, plane.app_settings):
        for name, value in limits.items():
            setattr(settings, name, value)


def review_all(plane: Plane) -> None:
    """Review what is due, until a minute of polls has passed."""
    reconciler = plane.reconciler()
    ends_at = plane.clock.now + POLL_S
    while plane.clock.now < ends_at:
        if not reconciler.once():
            plane.clock.now += POLL_S / 2


def waiting(plane: Plane, job: str) -> dict | None:
    return plane.get(f"{JOBS}/{job}")["waiting"]


def row(plane: Plane, job: str) -> Job:
    with plane.database.read() as session:
        return session.scalars(select(Job).where(Job.id == job)).one()


def pending(plane: Plane, message: str) -> None:
    """Runs are pending, and the launcher says why."""

    def status(run_id: str) -> RunStatus:
        state = plane.launcher.states.get(run_id, "unknown")
        return RunStatus(state, "Suspended", message) if state == "pending" else RunStatus(state)

    plane.launcher.status = status


# ---- two hours of simulated time


def test_a_second_job_waits_two_hours_behind_a_first_and_then_runs(any_plane):
    plane = any_plane
    limit(plane, max_active_jobs=1)
    plane.launcher.plays["encode"] = fakes.runs
    first, second, third = (plane.job()["id"] for _ in range(3))
    plane.settle()
    since = waiting(plane, second)["since"]
    began = plane.clock.now
    polls = 0
    while plane.clock.now < began + TWO_HOURS_S:
        review_all(plane)
        polls += 1
        assert plane.get(f"{JOBS}/{first}")["waiting"] is None
        for place, job in enumerate((second, third), 1):
            shown = plane.get(f"{JOBS}/{job}")
            assert (shown["status"], shown["waiting"]["position"]) == ("queued", place)
            assert shown["waiting"]["reason"] == "slots"
            assert shown["waiting"]["message"] == "1 of 1 jobs are active"
        assert waiting(plane, second)["since"] == since
    assert polls >= 120
    assert plane.launcher.submitted == [f"{first}-encode-a1"], "nothing else ran meanwhile"

    plane.launcher.plays["encode"] = fakes.encode
    run = f"{first}-encode-a1"
    plane.launcher.states[run] = fakes.encode(plane.launcher.specs[run])
    plane.settle(120)
    for job in (first, second, third):
        shown = plane.get(f"{JOBS}/{job}")
        assert (shown["status"], shown["waiting"]) == ("succeeded", None)
        assert (row(plane, job).attempt, row(plane, job).restarts) == (1, 0)
    assert row(plane, second).waited_s == pytest.approx(TWO_HOURS_S, abs=120)
    waits = [text for text in plane.events(second) if text.startswith("wait")]
    assert len(waits) == 2, waits
    assert waits[0] == "waiting (slots): 1 of 1 jobs are active"
    assert sum(plane.get(f"{JOBS}/{second}")["stage_seconds"].values()) < 120


def test_a_training_that_is_pending_for_two_hours_is_no_failure_and_not_training_time(plane):
    plane.launcher.plays["train"] = lambda spec: "pending"
    pending(plane, "quota for 2 GPUs, 8 of 8 are in use")
    job = plane.job()["id"]
    plane.settle()
    began = plane.clock.now
    while plane.clock.now < began + TWO_HOURS_S:
        review_all(plane)
        shown = plane.get(f"{JOBS}/{job}")
        assert shown["status"] == "running"
        assert shown["waiting"]["position"] is None
        assert shown["waiting"]["reason"] == "cluster_room"
        assert shown["waiting"]["message"] == "Suspended: quota for 2 GPUs, 8 of 8 are in use"
    run = f"{job}-train-a1"
    plane.launcher.states[run] = fakes.train(plane.launcher.specs[run])
    plane.settle(60)
    shown = plane.get(f"{JOBS}/{job}")
    assert (shown["status"], shown["waiting"]) == ("succeeded", None)
    assert shown["stage_seconds"]["train"] < 120
    assert (row(plane, job).attempt, row(plane, job).restarts) == (1, 0)
    told = [text for text in plane.events(job) if text.startswith("waiting")]
    assert told == ["waiting (cluster_room): Suspended: quota for 2 GPUs, 8 of 8 are in use"]


def test_what_a_driver_reports_of_missing_room_is_shown_until_it_reports_room(plane):
    plane.launcher.plays["train"] = fakes.runs
    job = plane.job()["id"]
    plane.settle()
    assert waiting(plane, job) is None
    journal = Journal(plane.launcher.specs[f"{job}-train-a1"].prefix, flush_every_s=0.0)
    for free in (0, 0, 1):
        message = f"workers = 2 need 2 GPU; the cluster has {free} free of 8"
        journal.waiting(message)
        plane.settle(6)
        assert waiting(plane, job)["message"] == message
    plane.clock.now += TWO_HOURS_S
    plane.settle(6)
    assert waiting(plane, job)["reason"] == "cluster_room"
    journal.waiting("")
    plane.settle(6)
    assert waiting(plane, job) is None
    assert row(plane, job).waited_s == pytest.approx(TWO_HOURS_S, abs=120)
    told = [text for text in plane.events(job) if text.startswith("wait")]
    assert told[0] == "waiting (cluster_room): workers = 2 need 2 GPU; the cluster has 0 free of 8"
    assert [text.split()[0] for text in told] == ["waiting", "waited"], "once, however often it is reported"


def test_a_job_says_that_ray_does_not_answer_and_for_how_long_that_may_last(plane):
    assert Settings.model_fields["unreachable_s"].default == 3600.0
    plane.launcher.plays["train"] = fakes.runs
    job = plane.job()["id"]
    plane.settle()
    plane.launcher.down = True
    plane.settle(6)
    shown = waiting(plane, job)
    assert (shown["reason"], shown["position"]) == ("cluster_unreachable", None)
    assert plane.clock.now - 30 < shown["since"] <= plane.clock.now
    plane.clock.now += 3500
    plane.settle(6)
    assert plane.get(f"{JOBS}/{job}")["status"] == "running"
    plane.launcher.down = False
    plane.settle(6)
    assert waiting(plane, job) is None
    assert row(plane, job).waited_s == 0, "the run went on meanwhile"


# ---- total patience


@pytest.mark.parametrize("value", [0, -1, "soon", 1e12, True, [60]])
def test_a_patience_that_is_no_number_of_seconds_is_refused_by_name(plane, value):
    error = plane.error(JOBS, plane.job_body(max_wait_s=value))
    assert error["param"] == "max_wait_s"
    assert plane.error("/v1/evaluations", plane.evaluation_body(max_wait_s=value))["param"] == "max_wait_s"


def test_a_queued_job_fails_after_its_own_patience_and_not_before(any_plane):
    plane = any_plane
    limit(plane, max_active_jobs=0)
    job = plane.job(max_wait_s=5000.0)["id"]
    assert plane.get(f"{JOBS}/{job}")["max_wait_s"] == 5000.0
    other = plane.job()["id"]
    plane.settle()
    plane.clock.now += 4900
    plane.settle(3)
    assert plane.get(f"{JOBS}/{job}")["status"] == "queued"
    plane.clock.now += 120
    plane.settle(3)
    shown = plane.get(f"{JOBS}/{job}")
    assert (shown["status"], shown["waiting"]) == ("failed", None)
    assert (shown["reason"]["code"], shown["reason"]["param"]) == ("waited_too_long", "max_wait_s")
    assert (
        "max_wait_s is 5000; the last reason was slots: 0 of 0 jobs are active" in shown["reason"]["message"]
    )
    assert plane.get(f"{JOBS}/{other}")["status"] == "queued", "it has a week"


def test_the_patience_of_the_deployment_holds_for_jobs_that_name_none(plane):
    limit(plane, max_active_jobs=0, max_wait_s=100.0)
    job = plane.job()["id"]
    evaluation = plane.post("/v1/evaluations", plane.evaluation_body())["id"]
    plane.settle()
    plane.clock.now += 101
    plane.settle(6)
    assert plane.get(f"{JOBS}/{job}")["reason"]["code"] == "waited_too_long"
    assert plane.get(f"/v1/evaluations/{evaluation}")["reason"]["code"] == "waited_too_long"


def test_a_run_that_waits_too_long_for_machines_is_stopped_and_can_be_resumed(plane):
    plane.launcher.plays["train"] = lambda spec: "pending"
    job = plane.job(max_wait_s=600.0)["id"]
    plane.settle()
    plane.clock.now += 601
    plane.settle(6)
    shown = plane.get(f"{JOBS}/{job}")
    assert (shown["status"], shown["reason"]["code"]) == ("failed", "waited_too_long")
    assert "the last reason was cluster_room: the run is pending" in shown["reason"]["message"]
    assert plane.launcher.stopped.count(f"{job}-train-a1") >= 1
    assert plane.launcher.submitted.count(f"{job}-train-a2") == 0, "no attempt was used up for it"
    plane.launcher.plays["train"] = fakes.train
    plane.post(f"{JOBS}/{job}/resume", None)
    plane.settle(60)
    assert plane.get(f"{JOBS}/{job}")["status"] == "succeeded", "its patience begins again"


def test_waits_of_a_job_add_up_and_time_on_machines_does_not_count(plane):
    plane.launcher.plays["train"] = fakes.runs
    job = plane.job(max_wait_s=1000.0)["id"]
    plane.settle()
    journal = Journal(plane.launcher.specs[f"{job}-train-a1"].prefix, flush_every_s=0.0)
    for what, seconds in (("2 GPU", 600), ("", 5000), ("2 GPU", 300)):
        journal.waiting(what)
        plane.settle(3)
        plane.clock.now += seconds
        plane.settle(3)
    assert plane.get(f"{JOBS}/{job}")["status"] == "running"
    plane.clock.now += 200
    plane.settle(6)
    assert plane.get(f"{JOBS}/{job}")["reason"]["code"] == "waited_too_long"


@pytest.mark.parametrize("state", ["pending", "running"])
@pytest.mark.parametrize(("verb", "status"), [("cancel", "cancelled"), ("pause", "paused")])
def test_a_job_that_waits_for_machines_is_cancelled_and_paused_at_the_next_review(plane, state, verb, status):
    plane.launcher.plays["train"] = lambda spec: state
    job = plane.job()["id"]
    plane.settle()
    if state == "running":
        Journal(plane.launcher.specs[f"{job}-train-a1"].prefix, flush_every_s=0.0).waiting("2 GPU")
    plane.clock.now += TWO_HOURS_S
    plane.settle(6)
    assert waiting(plane, job)["reason"] == "cluster_room"
    plane.post(f"{JOBS}/{job}/{verb}", None)
    plane.settle(3)
    if (verb, state) == ("pause", "running"):
        plane.launcher.leave(f"{job}-train-a1", step=0)  # as the driver does at its next poll
    plane.settle(6)
    shown = plane.get(f"{JOBS}/{job}")
    assert (shown["status"], shown["waiting"]) == (status, None)


# ---- the order


def add_queued(database: Database, **projects: int) -> dict[str, list[str]]:
    """So many queued evaluations of each project, the projects in turn. Their ids."""
    ids = defaultdict(list)
    left = dict(projects)
    while any(left.values()):
        for project in [name for name, number in left.items() if number]:
            left[project] -= 1
            job = queued_job()
            ids[project].append(job.id)
            with database.write(project) as session:
                session.add(job)
    return ids


def queued_job() -> Job:
    job = new_job(new_id("eval"), "evaluation", "queued", {})
    job.model = ""
    job.inputs = {}
    return job


def activate(database: Database, job_id: str, at: float) -> None:
    """Start a job, without a run."""
    with database.write() as session:
        session.execute(update(Job).where(Job.id == job_id).values(status="evaluating", started_at=at))


def place(plane: Plane, project: str, job_id: str) -> int:
    with plane.database.read() as session:
        seq = session.scalar(select(Job.seq).where(Job.id == job_id))
        queue = queueing.read(session, plane.settings)
        return queue.position(project, queueing.ranks(session, project, [seq])[seq])


def starting(plane: Plane) -> list[str]:
    with plane.database.read() as session:
        return queueing.starting(session, plane.settings)


def test_one_slot_goes_round_between_projects_whoever_queued_first(each_plane):
    plane = each_plane
    limit(plane, max_active_jobs=1)
    greedy = add_queued(plane.database, greedy=5)["greedy"]
    modest = add_queued(plane.database, modest=2)["modest"]
    order = [greedy[0], modest[0], greedy[1], modest[1], greedy[2], greedy[3], greedy[4]]
    for turn, expected in enumerate(order):
        assert starting(plane) == [expected]
        for job in order[turn:]:
            project = "greedy" if job in greedy else "modest"
            assert place(plane, project, job) >= 1
        activate(plane.database, expected, at=100.0 + turn)
        with plane.database.write() as session:
            session.execute(update(Job).where(Job.id == expected).values(status="succeeded"))
    assert starting(plane) == []


def test_places_are_the_order_of_starts_while_no_job_ends(plane):
    """Against the rule played slot by slot, for many random queues."""
    rng = random.Random(0)
    for _ in range(200):
        projects = [f"p{i}" for i in range(rng.randint(1, 5))]
        shares = {
            name: queueing.ProjectShare(
                name, rng.randint(0, 4), rng.randint(1, 6), rng.choice([0.0, 1.0, 2.0])
            )
            for name in projects
        }
        queue = queueing.Queue(shares, 0, 8, 99)
        active = {name: share.active for name, share in shares.items()}
        last = {name: (0, share.last_start) for name, share in shares.items()}
        started = dict.fromkeys(projects, 0)
        for turn in range(1, sum(share.queued for share in shares.values()) + 1):
            left = [name for name in projects if started[name] < shares[name].queued]
            chosen = min(left, key=lambda name: (active[name], last[name], name))
            active[chosen] += 1
            started[chosen] += 1
            last[chosen] = (turn, 0.0)
            assert queue.position(chosen, started[chosen]) == turn


def test_a_project_has_no_more_active_jobs_than_its_limit_and_the_others_go_on(each_plane):
    plane = each_plane
    limit(plane, max_active_jobs=4, max_active_jobs_per_project=2)
    jobs = add_queued(plane.database, a=5, b=1)
    assert starting(plane) == [jobs["a"][0], jobs["b"][0], jobs["a"][1]], "one slot is left over"
    for turn, job in enumerate(starting(plane)):
        activate(plane.database, job, at=1.0 + turn)
    assert starting(plane) == []
    with plane.database.read() as session:
        found = queueing.reason(session, plane.settings, "a")
    assert found == ("project_limit", "project 'a' has 2 active jobs, its limit")
    assert [place(plane, "a", job) for job in jobs["a"][2:]] == [1, 2, 3]


def test_the_reconciler_holds_to_the_limit_of_a_project_and_says_so(plane):
    limit(plane, max_active_jobs=4, max_active_jobs_per_project=1)
    plane.launcher.plays["encode"] = fakes.runs
    first, second = (plane.job()["id"] for _ in range(2))
    plane.settle()
    assert [plane.get(f"{JOBS}/{job}")["status"] for job in (first, second)] == ["preparing", "queued"]
    shown = waiting(plane, second)
    assert (shown["position"], shown["reason"]) == (1, "project_limit")
    assert shown["message"] == "project 'default' has 1 active jobs, its limit"
    assert [each["waiting"] for each in plane.get(JOBS)["data"]] == [shown, None]
    plane.post(f"{JOBS}/{first}/cancel", None)
    plane.settle()
    assert plane.get(f"{JOBS}/{second}")["status"] == "preparing"


def test_a_change_of_reason_is_one_event(plane):
    limit(plane, max_active_jobs=1, max_active_jobs_per_project=1)
    plane.launcher.plays["encode"] = fakes.runs
    first, second = (plane.job()["id"] for _ in range(2))
    plane.settle()
    limit(plane, max_active_jobs_per_project=None)
    for _ in range(3):
        plane.clock.now += 3601
        plane.settle(3)
    told = [text for text in plane.events(second) if text.startswith("waiting")]
    assert told == [
        "waiting (project_limit): project 'default' has 1 active jobs, its limit",
        "waiting (slots): 1 of 1 jobs are active",
    ]
    assert plane.get(f"{JOBS}/{first}")["status"] == "preparing"


def test_metrics_count_waiting_jobs_by_reason_as_answers_do(plane):
    limit(plane, max_active_jobs=2, max_active_jobs_per_project=None)
    plane.launcher.plays["encode"] = fakes.runs
    jobs = [plane.job()["id"] for _ in range(5)]
    plane.settle()
    journal = Journal(plane.launcher.specs[f"{jobs[0]}-encode-a1"].prefix, flush_every_s=0.0)
    journal.waiting("1 GPU; the cluster has 0 free of 1")
    plane.settle(6)
    with plane.database.write() as session:
        session.execute(update(Job).where(Job.id == jobs[2]).values(waiting_since=time.time() - 500))
    text = plane.http.get("/metrics").text
    counts = defaultdict(int)
    for each in plane.get(JOBS)["data"]:
        if each["waiting"]:
            counts[each["waiting"]["reason"]] += 1
    assert counts == {"slots": 3, "cluster_room": 1}
    for reason in ("slots", "project_limit", "cluster_room", "cluster_unreachable"):
        assert f'dde_jobs_waiting{{reason="{reason}"}} {float(counts[reason])}' in text
    (oldest,) = [line for line in text.splitlines() if line.startswith("dde_jobs_oldest_wait_seconds")]
    assert 500 <= float(oldest.split()[1]) < 600


# ---- the cost


def test_the_work_of_finding_the_next_job_does_not_grow_with_the_queue(plane):
    """Counted in instructions of SQLite's virtual machine, not in time."""
    limit(plane, max_active_jobs=8, max_active_jobs_per_project=2)
    add_queued(plane.database, a=10, b=10)
    few = instructions(plane)
    add_many(plane.database, 5000)
    many = instructions(plane)
    assert len(starting(plane)) == 4
    assert many < 2 * few, (few, many)


def add_many(database: Database, number: int) -> None:
    columns = {
        name: value for name, value in vars(queued_job()).items() if not name.startswith("_") and name != "id"
    }
    rows = [{**columns, "id": new_id("eval"), "project": "ab"[i % 2]} for i in range(number)]
    with database.write() as session:
        session.execute(insert(Job), rows)


def instructions(plane: Plane) -> int:
    """So many hundreds of instructions one look at the queue takes."""
    counted = 0

    def count() -> int:
        nonlocal counted
        counted += 1
        return 0

    with plane.database.read() as session:
        raw = session.connection().connection.dbapi_connection
        assert isinstance(raw, sqlite3.Connection)
        raw.set_progress_handler(count, 20)
        queueing.starting(session, plane.settings)
        raw.set_progress_handler(None, 0)
    return counted
