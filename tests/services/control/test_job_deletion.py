"""An alignment job that has ended can be deleted, with everything that it alone has."""

from __future__ import annotations

from sqlalchemy import func, select

from services.control.tables import Event, Job, JobMetadata, Metric
from services.stages import layout
from services.storage import files

JOBS = "/v1/alignment/jobs"


def finished_job(plane, **overrides) -> dict:
    job = plane.job(**overrides)
    plane.settle()
    done = plane.get(f"{JOBS}/{job['id']}")
    assert done["status"] == "succeeded"
    return done


def refused(plane, job_id: str) -> dict:
    answer = plane.http.delete(f"{JOBS}/{job_id}")
    assert answer.status_code == 409, answer.text
    return answer.json()["error"]


def files_of(plane, job_id: str) -> list[str]:
    return files.list_files(layout.job_folder(plane.app_settings.storage_uri, job_id), recursive=True)


def test_a_deleted_job_leaves_no_row_and_no_file(each_plane):
    plane = each_plane
    job = finished_job(plane, metadata={"why": "test"})
    other = finished_job(plane)
    assert files_of(plane, job["id"])
    assert plane.http.delete(f"/v1/models/{job['aligned_model']}").status_code == 200
    answer = plane.http.delete(f"{JOBS}/{job['id']}").json()
    assert answer == {"id": job["id"], "object": "alignment.job", "deleted": True}
    assert files_of(plane, job["id"]) == []
    assert plane.get(f"{JOBS}/{job['id']}", 404)["error"]["code"] == "job_not_found"
    with plane.database.read() as session:
        assert list(session.scalars(select(Job.id))) == [other["id"]]
        assert set(session.scalars(select(Event.job))) == {other["id"]}
        assert set(session.scalars(select(Metric.job))) <= {other["id"]}
        assert session.scalar(select(func.count()).select_from(JobMetadata)) == 0
    assert files_of(plane, other["id"])


def test_an_unfinished_job_and_one_whose_model_is_registered_are_not_deleted(plane):
    job = plane.job()
    assert refused(plane, job["id"])["code"] == "job_validating"
    plane.settle()
    error = refused(plane, job["id"])
    model = plane.get(f"{JOBS}/{job['id']}")["aligned_model"]
    assert (error["code"], model in error["message"]) == ("in_use", True)
    assert files_of(plane, job["id"])


def test_a_job_of_a_study_is_not_deleted(plane):
    evaluation = {"prompts_uri": str(plane.root / "prompts.txt"), "num_prompts": 2}
    base = plane.job_body()
    body = {"name": "s", "base": base, "grid": {"training.seed": [0, 1]}, "evaluation": evaluation}
    study = plane.post("/v1/studies", body)
    plane.settle(80)
    seen = plane.get(f"/v1/studies/{study['id']}")
    job = plane.get(f"{JOBS}/{seen['cells'][0]['job']}")
    assert job["status"] == "succeeded"
    assert plane.http.delete(f"/v1/models/{job['aligned_model']}").status_code == 200
    error = refused(plane, job["id"])
    assert (error["code"], study["id"] in error["message"]) == ("in_use", True)
