"""Prompts that are a dataset's held-out captions: written before a job starts, refused where trained on."""

from __future__ import annotations

import json
from contextvars import copy_context

import pytest

from services.artifacts.prompts import all_prompts
from services.storage import files, sources
from tests.services.control.conftest import Plane, write_pairs
from tests.services.control.test_access import bearer, new_key

JOBS = "/v1/alignment/jobs"
EVALUATIONS = "/v1/evaluations"
STUDIES = "/v1/studies"
CAPTIONS = [
    "a red cross", "a small blue circle", "a green square", "a large red circle", "a blue cross",
    "a small green square", "a blue square", "a red square", "a green cross", "a large green circle",
]  # fmt: skip
"""Of the eight decided pairs, the tie and the row without a label of ``write_pairs``."""


@pytest.fixture
def dataset(plane: Plane) -> str:
    uri = write_pairs(plane.root / "pairs", caption=CAPTIONS)
    return str(plane.post("/v1/datasets", {"name": "pairs", "uri": uri})["id"])


def job_body(plane: Plane, held_out_pairs: int = 4, **evaluation) -> dict:
    body = plane.job_body(training={"steps": 2, "batch_size": 2, "held_out_pairs": held_out_pairs})
    body["evaluation"] = {"prompts_uri": "held-out:", "num_prompts": 3, "scorers": [], **evaluation}
    return body


def written(plane: Plane, uri: str) -> list[str]:
    return [json.loads(line)["prompt"] for line in files.read_bytes(uri).decode().splitlines()]


def _prompts_as_a_stage(spec, uri: str) -> list[str]:
    """Under the rules of the stage, which end with the caller's context."""
    sources.hold_request_to(spec.sources)
    return [prompt.text for prompt in all_prompts(uri)]


def test_a_job_is_evaluated_on_the_captions_that_it_holds_out(plane, dataset):
    job = plane.post(JOBS, job_body(plane))
    uri = job["evaluation"]["prompts_uri"]
    storage = plane.app_settings.storage_uri
    assert uri.startswith(f"{storage}/prompts/{dataset}-held-out-4-")
    found = written(plane, uri)
    assert len(found) == 4
    assert set(found) < set(CAPTIONS[:8])
    plane.settle(60)
    assert plane.get(f"{JOBS}/{job['id']}")["status"] == "succeeded"
    spec = plane.launcher.specs[f"{job['id']}-evaluate-a1"]
    assert spec.evaluation.prompts_uri == uri
    assert copy_context().run(_prompts_as_a_stage, spec, uri) == found
    again = plane.post(JOBS, job_body(plane, seed=3))
    assert again["evaluation"]["prompts_uri"] == uri
    more = plane.post(JOBS, job_body(plane, held_out_pairs=6))
    assert written(plane, more["evaluation"]["prompts_uri"])[:4] == found


def test_validation_takes_the_held_out_captions_after_the_evaluations(plane, dataset):
    body = job_body(plane, held_out_pairs=5)
    body["training"]["checkpoint_every"] = 1
    body["validation"] = {"every": 1, "num_prompts": 2}
    assert plane.post(JOBS, body)["validation"]["prompts_uri"] is None
    body["validation"]["num_prompts"] = 3
    error = plane.error(JOBS, body)
    assert error["code"] == "too_few_prompts"
    assert (
        f"requires 3 and validation 3 prompts, the 5 held-out pairs of dataset {dataset}" in error["message"]
    )
    body["validation"]["prompts_uri"] = "held-out:"
    assert plane.error(JOBS, body)["param"] == "validation.prompts_uri"
    body["evaluation"]["prompts_uri"] = str(plane.root / "prompts.txt")
    uri = plane.post(JOBS, body)["validation"]["prompts_uri"]
    assert len(written(plane, uri)) == 5


@pytest.mark.parametrize(
    ("training", "evaluation", "param", "words"),
    [
        (
            {"held_out_pairs": 0},
            {},
            "training.held_out_pairs",
            "must be above 0: no caption is held out, got 0",
        ),
        ({}, {"num_prompts": 5}, "evaluation.num_prompts", "requires 5 prompts, the 4 held-out pairs"),
        (
            {},
            {"prompts_uri": "held-out:ds_1?pairs=3"},
            "evaluation.prompts_uri",
            "must be 'held-out:' in a job",
        ),
        ({}, {"prompts_uri": "held-out:all"}, "evaluation.prompts_uri", "must be 'held-out:' in a job"),
    ],
)
def test_a_job_without_such_captions_is_refused(plane, dataset, training, evaluation, param, words):
    body = job_body(plane, **evaluation)
    body["training"] |= training
    error = plane.error(JOBS, body)
    assert error["param"] == param
    assert words in error["message"]
    assert plane.get(JOBS)["data"] == []


def test_pairs_that_have_changed_since_registration_are_refused(plane, dataset):
    write_pairs(plane.root / "pairs", caption=[*CAPTIONS[1:], "a red cross"])
    error = plane.error(JOBS, job_body(plane))
    assert (error["param"], error["code"]) == ("evaluation.prompts_uri", "dataset_changed")


