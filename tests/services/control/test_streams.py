"""Events and pass-through over real sockets: the app under uvicorn, and a small server in Serve's place."""

from __future__ import annotations

import json
import threading
import time
from contextlib import ExitStack, contextmanager

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import SecretStr

from services.control.app import build_app
from services.settings import Settings
from services.storage import files
from tests.services.control import fakes
from tests.services.control.conftest import KEY, write_base, write_pairs

JOBS = "/v1/alignment/jobs"
IMAGE = {"model": "shapes", "prompt": "a red star"}


@contextmanager
def listening(app, **options):
    """The app's address on a free port. ``options`` are uvicorn's."""
    config = uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=1, **options)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def parse(text: str) -> list[tuple[str, str]]:
    """(id, message) of each server-sent event."""
    events = [
        dict(line.split(": ", 1) for line in block.splitlines())
        for block in text.split("\n\n")
        if "data: " in block
    ]
    return [(event["id"], json.loads(event["data"])["message"]) for event in events]


def test_a_stream_has_all_events_of_a_job_ends_with_it_and_resumes_after_the_last_id(tmp_path):
    launcher = fakes.FakeLauncher(train=fakes.runs)
    settings = Settings(
        api_key=SecretStr(KEY),
        storage_uri=files.as_uri(tmp_path / "store"),
        database_url=f"sqlite:///{tmp_path}/dde.db",
        poll_interval_s=0.02,
    )
    (tmp_path / "prompts.txt").write_text("a red circle\na blue cross\n")
    with (
        listening(build_app(settings, launcher)) as url,
        httpx.Client(base_url=url, headers={"authorization": f"Bearer {KEY}"}) as http,
    ):
        http.post(
            "/v1/models", json={"name": "shapes", "uri": write_base(tmp_path / "base")}
        ).raise_for_status()
        dataset = http.post(
            "/v1/datasets", json={"name": "d", "uri": write_pairs(tmp_path / "pairs")}
        ).json()["id"]
        evaluation = {"prompts_uri": str(tmp_path / "prompts.txt"), "num_prompts": 2}
        body = {
            "model": "shapes",
            "dataset": dataset,
            "training": {"batch_size": 2},
            "evaluation": evaluation,
        }
        job = http.post(JOBS, json=body).json()["id"]
        path, accept = f"{JOBS}/{job}/events", {"accept": "text/event-stream"}
        with http.stream("GET", path, headers=accept) as stream:
            assert stream.headers["content-type"].startswith("text/event-stream")
            live = ""
            for chunk in stream.iter_text():
                live += chunk
                if (
                    f"submitted {job}-train-a1" in live
                    and launcher.states.get(f"{job}-train-a1") == "running"
                ):
                    fakes.train(launcher.specs[f"{job}-train-a1"])
                    launcher.states[f"{job}-train-a1"] = "succeeded"
        events = parse(live)
        assert events[-1][1] == "evaluating -> succeeded: the job is done"
        page = http.get(path, params={"limit": 1000}).json()["data"]
        assert events == [(event["id"], event["message"]) for event in page]

        rest = http.get(path, headers={**accept, "last-event-id": events[-3][0]})
        assert parse(rest.text) == events[-2:]
        assert http.get(path, headers={**accept, "last-event-id": events[-1][0]}).status_code == 204
        assert http.get(path, headers={**accept, "last-event-id": "x"}).json()["error"]["param"] == "after"
        after = http.get(path, params={"after": events[1][0], "limit": 2}).json()
        assert ([event["id"] for event in after["data"]], after["has_more"]) == (
            [events[2][0], events[3][0]],
            True,
        )

        figures = http.get("/metrics").text
        assert 'dde_jobs{kind="alignment",status="succeeded"} 1.0' in figures
        assert 'dde_http_requests_total{method="POST",route="/v1/alignment/jobs",status="200"} 1.0' in figures
        assert 'route="/v1/alignment/jobs/{job_id}/events"' in figures


def test_a_revoked_key_ends_its_event_stream_with_an_error_and_no_other_keys_stream(plane):
    """The poll interval of this plane is one second."""
    job = plane.job()["id"]
    keys = [plane.post("/v1/keys", {"name": "k", "project": "default"}) for _ in range(2)]
    with listening(plane.http.app, lifespan="off") as url, ExitStack() as opened:
        streams = []
        for key in keys:
            headers = {"authorization": f"Bearer {key['key']}", "accept": "text/event-stream"}
            stream = httpx.stream("GET", f"{url}{JOBS}/{job}/events", headers=headers, timeout=5.0)
            streams.append(opened.enter_context(stream).iter_text())
        assert all("created: " in next(stream) for stream in streams)
        plane.post(f"/v1/keys/{keys[0]['id']}/revoke", None)
        revoked_at = time.monotonic()
        last = "".join(streams[0])
        assert time.monotonic() - revoked_at < 2 * plane.settings.poll_interval_s
        name, data = last.strip().split("\n")
        assert name == "event: error"
        assert json.loads(data.removeprefix("data: "))["error"]["code"] == "invalid_api_key"
        plane.post(f"{JOBS}/{job}/cancel", None)
        plane.settle()
        assert "cancelled" in "".join(streams[1])


