"""The SDK against a real HTTP server."""

from __future__ import annotations

import json
import pickle
import threading
import time
from collections import deque

import pytest
from fastapi.responses import PlainTextResponse

from dde_core.config import ObjectiveConfig, SampleConfig
from services.api.images import ImageRequest, ScoreRequest
from services.api.requests import AlignmentJobCreate, EvaluationConfig, KeyCreate, ScorerCreate
from services.client.api import ApiError, Client
from services.client.processes import free_ports
from services.errors import BadRequest, ServiceError, Unavailable
from tests.services.client.conftest import dataset, event, job, metric, scorer

REQUEST = AlignmentJobCreate(
    model="shapes",
    dataset="ds_1",
    objective=ObjectiveConfig(beta=2000.0),
    evaluation=EvaluationConfig(prompts_uri="file:///p", sample=SampleConfig(steps=20, guidance_scale=3.0)),
)


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_request_is_retried_until_it_succeeds(server, client, status) -> None:
    server.fail(status, "not now")
    server.fail(status, "not now")
    assert client.create_model("shapes", "file:///m").name == "shapes"
    assert len(server.sent("POST", "/v1/models")) == 3


def test_all_tries_of_a_create_carry_one_idempotency_key_and_another_create_a_new_one(server, client) -> None:
    server.fail(503, "not now")
    server.fail(503, "not now")
    client.create_model("a", "file:///a")
    client.create_model("a", "file:///a")
    keys = [headers["idempotency-key"] for headers, _, _ in server.sent("POST", "/v1/models")]
    assert len(keys) == 4
    assert keys[0] == keys[1] == keys[2] != keys[3]
    assert len(keys[0]) >= 32


def test_the_registration_of_a_dataset_has_no_timeout_and_is_not_retried(
    server,
) -> None:
    server.pauses.append(0.6)
    with Client(server.url, "dde-test-key", timeout_s=0.2) as client:
        assert client.create_dataset("a", "file:///a").name == "a"
        server.fail(503, "not now")
        with pytest.raises(ApiError, match="not now"):
            client.create_dataset("a", "file:///a")
    assert len(server.sent("POST", "/v1/datasets")) == 2


def test_a_get_carries_no_idempotency_key(server, client) -> None:
    assert list(client.datasets()) == []
    assert "idempotency-key" not in server.sent("GET", "/v1/datasets")[0][0]


@pytest.mark.parametrize("status", [400, 401, 404, 409, 422])
def test_the_callers_mistake_is_not_retried(server, client, status) -> None:
    server.fail(status, "wrong")
    with pytest.raises(ApiError) as caught:
        client.create_model("shapes", "file:///m")
    assert caught.value.status == status
    assert len(server.requests) == 1


def test_an_error_body_becomes_an_error_with_message_param_and_code(server, client) -> None:
    server.fail(400, "steps must be greater than 0, got -1", param="training.steps", code="invalid_value")
    with pytest.raises(ApiError, match="got -1") as caught:
        client.create_job(REQUEST)
    error = caught.value
    assert (error.status, error.param, error.code) == (400, "training.steps", "invalid_value")
    assert isinstance(error, ServiceError)


def test_an_error_that_is_not_of_the_api_keeps_status_and_text(server, client) -> None:
    server.failures.append(PlainTextResponse("<html>too large</html>", 413))
    with pytest.raises(ApiError, match="HTTP 413: <html>too large") as caught:
        client.create_model("shapes", "file:///m")
    assert caught.value.status == 413


def test_an_api_error_survives_pickling() -> None:
    error = ApiError(429, "slow down", "model", "rate_limit", 2.0)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is ApiError
    assert vars(again) == vars(error)
    assert (str(again), again.status, again.retry_after_s) == ("slow down", 429, 2.0)


def test_the_last_error_is_raised_after_the_last_try(server, client) -> None:
    for number in range(4):
        server.fail(503, f"not now {number}")
    with pytest.raises(ApiError, match="not now 3"):
        client.model("model_1")
    assert len(server.requests) == 4


def test_retry_after_sets_the_pause(server, client) -> None:
    server.fail(429, "slow down", retry_after="1")
    began = time.monotonic()
    client.create_model("shapes", "file:///m")
    assert time.monotonic() - began >= 1.0


def test_a_server_that_comes_up_late_is_reached(server) -> None:
    late = type(server)()
    timer = threading.Timer(0.3, late.start)
    timer.start()
    try:
        with Client(late.url, "dde-test-key", retries=10) as client:
            assert list(client.models()) == []
    finally:
        timer.join()
        late.stop()


def test_an_unreachable_server_is_named() -> None:
    url = f"http://127.0.0.1:{free_ports(1)[0]}"
    with Client(url, "k", retries=1) as client, pytest.raises(Unavailable, match=url):
        client.job("ajob_1")


def test_a_wrong_key_is_reported(server) -> None:
    with Client(server.url, "other") as client, pytest.raises(ApiError, match="no such key") as caught:
        list(client.models())
    assert (caught.value.status, caught.value.code) == (401, "invalid_api_key")


