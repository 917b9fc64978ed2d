"""GET /v1/alignment/jobs/{id}/credit: the file beside the weights, once there are weights."""

from __future__ import annotations

import pytest

from dde_core.config import ObjectiveConfig
from services.api.records import CreditBucket, CreditRecord
from services.stages import layout
from services.storage import files
from tests.services.control import fakes

JOBS = "/v1/alignment/jobs"
RECORD = CreditRecord(
    objective=ObjectiveConfig(method="dde_step", noise="shared", t_max=1000),
    scheduler={"num_train_timesteps": 1000, "trained_betas": None},
    steps=2,
    batch_size=4,
    calibration={name: [0.0, -0.5] for name in ("theta_w", "ref_w", "theta_l", "ref_l")},
    buckets=[CreditBucket(t_first=1, t_last=100, pairs=8, margin=1e-4, logged=0.25, predicted=0.2499)],
)


def train(spec):
    """The fake stage, which leaves the record where the real one does."""
    files.write_bytes(layout.credit_uri(spec.output), RECORD.model_dump_json().encode())
    return fakes.train(spec)


def refusal(plane, job_id: str) -> dict:
    return plane.get(f"{JOBS}/{job_id}/credit", 404)["error"]


@pytest.fixture
def job(plane):
    plane.launcher.plays["train"] = train
    return plane.job()["id"]


def test_a_trained_job_has_the_record_that_its_training_wrote(plane, job):
    plane.launcher.plays["evaluate"] = fakes.runs
    plane.settle()
    assert plane.get(f"{JOBS}/{job}")["status"] == "evaluating"
    answer = plane.http.get(f"{JOBS}/{job}/credit")
    assert answer.headers["content-type"] == "application/json"
    assert CreditRecord.model_validate_json(answer.content) == RECORD
    assert set(answer.json()) == {"objective", "scheduler", "steps", "batch_size", "calibration", "buckets"}


def test_before_training_is_done_there_is_none(plane, job):
    error = refusal(plane, job)
    assert (error["param"], error["code"], error["type"]) == (
        "id",
        "credit_not_found",
        "invalid_request_error",
    )
    assert error["message"] == (
        f"job {job} has no credit record: it is written when training is done; the job is validating"
    )
    plane.launcher.plays["train"] = fakes.fails
    plane.settle()
    assert refusal(plane, job)["message"].endswith("when training is done; the job is failed")


def test_a_model_without_one_and_a_deleted_model_are_reported(plane, job):
    plane.launcher.plays["train"] = fakes.train
    plane.settle()
    said = f"job {job} has no credit record: its model has none; the job is succeeded"
    assert refusal(plane, job)["message"] == said
    plane.launcher.plays["train"] = train
    other = plane.job()["id"]
    plane.settle()
    plane.get(f"{JOBS}/{other}/credit")
    assert plane.http.delete(f"/v1/models/{plane.get(f'{JOBS}/{other}')['aligned_model']}").status_code == 200
    assert refusal(plane, other)["code"] == "credit_not_found"


def test_an_evaluation_has_none_and_an_unknown_job_is_named(plane):
    request = plane.evaluation_body()
    evaluation = plane.post("/v1/evaluations", request)["id"]
    unknown = "ajob_" + "0" * 24
    for job_id in (evaluation, unknown, "x"):
        error = refusal(plane, job_id)
        assert (error["message"], error["code"]) == (f'job "{job_id}" does not exist', "job_not_found")
    plane.get(f"/v1/evaluations/{evaluation}/credit", 404)


def test_the_openapi_document_promises_the_record(plane):
    document = plane.http.app.openapi()
    answer = document["paths"][JOBS + "/{job_id}/credit"]["get"]["responses"]["200"]["content"][
        "application/json"
    ]
    assert answer["schema"] == {"$ref": "#/components/schemas/CreditRecord"}
    assert document["components"]["schemas"]["ObjectiveConfig"]["properties"]["beta"]["exclusiveMinimum"] == 0
