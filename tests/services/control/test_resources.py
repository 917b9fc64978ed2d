"""What is registered: counts, digests, names, lists, deletion, repeats."""

from __future__ import annotations

import threading

import pyarrow as pa
import pytest
from pydantic import TypeAdapter

from services.api import answers
from services.api.records import DatasetReport
from services.artifacts import models
from services.pairs.source import Source
from services.stages import layout
from services.storage import files
from tests.services.control import fakes
from tests.services.control.conftest import write_base, write_pairs

JOBS = "/v1/alignment/jobs"
TRAINING = {"steps": 2, "batch_size": 4, "checkpoint_every": 2}
NOTHING_ODD = {"soft": 0, "duplicates": 0, "contradicting": 0, "long_captions": 0}


def test_a_dataset_is_counted_and_digested_when_it_is_registered(any_plane):
    dataset = any_plane.dataset
    assert dataset["counts"] == {"rows": 10, "pairs": 8, "ties": 1, "missing": 1, "bad": {}, **NOTHING_ODD}
    assert len(dataset["digest"]) == 64
    assert dataset["columns"] == {}
    assert dataset["uri"] == files.as_uri(any_plane.root / "pairs")
    assert any_plane.get(f"/v1/datasets/{dataset['id']}") == dataset


def test_a_datasets_columns_are_kept_and_shown_and_bad_rows_are_counted(any_plane):
    captions = pa.array(["good"] * 8 + ["bad\0"] * 2)
    uri = write_pairs(any_plane.root / "mapped", caption=None, prompt=captions)
    request = {"name": "mapped", "uri": uri, "columns": {"caption": "prompt"}}
    dataset = any_plane.post("/v1/datasets", request)
    assert dataset["columns"] == {"caption": "prompt"}
    assert dataset["counts"] == {
        "rows": 10,
        "pairs": 8,
        "ties": 0,
        "missing": 1,
        "bad": {"caption_null_byte": 1},
        **NOTHING_ODD,
    }
    assert (
        any_plane.get(f"/v1/datasets/{dataset['id']}") == any_plane.get("/v1/datasets")["data"][0] == dataset
    )


def test_registration_reads_every_row_once_and_one_again_with_its_images(plane, monkeypatch):
    reads = []
    rows = Source.rows

    def recorded(source, unit, *, with_images=False, start=0, stop=None):
        for number, row in enumerate(
            rows(source, unit, with_images=with_images, start=start, stop=stop), start
        ):
            reads.append((number, with_images))
            yield row

    monkeypatch.setattr(Source, "rows", recorded)
    chosen = pa.array([None] * 6 + [1.0] * 4, pa.float64())
    rejected = pa.array([None] * 6 + [0.0] * 4, pa.float64())
    uri = write_pairs(plane.root / "late", label_0=chosen, label_1=rejected)
    dataset = plane.post("/v1/datasets", {"name": "late", "uri": uri})
    assert dataset["example"]["caption"] == "caption 6"
    assert reads == [*((number, False) for number in range(10)), (6, True)]


def test_a_dataset_is_one_split_of_a_folder_and_shows_a_decided_row(any_plane):
    folder = any_plane.root / "splits"
    folder.mkdir()
    for split in ("train", "test"):
        write_pairs(folder / split, caption=pa.array([split] * 10))
    request = {"name": "splits", "uri": folder.as_uri()}
    error = any_plane.error("/v1/datasets", request)
    assert (error["param"], error["code"]) == ("uri", "splits")
    assert "test, train" in error["message"]
    dataset = any_plane.post("/v1/datasets", {**request, "split": "train"})
    assert (dataset["split"], dataset["example"]["caption"], dataset["counts"]["rows"]) == (
        "train",
        "train",
        10,
    )
    assert any_plane.get(f"/v1/datasets/{dataset['id']}") == dataset
    report = any_plane.post("/v1/datasets/validate", {"uri": folder.as_uri(), "split": "test"})
    assert (report["split"], report["rows"]) == ("test", 10)