def test_a_list_is_read_page_by_page(server, client) -> None:
    server.items["/v1/datasets"] = [dataset(id=f"ds_{number}") for number in range(250)]
    found = list(client.datasets())
    assert [each.id for each in found] == [f"ds_{number}" for number in range(250)]
    assert found[3].counts.pairs == 8
    assert [query.get("after") for _, query, _ in server.sent("GET", "/v1/datasets")] == [
        None,
        "ds_99",
        "ds_199",
    ]


def test_events_and_metrics_continue_after_the_cursor(server, client) -> None:
    events = [event(n, str(n)) for n in range(120)]
    rows = [metric(stage, n, n, {"loss": 0.5}) for n in range(120) for stage in ("encode", "train")]
    server.items |= {"/v1/alignment/jobs/ajob_1/events": events, "/v1/alignment/jobs/ajob_1/metrics": rows}
    assert [event.message for event in client.events("ajob_1", "event_7")] == [str(n) for n in range(8, 120)]
    read = list(client.metrics("ajob_1", "train", 10))
    assert [(row.stage, row.step) for row in read] == [("train", n) for n in range(11, 120)]


def test_a_job_is_posted_as_it_was_written(server, client) -> None:
    client.create_job(REQUEST)
    ((_, _, body),) = server.sent("POST", "/v1/alignment/jobs")
    assert AlignmentJobCreate.model_validate_json(json.dumps(body)) == REQUEST
    assert body["objective"]["beta"] == 2000.0
    assert "name" not in body


def test_waiting_ends_with_the_job(server, client) -> None:
    server.single["/v1/alignment/jobs/ajob_1"] = server_jobs("queued", "running", "failed")
    ended = client.wait("ajob_1", poll_s=0.01)
    assert (ended.status, ended.finished) == ("failed", True)
    assert len(server.requests) == 3


def test_waiting_has_a_deadline(server, client) -> None:
    server.single["/v1/alignment/jobs/ajob_1"] = server_jobs("running")
    with pytest.raises(TimeoutError, match=r"ajob_1 is still running after 0\.1 s"):
        client.wait("ajob_1", timeout_s=0.1, poll_s=0.02)


def test_the_creation_of_a_key_is_not_retried_since_its_secret_is_answered_once(server, client) -> None:
    server.fail(503, "starting")
    with pytest.raises(ApiError):
        client.create_key(KeyCreate(name="ci"))
    assert len(server.requests) == 1
    assert client.create_key(KeyCreate(name="ci", project="team-a")).key == "dde_secret"


def test_images_are_bytes(server, client) -> None:
    answer = client.generate(ImageRequest(model="shapes", prompt="a red star", n=2, seed=7))
    assert [image.seed for image in answer.data] == [7, 8]
    assert answer.data[0].content.startswith(b"\x89PNG")
    ((_, _, body),) = server.sent("POST", "/v1/images/generations")
    assert (body["seed"], body["n"], body["prompt"]) == (7, 2, "a red star")


def test_an_image_request_that_cannot_be_answered_is_refused_before_it_is_sent(server, client) -> None:
    with pytest.raises(BadRequest, match="stream: this client takes whole answers"):
        client.generate(ImageRequest(model="shapes", prompt="a red star", stream=True))
    with pytest.raises(BadRequest, match="size: height must be a multiple of 8, got '32x30'"):
        client.generate(ImageRequest(model="shapes", prompt="a red star", size="32x30"))
    assert server.sent("POST", "/v1/images/generations") == []


def test_scores_are_rows(server, client) -> None:
    server.single["/v1/scores"] = deque([{"data": [{"match": 0.5}]}])
    assert client.scores(ScoreRequest(images=["x"], prompts=["y"], scorers=["match"])) == [{"match": 0.5}]


def test_scorers_are_registered_once_and_found_by_name(server, client) -> None:
    server.fail(503, "starting")
    request = ScorerCreate(name="pick", kind="pickscore", uri="file:///c")
    with pytest.raises(ApiError):
        client.create_scorer(request)
    assert len(server.requests) == 1
    assert client.create_scorer(request).kind == "pickscore"
    server.single["/v1/scorers/pick"] = deque([scorer()])
    assert client.scorer("pick").scale == "cosine, -1 to 1"
    server.items["/v1/scorers"] = [scorer(id=f"scorer_{i}") for i in range(150)]
    assert [each.id for each in client.scorers()] == [f"scorer_{i}" for i in range(150)]


def test_ready_tries_once_and_does_not_raise(server, client) -> None:
    server.fail(503, "starting")
    assert not client.ready()
    checks = {"database": {"ok": True, "detail": None}, "ray": {"ok": False, "detail": "refused"}}
    report = {"status": "ready", "draining": False, "checks": checks}
    server.single["/readyz"] = deque([report, report, {**report, "checks": {"ray": checks["database"]}}])
    assert client.ready()
    assert not client.complete(), "Ray is away"
    assert client.complete()
    assert len(server.requests) == 4


def server_jobs(*statuses: str) -> deque[dict]:
    return deque(job(status) for status in statuses)
