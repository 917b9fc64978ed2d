"""Ray's own client against a small server that answers as Ray's Jobs API does."""

from __future__ import annotations

import pytest

from services.control.launchers import ray_jobs
from services.control.launchers.contract import Run
from services.control.launchers.ray_jobs import RayJobsLauncher
from services.errors import Unavailable
from tests.services.control.test_streams import listening
from tests.support.jobs_api import jobs_api


@pytest.fixture
def jobs():
    """What the server knows: submission id -> status."""
    return {}


@pytest.fixture
def submitted():
    """The bodies that it was sent."""
    return []


@pytest.fixture
def head():
    """The head's node id, and how often a run was submitted to it that it has already."""
    return {"id": "second", "submits": 0}


@pytest.fixture
def ray_url(jobs, submitted, head, monkeypatch):
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with listening(jobs_api(jobs, submitted, head)) as url:
        yield url


def test_a_run_is_submitted_watched_and_stopped(ray_url, jobs):
    ray = RayJobsLauncher(ray_url)
    ray.submit(Run("j-encode-a1", "python -m services.ingest encode --spec x", "file:///a"))
    assert ray.status("j-encode-a1").state == "pending"
    for status in ("RUNNING", "SUCCEEDED", "FAILED"):
        jobs["j-encode-a1"] = status
        assert ray.status("j-encode-a1").state == status.lower()
    ray.stop("j-encode-a1")
    assert ray.status("j-encode-a1").state == "stopped"
    assert ray.log_tail("j-encode-a1").splitlines() == [f"line {i}" for i in range(60, 100)]


def test_a_restarted_head_is_made_to_look_after_its_runs_once(ray_url, jobs, head, monkeypatch):
    monkeypatch.setattr(ray_jobs, "HEAD_CHECK_EVERY_S", 0.0)
    ray = RayJobsLauncher(ray_url)
    jobs["j"] = "RUNNING"
    for _ in range(3):
        assert ray.status("j").state == "running"
    assert head["submits"] == 1
    head["id"] = "third"
    for _ in range(3):
        assert ray.status("j").state == "running"
    assert head["submits"] == 2
    jobs["j"] = "FAILED"
    head["id"] = "fourth"
    assert ray.status("j").state == "failed"
    assert (head["submits"], jobs) == (2, {"j": "FAILED"})


def test_a_second_submit_of_the_same_id_does_nothing(ray_url, jobs):
    ray = RayJobsLauncher(ray_url)
    for _ in range(2):
        ray.submit(Run("j", "python", "file:///a"))
    assert jobs == {"j": "PENDING"}


def test_what_ray_does_not_know_is_unknown_and_can_be_stopped(ray_url):
    ray = RayJobsLauncher(ray_url)
    assert ray.status("nobody").state == "unknown"
    ray.stop("nobody")


def test_a_submit_that_ray_refuses_says_why(ray_url):
    with pytest.raises(Unavailable, match=r"did not accept j: .*status code 400"):
        RayJobsLauncher(ray_url).submit(Run("j", "refuse", "file:///a"))


def test_a_server_error_is_no_answer_about_the_run(ray_url):
    with pytest.raises(Unavailable, match="the head is gone"):
        RayJobsLauncher(ray_url).status("broken")


def test_a_silent_or_absent_ray_is_unavailable_and_tried_again_afresh(ray_url, monkeypatch):
    ray = RayJobsLauncher("http://127.0.0.1:1")
    for call in (
        lambda: ray.status("j"),
        lambda: ray.submit(Run("j", "x", "file:///a")),
        lambda: ray.stop("j"),
        lambda: ray.log_tail("j"),
    ):
        with pytest.raises(Unavailable, match=r"http://127\.0\.0\.1:1"):
            call()
    ray._url = ray_url
    assert ray.status("j").state == "unknown"
    monkeypatch.setattr(ray_jobs, "TIMEOUT_S", 0.001)
    with pytest.raises(Unavailable):
        RayJobsLauncher("http://10.255.255.1:8265").status("j")


def test_ray_reserves_for_a_driver_what_the_settings_say_and_else_nothing(ray_url, submitted):
    RayJobsLauncher(ray_url).submit(Run("j", "x", "file:///a"))
    RayJobsLauncher(ray_url, driver_cpus=0.5, driver_memory=1 << 30).submit(Run("k", "x", "file:///a"))
    reserved = ("entrypoint_num_cpus", "entrypoint_memory")
    assert [submitted[0].get(name) for name in reserved] == [None, None]
    assert [submitted[1].get(name) for name in reserved] == [0.5, 1 << 30]