def test_captions_that_were_found_before_the_pairs_changed_stay_as_they_were(plane, dataset):
    uri = plane.post(JOBS, job_body(plane))["evaluation"]["prompts_uri"]
    found = written(plane, uri)
    write_pairs(plane.root / "pairs", caption=[*CAPTIONS[1:], "a red cross"])
    body = plane.evaluation_body(prompts_uri=f"held-out:{dataset}?pairs=4", num_prompts=4, scorers=[])
    assert plane.post(EVALUATIONS, body)["prompts_uri"] == uri
    assert written(plane, uri) == found
    error = plane.error(EVALUATIONS, body | {"prompts_uri": f"held-out:{dataset}?pairs=3"})
    assert (error["param"], error["code"]) == ("prompts_uri", "dataset_changed")


def test_an_evaluation_names_the_dataset_and_how_many_of_its_pairs_are_held_out(plane, dataset):
    body = plane.evaluation_body(prompts_uri=f"held-out:{dataset}?pairs=4", num_prompts=4, scorers=[])
    evaluation = plane.post(EVALUATIONS, body)
    uri = evaluation["prompts_uri"]
    job = plane.post(JOBS, job_body(plane))
    assert written(plane, uri) == written(plane, job["evaluation"]["prompts_uri"])
    assert plane.error(EVALUATIONS, body | {"num_prompts": 5})["code"] == "too_few_prompts"
    for wrong in ("held-out:", f"held-out:{dataset}", f"held-out:{dataset}?pairs=0", "held-out:?pairs=4"):
        error = plane.error(EVALUATIONS, body | {"prompts_uri": wrong})
        assert error["param"] == "prompts_uri"
        assert "held-out:DATASET?pairs=N" in error["message"]
    unknown = body | {"prompts_uri": "held-out:ds_0?pairs=4"}
    assert plane.error(EVALUATIONS, unknown, 404)["code"] == "dataset_not_found"


def test_a_model_that_was_trained_on_the_captions_is_not_evaluated_on_them(plane, dataset):
    job = plane.post(JOBS, job_body(plane, held_out_pairs=4) | {"name": "aligned"})
    plane.settle(60)
    body = plane.evaluation_body(models=["shapes", "aligned"], num_prompts=3, scorers=[])
    plane.post(EVALUATIONS, body | {"prompts_uri": f"held-out:{dataset}?pairs=4"})
    error = plane.error(EVALUATIONS, body | {"prompts_uri": f"held-out:{dataset}?pairs=5"})
    assert error["code"] == "trained_on_prompts"
    assert f"job {job['id']} held out 4 pairs of it, got 5" in error["message"]
    further = job_body(plane, held_out_pairs=5) | {"model": "aligned"}
    assert plane.error(JOBS, further)["code"] == "trained_on_prompts"
    further["training"]["held_out_pairs"] = 4
    plane.post(JOBS, further)


def test_a_study_is_evaluated_on_what_all_of_its_cells_hold_out(plane, dataset):
    base = job_body(plane)
    evaluation = {"prompts_uri": "held-out:", "num_prompts": 4, "scorers": []}
    body = {"name": "s", "base": base, "grid": {"training.seed": [0, 1]}, "evaluation": evaluation}
    study = plane.post(STUDIES, body)
    uri = study["evaluation"]["prompts_uri"]
    assert len(written(plane, uri)) == 4
    plane.settle(10)
    jobs = plane.get(f"{JOBS}?metadata[study]={study['id']}")["data"]
    assert {job["evaluation"]["prompts_uri"] for job in jobs} == {uri}
    body |= {"name": "t", "grid": {"training.held_out_pairs": [4, 6]}}
    error = plane.error(STUDIES, body)
    assert error["param"] == "evaluation.prompts_uri"
    assert f"as the cells hold out {dataset}?pairs=4 and {dataset}?pairs=6" in error["message"]
    evaluation["prompts_uri"] = f"held-out:{dataset}?pairs=5"
    assert "4: it would be trained on captions of" in plane.error(STUDIES, body)["message"]
    evaluation["prompts_uri"] = f"held-out:{dataset}?pairs=4"
    assert plane.post(STUDIES, body)["evaluation"]["prompts_uri"] == uri


def test_the_captions_of_a_project_are_not_read_by_another(plane, dataset):
    uri = plane.post(JOBS, job_body(plane))["evaluation"]["prompts_uri"]
    other = bearer(new_key(plane, project="other")["key"])
    plane.post("/v1/models", {"name": "shapes", "uri": str(plane.root / "base")}, headers=other)
    body = plane.evaluation_body(prompts_uri=f"held-out:{dataset}?pairs=4", models=["shapes", "shapes2"])
    plane.post("/v1/models", {"name": "shapes2", "uri": str(plane.root / "base")}, headers=other)
    assert plane.post(EVALUATIONS, body, 404, headers=other)["error"]["code"] == "dataset_not_found"
    plane.post(EVALUATIONS, body | {"prompts_uri": uri}, 403, headers=other)