def test_validating_a_dataset_reports_a_sample_and_stores_nothing(plane):
    uri = write_pairs(
        plane.root / "pairs", jpg_0=pa.array([None] * 10, pa.binary()), extra=pa.array(range(10))
    )
    report = DatasetReport.model_validate(plane.post("/v1/datasets/validate", {"uri": uri}))
    assert (report.format, report.shape, report.rows, report.columns_not_read) == (
        "parquet",
        "pair",
        10,
        ["extra"],
    )
    assert report.sampled == {"rows": 10, "decided": 0, "tie": 1, "missing": 1, "bad": 8}
    assert report.bad["image_missing"].count == 8
    assert [example.row for example in report.bad["image_missing"].examples] == [
        f"0.parquet:0:{row}" for row in range(3)
    ]
    assert plane.get("/v1/datasets")["data"] == []


def test_prompts_that_text_encoders_cut_are_reported_as_warnings(plane):
    long = "a red circle " * 26
    prompts = plane.root / "long.txt"
    prompts.write_text("\n".join(["a red cross", long, "a red star", long, long]))
    evaluation = {"prompts_uri": str(prompts), "num_prompts": 2, "scorers": []}
    job = plane.job(evaluation=evaluation, validation={"every": 2, "num_prompts": 3}, training=TRAINING)
    end = "prompts have more than 77 tokens: the rest is not read"
    warnings = [
        event["message"]
        for event in plane.get(f"{JOBS}/{job['id']}/events")["data"]
        if event["level"] == "warning"
    ]
    assert warnings == [f"evaluation.prompts_uri: 1 of 2 {end}", f"validation.num_prompts: 2 of 3 {end}"]
    evaluated = plane.post("/v1/evaluations", plane.evaluation_body() | evaluation)["id"]
    last = plane.get(f"/v1/evaluations/{evaluated}/events")["data"][-1]
    assert (last["level"], last["message"]) == ("warning", f"prompts_uri: 1 of 2 {end}")


def test_a_setting_that_the_method_ignores_is_reported_as_a_warning(plane):
    objective = {"method": "uniform", "beta": 7.0, "gamma": 0.8, "calibration_bins": 9}
    job = plane.job(objective=objective)
    events = plane.get(f"/v1/alignment/jobs/{job['id']}/events")["data"]
    warnings = [event["message"] for event in events if event["level"] == "warning"]
    assert warnings == [
        "method 'uniform' ignores objective.calibration_bins = 9",
        "method 'uniform' ignores objective.gamma = 0.8",
    ]


def test_rows_are_counted_wherever_they_are_and_extra_columns_are_ignored(plane):
    whole = plane.dataset
    parts = plane.root / "parts"
    write_pairs(parts, extra=pa.array(range(10)))
    table = pa.parquet.read_table(parts / "0.parquet")
    pa.parquet.write_table(table.slice(6), parts / "0.parquet")
    pa.parquet.write_table(table.slice(0, 6), parts / "1.parquet")
    again = plane.post("/v1/datasets", {"name": "parts", "uri": str(parts)})
    assert again["counts"] == whole["counts"]
    one = plane.post("/v1/datasets", {"name": "one", "uri": str(parts / "1.parquet")})
    assert one["counts"]["rows"] == 6
    assert one["digest"] != whole["digest"]


