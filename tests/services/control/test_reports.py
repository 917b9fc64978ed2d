"""Reports over the API: the page and the data of an evaluation, a job and a study, to their project alone."""

from __future__ import annotations

import json

import pytest

from dde_core.score_table import Prompt
from services.api.requests import CompareSettings
from services.evaluation.html import render
from services.evaluation.report import compare
from services.stages import layout
from services.storage import files
from tests.services.control import fakes
from tests.services.control.conftest import Plane
from tests.services.control.test_access import bearer, new_key
from tests.services.control.test_studies import body as study_body
from tests.services.control.test_studies import evaluate as evaluate_with_scores
from tests.support.score_tables import PROVENANCE, png, score_table

JOBS = "/v1/alignment/jobs"
EVALUATIONS = "/v1/evaluations"
STUDIES = "/v1/studies"


def evaluate(spec) -> fakes.RunState:
    """Leaves a real report, whose prompts are not friendly."""
    prompts = [Prompt(text, None) for text in ("<script>alert(1)</script> ü", "a red cross", "a blue cross")]
    table = score_table(num_images=2, prompts=prompts)
    report = compare(table, CompareSettings(resamples=1000), PROVENANCE)
    files.write_bytes(layout.page_uri(spec.output), render(report, png).encode())
    files.write_json(layout.report_uri(spec.output), report.model_dump(mode="json"))
    state = fakes.evaluate(spec)
    result = files.read_json(layout.done_uri(spec.prefix))
    files.write_json(layout.done_uri(spec.prefix), result | {"page": layout.page_uri(spec.output)})
    return state


def finished(plane: Plane, path: str) -> str:
    """The URL of something of this kind that has a report."""
    plane.launcher.plays["evaluate"] = evaluate if path != STUDIES else evaluate_with_scores
    sent = {JOBS: plane.job_body, EVALUATIONS: plane.evaluation_body, STUDIES: lambda: study_body(plane)}
    found = plane.post(path, sent[path]())
    for _ in range(20):
        plane.settle(20)
    return f"{path}/{found['id']}"


@pytest.mark.parametrize("path", [JOBS, EVALUATIONS, STUDIES])
def test_the_page_and_the_data_are_read_by_whoever_may_read_the_run(plane, path):
    url = finished(plane, path)
    page = plane.http.get(f"{url}/report")
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "sandbox" in policy
    assert "script-src" not in policy
    assert page.headers["x-content-type-options"] == "nosniff"
    assert "<script" not in page.text
    assert page.text.startswith("<!doctype html>")
    data = plane.http.get(f"{url}/report.json")
    assert data.headers["content-type"] == "application/json"
    if path == STUDIES:
        assert data.json()["study"] == url.rpartition("/")[2]
    else:
        assert data.json()["prompts"][0]["text"] == "<script>alert(1)</script> ü"
        assert "&lt;script&gt;" in page.text
    for suffix in ("report", "report.json"):
        own = bearer(new_key(plane, scopes=("generate",))["key"])
        assert plane.http.get(f"{url}/{suffix}", headers=own).status_code == 403
        other = bearer(new_key(plane, project="other")["key"])
        assert plane.http.get(f"{url}/{suffix}", headers=other).status_code == 404


@pytest.mark.parametrize("path", [JOBS, EVALUATIONS])
def test_a_run_without_a_report_says_why(plane, path):
    plane.launcher.plays["evaluate"] = fakes.runs
    found = plane.post(path, plane.job_body() if path == JOBS else plane.evaluation_body())
    error = plane.get(f"{path}/{found['id']}/report", 404)["error"]
    assert error["code"] == "report_not_found"
    assert "the report is written at its end" in error["message"]
    assert plane.get(f"{path}/nothing/report", 404)["error"]["code"].endswith("_not_found")


def test_a_report_that_is_not_there_any_more_is_named(plane):
    url = finished(plane, EVALUATIONS)
    uri = plane.get(url)["result"]["page"]
    files.delete_file(uri)
    error = plane.get(f"{url}/report", 404)["error"]
    assert f"{uri} was deleted" in error["message"]
    assert json.loads(plane.http.get(f"{url}/report.json").content)["models"]


def test_an_evaluation_of_an_earlier_version_has_the_data_alone(plane):
    plane.launcher.plays["evaluate"] = fakes.evaluate
    found = plane.post(EVALUATIONS, plane.evaluation_body())
    plane.settle(40)
    error = plane.get(f"{EVALUATIONS}/{found['id']}/report", 404)["error"]
    assert "the version that ran it wrote none" in error["message"]