@pytest.fixture
def serve():
    """In Serve's place: repeats what came, or fails as requested."""
    app = FastAPI()

    async def answer(request: Request):
        body = await request.json()
        if body.get("prompt") == "busy":
            return JSONResponse(
                {"error": {"message": "too many", "type": "x", "param": None, "code": "busy"}},
                429,
                {"retry-after": "3"},
            )
        if body.get("prompt") == "broken":
            return PlainTextResponse("Internal Server Error", 500)
        sent = request.headers
        own = {"id": sent["x-request-id"], "project": sent["x-dde-project"]}
        return {"path": request.url.path, "body": body, **own}

    app.add_api_route("/v1/images/generations", answer, methods=["POST"])
    app.add_api_route("/v1/scores", answer, methods=["POST"])
    with listening(app) as url:
        yield url


@pytest.fixture
def front(plane, serve):
    """A plane whose Serve answers."""
    plane.http.app.state.serve._base_url = httpx.URL(serve)
    return plane


def test_requests_for_pictures_and_scores_reach_serve_as_they_came(front):
    sent = {**IMAGE, "n": 2, "size": "64x32"}
    answer = front.http.post("/v1/images/generations", json=sent, headers={"x-request-id": "abc"})
    at = {"path": "/v1/images/generations", "id": "abc", "project": "default"}
    assert answer.json() == {**at, "body": sent}
    assert answer.headers["x-request-id"] == "abc"
    scores = {"images": ["aa"], "prompts": ["p"]}
    assert front.post("/v1/scores", scores)["body"] == scores


def test_serve_gets_the_project_of_the_key_whatever_the_caller_sends(front):
    key = front.post("/v1/keys", {"name": "k", "project": "team-a"})["key"]
    team = {"authorization": f"Bearer {key}", "x-dde-project": "default"}
    base = front.get("/v1/models/shapes")["uri"]
    front.post("/v1/models", {"name": "shapes", "uri": base}, headers=team)
    assert front.post("/v1/images/generations", IMAGE, headers=team)["project"] == "team-a"
    assert front.post("/v1/scores", {"images": ["aa"], "prompts": ["p"]}, headers=team)["project"] == "team-a"


def test_what_serve_refuses_keeps_its_status_and_body(front):
    answer = front.http.post("/v1/images/generations", json={**IMAGE, "prompt": "busy"})
    assert (answer.status_code, answer.headers["retry-after"], answer.json()["error"]["code"]) == (
        429,
        "3",
        "busy",
    )


def test_an_error_of_serves_proxy_is_put_into_our_shape_and_logged(front, caplog):
    answer = front.http.post("/v1/images/generations", json={**IMAGE, "prompt": "broken"})
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "retry"
    assert "Serve answered 500: Internal Server Error" in caplog.text


def test_serve_out_of_reach_is_a_503(plane):
    error = plane.error("/v1/images/generations", IMAGE, 503)
    assert error["code"] == "unavailable"
    assert error["message"].startswith("Serve does not answer:")


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        (
            "/v1/images/generations",
            {**IMAGE, "size": "64x63"},
            "size",
            "size: height must be a multiple of 8, got '64x63'",
        ),
        ("/v1/images/generations", {**IMAGE, "size": "big"}, "size", "size: String should match pattern"),
        (
            "/v1/images/generations",
            {**IMAGE, "n": 17},
            "n",
            "n: Input should be less than or equal to 16, got 17",
        ),
        (
            "/v1/images/generations",
            {**IMAGE, "prompt": ""},
            "prompt",
            "prompt: String should have at least 1 character",
        ),
        (
            "/v1/scores",
            {"images": ["a"], "prompts": ["p", "q"]},
            "prompts",
            "prompts: must be as many as the 1 images, got 2",
        ),
        ("/v1/scores", {"images": [], "prompts": []}, "images", "images: List should have at least 1 item"),
        (
            "/v1/scores",
            {"images": ["a"], "prompts": ["p"], "scorers": ["match", "match"]},
            "scorers",
            "scorers: must not repeat, got",
        ),
    ],
)
def test_requests_that_serve_would_refuse_do_not_reach_it(plane, path, body, param, message):
    error = plane.error(path, body)
    assert error["param"] == param
    assert error["message"].startswith(message)


def test_a_scorer_that_the_project_does_not_have_is_a_404_that_names_it(plane):
    body = {"images": ["a"], "prompts": ["p"], "scorers": ["match", "clip"]}
    error = plane.error("/v1/scores", body, 404)
    assert (error["param"], error["code"]) == ("scorers.1", "scorer_not_found")
    assert error["message"] == 'scorers.1: scorer "clip" does not exist'