def test_a_dataset_in_use_is_not_deleted_and_afterwards_it_is(any_plane):
    plane, dataset = any_plane, any_plane.dataset
    job = plane.job()
    answer = plane.http.delete(f"/v1/datasets/{dataset['id']}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "in_use")
    assert job["id"] in answer.json()["error"]["message"]
    plane.settle()
    assert plane.http.delete(f"/v1/datasets/{dataset['id']}").json() == {
        "id": dataset["id"],
        "object": "dataset",
        "deleted": True,
    }
    plane.get(f"/v1/datasets/{dataset['id']}", 404)
    assert files.exists(dataset["uri"])


def test_a_base_model_is_published_for_serve_and_deleted_without_its_files(any_plane):
    plane = any_plane
    root = plane.settings.storage_uri
    base = plane.get("/v1/models/shapes")
    assert (base["base"], base["job"], base["lineage"], base["current"]) == (None, None, {}, True)
    assert base["digest"] == models.folder_digest(base["uri"])
    assert models.find(root, "shapes").id == base["version"]
    assert plane.http.delete(f"/v1/models/{base['id']}").json()["deleted"] is True
    left = [name for name in files.list_files(root, recursive=True) if name != ".writable"]
    assert left == []
    assert files.exists(base["uri"])
    plane.post("/v1/models", {"name": "shapes", "uri": write_base(plane.root / "base")})


def test_models_are_listed_as_openais_client_expects(plane):
    [model] = plane.get("/v1/models")["data"]
    assert (model["id"], model["object"], model["owned_by"]) == ("shapes", "model", "dde")
    assert model["created"] == model["created_at"]
    assert plane.get("/v1/models/shapes") == plane.get(f"/v1/models/{model['version']}") == model


def test_an_older_model_of_a_name_is_called_by_its_version(plane):
    for _ in range(2):
        plane.job(name="aligned")
        plane.settle()
    names = [(model["id"], model["current"]) for model in plane.get("/v1/models")["data"]]
    old = plane.get("/v1/models")["data"][1]["version"]
    assert names == [("aligned", True), (old, False), ("shapes", True)]
    assert plane.get(f"/v1/models/{old}")["id"] == old


def test_models_are_listed_and_deleted_by_name_and_by_version(plane):
    for name in ("one", "two", "three"):
        plane.post("/v1/models", {"name": name, "uri": str(plane.root / "base")})
    listed = plane.get("/v1/models?limit=2")
    assert [model["id"] for model in listed["data"]] == ["three", "two"]
    for after in ("two", listed["data"][1]["version"]):
        page = plane.get(f"/v1/models?after={after}")
        assert [model["id"] for model in page["data"]] == ["one", "shapes"]
    deleted = plane.http.delete("/v1/models/two").json()
    assert deleted == {"id": "two", "object": "model", "deleted": True}
    plane.get("/v1/models/two", 404)


def test_a_model_in_use_is_not_deleted_and_an_aligned_one_loses_its_weights(plane):
    plane.launcher.plays["evaluate"] = fakes.runs
    job = plane.job(name="aligned")
    plane.settle()
    aligned = plane.get(f"{JOBS}/{job['id']}")["aligned_model"]
    for model in (job["model"], aligned):
        assert plane.http.delete(f"/v1/models/{model}").status_code == 409
    plane.post(f"{JOBS}/{job['id']}/cancel", None)
    plane.settle()
    root = plane.settings.storage_uri
    assert files.exists(layout.model_folder(root, aligned))
    assert plane.http.delete(f"/v1/models/{aligned}").status_code == 200
    assert not files.exists(layout.model_folder(root, aligned))
    assert not files.exists(f"{root}/models/{aligned}.json")


def test_the_default_name_is_made_from_base_method_and_job(plane):
    job = plane.job(objective={"method": "uniform"})
    assert job["name"] == f"shapes-uniform-{job['id'][-6:]}"


def test_an_answer_repeats_the_request_with_every_default(plane):
    job = plane.job(metadata={"team": "a"}, objective={"beta": 3})
    assert job["objective"]["beta"] == 3.0
    assert job["objective"]["method"] == "dde"
    assert (job["training"]["steps"], job["training"]["max_grad_norm"], job["workers"]) == (2, 1.0, 1)
    assert job["metadata"] == {"team": "a"}
    assert (job["model"], job["dataset"]) == (plane.get("/v1/models/shapes")["version"], plane.dataset["id"])


def test_lists_are_newest_first_in_pages(each_plane):
    plane = each_plane
    made = [plane.job()["id"] for _ in range(5)][::-1]
    first = plane.get(f"{JOBS}?limit=2")
    assert ([job["id"] for job in first["data"]], first["has_more"]) == (made[:2], True)
    last = plane.get(f"{JOBS}?limit=3&after={made[1]}")
    assert ([job["id"] for job in last["data"]], last["has_more"], last["object"]) == (
        made[2:],
        False,
        "list",
    )


def test_jobs_are_filtered_by_status_and_metadata_together(each_plane):
    plane = each_plane
    a = plane.job(metadata={"team": "a", "run": "1"})["id"]
    b = plane.job(metadata={"team": "a", "run": "2"})["id"]
    plane.job(metadata={"team": "b"})
    plane.post(f"{JOBS}/{b}/cancel", None)
    plane.settle(60)

    def ids(query: str) -> list[str]:
        return [job["id"] for job in plane.get(f"{JOBS}?{query}")["data"]]

    assert ids("metadata[team]=a") == [b, a]
    assert ids("metadata[team]=a&metadata[run]=1") == [a]
    assert ids("metadata[team]=a&status=cancelled") == [b]
    assert ids("metadata[team]=a&limit=1") == [b]
    assert ids(f"metadata[team]=a&after={b}") == [a]
    assert ids("metadata[team]=c") == ids("status=failed") == []


def test_the_same_key_and_body_get_the_same_answer_and_make_one_thing(each_plane):
    plane = each_plane
    plane.dataset  # noqa: B018
    bodies = {
        JOBS: plane.job_body(),
        "/v1/evaluations": plane.evaluation_body(),
        "/v1/models": {"name": "other", "uri": str(plane.root / "base")},
        "/v1/datasets": {"name": "again", "uri": str(plane.root / "pairs")},
    }
    for path, body in bodies.items():
        before = len(plane.get(path)["data"])
        headers = {"Idempotency-Key": f"key of {path}"}
        first, second = (plane.post(path, body, headers=headers) for _ in range(2))
        assert first == second
        assert len(plane.get(path)["data"]) == before + 1


def test_the_same_key_with_another_body_or_path_is_refused(plane):
    headers = {"Idempotency-Key": "k"}
    plane.post(JOBS, plane.job_body(), headers=headers)
    error = plane.post(JOBS, plane.job_body(workers=2), 400, headers=headers)["error"]
    assert (error["param"], error["code"]) == ("Idempotency-Key", "idempotency_key_reused")
    assert error["message"] == "Idempotency-Key: was used for a different request, got 'k'; send a new key"
    plane.post("/v1/datasets", {"name": "d", "uri": str(plane.root / "pairs")}, 400, headers=headers)
    plane.post(JOBS, plane.job_body(), 400, headers={"Idempotency-Key": "k" * 256})


def test_a_refused_create_does_not_use_up_its_key(plane):
    headers = {"Idempotency-Key": "k"}
    plane.post(JOBS, plane.job_body(model="later"), 404, headers=headers)
    plane.post("/v1/models", {"name": "later", "uri": str(plane.root / "base")})
    plane.post(JOBS, plane.job_body(model="later"), headers=headers)


def test_requests_at_once_under_one_key_make_one_job_and_none_is_a_conflict(each_plane):
    plane = each_plane
    body, answers = plane.job_body(), []

    def send() -> None:
        answers.append(plane.http.post(JOBS, json=body, headers={"Idempotency-Key": "k"}))

    threads = [threading.Thread(target=send) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert len(plane.get(JOBS)["data"]) == 1


def test_answers_have_the_shapes_that_the_openapi_document_promises(plane):
    job = plane.job()
    evaluation = plane.evaluation_body()
    evaluated = plane.post("/v1/evaluations", evaluation)
    plane.settle(60)
    promised = {
        JOBS: answers.ListView[answers.JobView],
        f"{JOBS}/{job['id']}": answers.JobView,
        f"{JOBS}/{job['id']}/events": answers.ListView[answers.EventView],
        f"{JOBS}/{job['id']}/metrics": answers.ListView[answers.MetricView],
        f"/v1/evaluations/{evaluated['id']}": answers.EvaluationView,
        "/v1/models": answers.ListView[answers.ModelView],
        "/v1/datasets": answers.ListView[answers.DatasetView],
    }
    for path, view in promised.items():
        body = plane.get(path)
        parsed = TypeAdapter(view).validate_python(body)
        assert parsed.model_dump(mode="json") == body


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Bearer ", "Basic c2stdGVzdA==", "sk-test"])
def test_every_v1_route_wants_the_key_and_health_does_not(plane, header):
    plane.http.headers.pop("authorization")
    headers = {} if header is None else {"authorization": header}
    for path, operations in plane.http.app.openapi()["paths"].items():
        for method in operations:
            answer = plane.http.request(method, path, headers=headers, content=b"{}")
            assert answer.headers["x-request-id"]
            if path == "/v1/images/files/{file_name}":  # its signature takes the place of a key
                assert answer.status_code in (400, 403), method
            elif path.startswith("/v1"):
                assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key"), (
                    method,
                    path,
                )
            else:
                assert answer.status_code == 200, (method, path)
