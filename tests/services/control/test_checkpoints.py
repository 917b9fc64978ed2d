"""GET /v1/alignment/jobs/{id}/checkpoints: what training has stored, as its records in storage say."""

from __future__ import annotations

import pytest

from services.api.records import Validated
from services.stages import layout
from services.storage import files
from tests.services.control import fakes

JOBS = "/v1/alignment/jobs"
OUTCOME = Validated(step=20, metrics={"held_out_accuracy": 0.75}, picture="file:///p.png", seconds=1.5)


@pytest.fixture
def job(plane):
    """The id of a job that trains, and the folder of its run."""
    plane.launcher.plays["train"] = fakes.runs
    job = plane.job()["id"]
    plane.settle()
    return job, layout.run_folder(plane.app_settings.storage_uri, job)


def steps(answer: dict) -> list[int]:
    return [each["step"] for each in answer["data"]]


def test_every_checkpoint_is_listed_with_its_validation(plane, job):
    job, run = job
    assert plane.launcher.specs[f"{job}-train-a1"].run == run
    for step in (10, 20):
        fakes.checkpoint(run, step)
    files.write_json(files.join(run, "validation", "step-00000020.json"), OUTCOME.model_dump())
    answer = plane.get(f"{JOBS}/{job}/checkpoints")
    assert (answer["object"], answer["has_more"], steps(answer)) == ("list", False, [10, 20])
    first, second = answer["data"]
    assert first == {
        "object": "alignment.job.checkpoint",
        "step": 10,
        "pairs_seen": 40,
        "images_seen": 80,
        "bytes": 100,
        "workers": 2,
        "created_at": 1700000000,
        "metrics": {"loss": 0.1},
        "uri": f"{run}/checkpoints/step-00000010",
        "validation": None,
    }
    assert second["validation"] == OUTCOME.model_dump()


def test_pages_follow_one_another_by_step(plane, job):
    job, run = job
    for step in (5, 10, 15):
        fakes.checkpoint(run, step)
    page = plane.get(f"{JOBS}/{job}/checkpoints?limit=2")
    assert (steps(page), page["has_more"]) == ([5, 10], True)
    page = plane.get(f"{JOBS}/{job}/checkpoints?limit=2&after=10")
    assert (steps(page), page["has_more"]) == ([15], False)


def test_what_has_no_record_is_no_checkpoint(plane, job):
    job, run = job
    fakes.checkpoint(run, 10)
    files.write_bytes(files.join(layout.checkpoint_folder(run, 20), "weights.bin"), b"half")
    assert steps(plane.get(f"{JOBS}/{job}/checkpoints")) == [10]


@pytest.mark.parametrize("damaged", [b"", b"\xff\xfe", b'{"step": 20', b'{"step": 20}'])
def test_what_has_a_damaged_record_is_left_out_and_a_damaged_outcome_is_none(plane, job, damaged):
    job, run = job
    for step in (10, 20, 30):
        fakes.checkpoint(run, step)
    files.write_bytes(layout.checkpoint_record_uri(run, 20), damaged)
    files.write_bytes(layout.outcome_uri(run, 30), b"{")
    answer = plane.get(f"{JOBS}/{job}/checkpoints")
    assert (steps(answer), answer["data"][1]["validation"]) == ([10, 30], None)


def test_a_job_that_has_not_trained_has_none_and_an_unknown_one_is_named(plane):
    job = plane.job()["id"]
    assert plane.get(f"{JOBS}/{job}/checkpoints") == {"object": "list", "data": [], "has_more": False}
    error = plane.get(f"{JOBS}/ajob_{'0' * 24}/checkpoints", 404)["error"]
    assert error["code"] == "job_not_found"
    error = plane.get(f"{JOBS}/{job}/checkpoints?after=x", 400)["error"]
    assert error["param"] == "after"
