"""Requests read only what is allowed, and however they read, the API answers all others."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from functools import partial

import pyarrow as pa
import pytest

from dde_core.shapes import PROMPTS_FILE
from services.control.reading import reads_sources
from services.errors import BadRequest
from services.storage import sources
from tests.services.control.conftest import write_base, write_pairs

JOBS = "/v1/alignment/jobs"


@pytest.fixture
def held(plane):
    """A plane that may read one folder, and a dataset, a model and prompts outside of it."""
    plane.allowed = plane.root / "allowed"
    plane.allowed.mkdir()
    plane.dataset  # noqa: B018  # registered before
    outside = plane.root / "outside"
    outside.mkdir()
    write_pairs(outside / "pairs")
    write_base(outside / "base")
    (outside / "prompts.txt").write_text("top secret\nmore secrets\n")
    allow(plane, plane.allowed)
    return plane


def allow(plane, folder) -> None:
    """Let the requests of the plane read one folder alone."""
    state = plane.http.app.state
    state.settings = state.settings.model_copy(update={"allowed_sources": (str(folder),)})


def forbidden(plane, path: str, body: dict, param: str) -> None:
    error = plane.error(path, body, 403)
    assert (error["param"], error["code"], error["type"]) == (param, "source_not_allowed", "permission_error")
    assert "secret" not in error["message"]


def links_to(plane, name: str) -> list[str]:
    """The path outside, and a link to it inside."""
    link = plane.allowed / name
    link.symlink_to(plane.root / "outside" / name)
    return [str(plane.root / "outside" / name), str(link), link.as_uri()]


def test_prompts_outside_are_forbidden_for_jobs_validations_and_evaluations(held):
    inside = str(PROMPTS_FILE)
    for uri in links_to(held, "prompts.txt"):
        evaluation = {"prompts_uri": uri, "num_prompts": 2}
        forbidden(held, "/v1/evaluations", {"models": ["m", "n"], **evaluation}, "prompts_uri")
        forbidden(held, JOBS, held.job_body(evaluation=evaluation), "evaluation.prompts_uri")
        own = {"every": 50, "num_prompts": 1, "prompts_uri": uri}
        body = held.job_body(validation=own, evaluation={"prompts_uri": inside, "num_prompts": 3})
        body["training"]["steps"] = 50
        forbidden(held, JOBS, body, "validation.prompts_uri")


def test_datasets_and_models_outside_are_forbidden(held):
    for uri in links_to(held, "pairs"):
        forbidden(held, "/v1/datasets", {"name": "d", "uri": uri}, "uri")
        forbidden(held, "/v1/datasets/validate", {"uri": uri}, "uri")
    for uri in links_to(held, "base"):
        forbidden(held, "/v1/models", {"name": "other", "uri": uri}, "uri")


def test_a_file_of_a_dataset_that_links_to_the_outside_is_forbidden(held):
    folder = held.allowed / "linked"
    folder.mkdir()
    (folder / "0.parquet").symlink_to(held.root / "outside" / "pairs" / "0.parquet")
    forbidden(held, "/v1/datasets", {"name": "d", "uri": str(folder)}, "uri")


def test_an_image_that_links_to_the_outside_is_a_bad_row(held):
    write_pairs(
        held.allowed / "pairs",
        jpg_0=pa.array(["image.png"] * 10),
        jpg_1=pa.array(["image.png"] * 10),
    )
    (held.allowed / "pairs" / "image.png").symlink_to(held.root / "outside" / "prompts.txt")
    report = held.post("/v1/datasets/validate", {"uri": str(held.allowed / "pairs")})
    assert report["bad"].keys() == {"image_outside"}


def test_a_caption_that_links_to_the_outside_is_forbidden(held):
    for side in ("win", "lose"):
        (held.allowed / "folders" / side).mkdir(parents=True)
        (held.allowed / "folders" / side / "a.png").write_bytes(b"x")
    (held.allowed / "folders" / "win" / "a.txt").symlink_to(held.root / "outside" / "prompts.txt")
    forbidden(held, "/v1/datasets", {"name": "d", "uri": str(held.allowed / "folders")}, "uri")


def test_a_model_whose_config_links_to_the_outside_is_forbidden(held):
    write_base(held.allowed / "own")
    index = held.allowed / "own" / "model_index.json"
    index.unlink()
    index.symlink_to(held.root / "outside" / "prompts.txt")
    forbidden(held, "/v1/models", {"name": "other", "uri": str(held.allowed / "own")}, "uri")


def test_a_base_that_got_a_link_to_the_outside_since_is_forbidden_to_jobs(held):
    config = held.root / "base" / "unet" / "config.json"
    config.unlink()
    config.symlink_to(held.root / "outside" / "prompts.txt")
    allow(held, held.root / "base")
    evaluation = {"prompts_uri": str(PROMPTS_FILE), "num_prompts": 3}
    forbidden(held, JOBS, held.job_body(evaluation=evaluation), "model")


def test_a_job_carries_the_rules_to_its_stages(plane):
    plane.job()
    plane.settle()
    rules = {json.dumps(spec.sources.allowed) for spec in plane.launcher.specs.values()}
    of_its_own = [f"{plane.app_settings.storage_uri}/{name}" for name in ("pairs", "prompts")]
    assert rules == {json.dumps([*plane.settings.allowed_sources, *of_its_own])}


@pytest.mark.parametrize(
    ("uri", "status"), [("~nosuchuser/x", 404), ("x" * 300, 404), ("file:///a%00b", 400)]
)
def test_a_path_that_cannot_be_resolved_is_the_callers_mistake(plane, uri, status):
    evaluation = {"models": ["m", "n"], "prompts_uri": uri, "num_prompts": 2}
    assert plane.error("/v1/evaluations", evaluation, status)["param"] == "prompts_uri"
    assert plane.error("/v1/datasets/validate", {"uri": uri}, status)["param"] == "uri"
    for path in ("/v1/datasets", "/v1/models"):
        assert plane.error(path, {"name": "x", "uri": uri}, status)["param"] == "uri"


def test_pipes_and_devices_are_refused_at_once_and_the_api_still_answers(plane):
    os.mkfifo(plane.root / "pipe")
    started = time.monotonic()
    for uri in (str(plane.root / "pipe"), "/dev/zero", "/dev/stdin"):
        body = {"models": ["shapes", "rival"], "prompts_uri": uri, "num_prompts": 2}
        assert plane.error("/v1/evaluations", body)["code"] == "not_a_file"
        for path in ("/v1/datasets", "/v1/datasets/validate", "/v1/models"):
            named = {} if path.endswith("validate") else {"name": "x"}
            assert plane.error(path, {"uri": uri, **named})["param"] == "uri"
    assert time.monotonic() - started < 5


def test_prompts_of_any_size_are_refused_before_they_fill_the_memory(plane):
    with (plane.root / "huge.txt").open("wb") as file:
        file.truncate(1 << 40)
    body = {
        "models": ["shapes", "rival"],
        "prompts_uri": str(plane.root / "huge.txt"),
        "num_prompts": 2,
    }
    assert plane.error("/v1/evaluations", body)["code"] == "source_too_large"


def run(*calls):
    """The answers or errors of concurrent calls."""

    async def together():
        return await asyncio.gather(*(call() for call in calls), return_exceptions=True)

    return asyncio.run(together())


def test_a_reading_that_takes_too_long_is_refused_and_its_thread_left_to_itself(monkeypatch):
    monkeypatch.setattr("services.control.reading.GRACE_S", 0.05)
    released = threading.Event()

    @reads_sources(0.05)
    def stuck() -> None:
        released.wait(30)

    @reads_sources(0.05)
    def slow() -> None:
        while True:
            sources.check_time()

    errors = run(stuck, slow)
    released.set()
    assert [(type(error), error.code) for error in errors] == [(BadRequest, "read_timeout")] * 2


def test_a_request_that_reads_a_dataset_has_more_time():
    @reads_sources(0.05, lambda request: request == "dataset")
    def takes_a_while(request: str) -> str:
        until = time.monotonic() + 0.4
        while time.monotonic() < until:
            sources.check_time()
        return request

    answers = run(partial(takes_a_while, request="dataset"), partial(takes_a_while, request="prompts"))
    assert answers[0] == "dataset"
    assert answers[1].code == "read_timeout"


def test_requests_beyond_the_threads_wait_and_are_told_when_none_gets_free(monkeypatch):
    monkeypatch.setattr("services.control.reading.WAIT_S", 0.2)
    monkeypatch.setattr("services.control.reading.THREADS", 2)
    released = threading.Event()
    threading.Timer(1.0, released.set).start()

    @reads_sources(5)
    def waits() -> str:
        released.wait(30)
        return "read"

    answers = run(*[waits] * 4)
    assert answers.count("read") == 2
    assert [answer.status for answer in answers if answer != "read"] == [503, 503]
