"""`dde smoke` against a real control plane whose stages are played and whose Serve is a stand-in."""

from __future__ import annotations

import base64
import dataclasses
import io
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from PIL import Image
from pydantic import SecretStr
from typer.testing import CliRunner, Result

from dde_core.shapes.scenes import parse, render
from dde_core.shapes.scorers import score
from services.api.requests import PROJECT_HEADER
from services.artifacts import models
from services.client import smoke
from services.client.cli import app as cli
from services.client.processes import free_ports
from services.control import health
from services.control.app import build_app
from services.errors import NotFound, ServiceError
from services.settings import Settings
from services.stages import layout
from services.storage import files
from tests.services.control import fakes
from tests.services.control.conftest import KEY
from tests.services.control.test_streams import listening
from tests.support.open_sources import EVERYWHERE

SCENE = dataclasses.replace(parse(smoke.PROMPT), place="centre")
STAGES = ["encode", "train", "evaluate"]


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


@dataclass
class ServeStandIn:
    """Finds models in storage as Serve does, answers with a picture of the scene, and scores truly."""

    storage: str
    content: bytes = field(default_factory=lambda: png(render(SCENE)))

    def app(self) -> FastAPI:
        app = FastAPI()
        app.add_api_route("/v1/images/generations", self._draw, methods=["POST"])
        app.add_api_route("/v1/scores", self._score, methods=["POST"])
        app.add_api_route("/healthz", lambda: {"status": "ok"})
        return app

    async def _draw(self, request: Request) -> JSONResponse:
        body = await request.json()
        root = layout.project_root(self.storage, request.headers[PROJECT_HEADER])
        try:
            record = models.find(root, body["model"])
        except NotFound as error:
            return JSONResponse(error.body(), error.status)
        details = {"text_tokens": 1, "image_tokens": 0}
        usage = {"input_tokens": 1, "output_tokens": 0, "total_tokens": 1, "input_tokens_details": details}
        image = {"b64_json": base64.b64encode(self.content).decode(), "seed": 0}
        answer = {"created": 1, "data": [image], "output_format": "png", "size": "32x32"}
        names = {"model": body["model"], "model_id": record.id, "model_digest": record.digest}
        return JSONResponse({**answer, **names, "usage": usage | {"output_tokens_details": details}})

    async def _score(self, request: Request) -> dict[str, Any]:
        body = await request.json()
        opened = [Image.open(io.BytesIO(base64.b64decode(each))) for each in body["images"]]
        found = score(np.stack([np.asarray(each.convert("RGB")) for each in opened]), body["prompts"])
        return {"data": [{name: float(of[i]) for name, of in found.items()} for i in range(len(opened))]}


@dataclass
class Installation:
    """A control plane with its reconciler, over HTTP."""

    url: str
    storage: str
    launcher: fakes.FakeLauncher
    serve: ServeStandIn
    http: httpx.Client

    def smoke(self, *options: object, key: str = KEY) -> Result:
        arguments = ["smoke", "--base-url", self.url, *map(str, options)]
        return CliRunner().invoke(cli, arguments, env={"DDE_API_KEY": key, "COLUMNS": "200"})

    def key(self, *scopes: str, project: str = "probe") -> str:
        body = {"name": "smoke", "project": project, "scopes": list(scopes)}
        return str(self.http.post("/v1/keys", json=body).json()["key"])

    def resources(self, key: str = KEY) -> dict[str, list[str]]:
        """The names of what the key's project has."""
        headers = {"authorization": f"Bearer {key}"}
        answers = {path: self.http.get(path, headers=headers).json() for path in EMPTY}
        return {path: [each["name"] for each in answer["data"]] for path, answer in answers.items()}

    def await_parts(self, away: set[str]) -> None:
        """Wait until the control plane has noticed which parts are away."""
        while {name for name, check in self._checks().items() if not check["ok"]} != away:
            time.sleep(0.02)

    def _checks(self) -> dict[str, Any]:
        checks: dict[str, Any] = self.http.get("/readyz").json()["checks"]
        return checks

    def left(self) -> list[str]:
        """Files in storage but for what jobs share: encoded pairs, and the probe of readiness."""
        names = files.list_files(self.storage, recursive=True)
        return [
            name for name in names if not name.startswith(("datasets/", ".")) and "/datasets/" not in name
        ]


EMPTY: dict[str, list[str]] = {"/v1/datasets": [], "/v1/models": [], "/v1/alignment/jobs": []}


def evaluate(spec) -> fakes.RunState:
    files.write_json(layout.report_uri(spec.output), {"models": []})
    return fakes.evaluate(spec)


@pytest.fixture
def installed(tmp_path, monkeypatch) -> Iterator[Installation]:
    monkeypatch.setattr(smoke, "POLL_S", 0.05)
    monkeypatch.setattr(smoke, "SETTLE_S", 0.5)
    monkeypatch.setattr("services.client.api.LONGEST_PAUSE_S", 0.0)
    monkeypatch.setattr(health, "EVERY_S", dict.fromkeys(health.EVERY_S, 0.1))
    storage = files.as_uri(tmp_path / "store")
    serve = ServeStandIn(storage)
    launcher = fakes.FakeLauncher(evaluate=evaluate)
    with ExitStack() as stack:
        settings = Settings(
            api_key=SecretStr(KEY),
            storage_uri=storage,
            database_url=f"sqlite:///{tmp_path}/dde.db",
            serve_url=stack.enter_context(listening(serve.app())),
            poll_interval_s=0.02,
            allowed_sources=list(EVERYWHERE.allowed),
        )
        url = stack.enter_context(listening(build_app(settings, launcher)))
        headers = {"authorization": f"Bearer {KEY}"}
        http = stack.enter_context(httpx.Client(base_url=url, headers=headers, timeout=60, trust_env=False))
        installation = Installation(url, storage, launcher, serve, http)
        installation.await_parts(away=set())
        yield installation


def steps(result: Result) -> list[tuple[str, str]]:
    """Outcome and name of each line but the last."""
    return [tuple(line.split()[:2]) for line in result.stdout.splitlines() if line.endswith(" s]")]  # type: ignore[misc]


def test_a_run_reports_each_step_and_leaves_nothing_but_what_was_there(installed) -> None:
    key = installed.key("read", "submit", "generate")
    headers = {"authorization": f"Bearer {key}"}
    mine = {"name": "mine", "uri": "shapes://model"}
    assert installed.http.post("/v1/models", json=mine, headers=headers).status_code == 200
    there = installed.left()
    result = installed.smoke(key=key)
    assert result.exit_code == 0, result.output
    names = ["health", "key", "model", "dataset", "job", *STAGES, "report", "image", "clean-up"]
    assert steps(result) == [("ok", name) for name in names]
    assert result.stdout.splitlines()[-1] == f"{installed.url} works"
    assert installed.resources(key) == {**EMPTY, "/v1/models": ["mine"]}
    assert installed.left() == there != []
    assert [run.rsplit("-", 2)[1] for run in installed.launcher.submitted] == STAGES


@pytest.mark.parametrize("missing", ["read", "submit", "generate"])
def test_a_scope_that_the_key_lacks_is_named_before_anything_is_made(installed, missing: str) -> None:
    key = installed.key(*({"read", "submit", "generate"} - {missing}))
    result = installed.smoke(key=key)
    assert result.exit_code == 1
    assert steps(result) == [("ok", "health"), ("FAILED", "key")]
    needs = "it needs read, submit, generate"
    assert result.stderr == f"error: key: the key lacks the scope {missing}; {needs}\n"
    assert installed.launcher.submitted == []


def test_a_wrong_key_and_an_address_where_nothing_is_are_told_apart(installed) -> None:
    assert "error: key: missing or wrong API key" in installed.smoke(key="wrong").stderr
    installed.url = f"http://127.0.0.1:{free_ports(1)[0]}"
    result = installed.smoke()
    assert (result.exit_code, steps(result)) == (1, [("FAILED", "health")])
    assert f"{installed.url} does not answer" in result.stderr


def test_a_part_that_is_away_is_named(installed) -> None:
    installed.launcher.down = True
    installed.await_parts(away={"ray"})
    result = installed.smoke()
    assert (result.exit_code, steps(result)) == (1, [("FAILED", "health")])
    assert result.stderr.startswith("error: health: away: ray (")
    assert "Ray at http://nowhere does not answer" in result.stderr


@pytest.mark.parametrize("stage", ["train", "evaluate"])
def test_a_stage_that_fails_is_named_with_its_reason_and_all_is_deleted(installed, stage: str) -> None:
    installed.launcher.plays[stage] = fakes.fails
    result = installed.smoke()
    assert result.exit_code == 1
    assert ("FAILED", stage) in steps(result)
    assert result.stderr.startswith(f"error: {stage}: ajob_")
    assert "beta must be positive, got -1" in result.stderr
    assert steps(result)[-1] == ("ok", "clean-up")
    assert (installed.resources(), installed.left()) == (EMPTY, [])


def noise() -> bytes:
    return png(np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8))


def test_an_image_like_noise_fails_and_all_is_deleted(installed) -> None:
    installed.serve.content = noise()
    result = installed.smoke()
    assert result.exit_code == 1
    assert steps(result)[-2:] == [("FAILED", "image"), ("ok", "clean-up")]
    assert result.stderr.startswith("error: image: is like noise: match 0.")
    assert (installed.resources(), installed.left()) == (EMPTY, [])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (lambda: png(np.zeros((64, 32, 3), np.uint8)), "is 32x64 px, must be 32x32"),
        (lambda: png(render(SCENE))[:-40], "truncated"),
        (lambda: b"no picture", "cannot identify image file"),
    ],
    ids=["size", "cut off", "no image"],
)
def test_a_file_that_is_no_image_of_the_size_is_refused(content: Callable[[], bytes], reason: str) -> None:
    smoke.check_size(png(render(SCENE)))
    with pytest.raises((ServiceError, OSError), match=reason):
        smoke.check_size(content())


def test_a_run_that_takes_too_long_is_canceled_and_says_at_which_step(installed) -> None:
    def takes_long(spec) -> fakes.RunState:
        time.sleep(2 * smoke.POLL_S)  # so that the client has seen a stage
        os.kill(os.getpid(), signal.SIGALRM)  # the alarm of the time limit
        return fakes.runs(spec)

    installed.launcher.plays["train"] = takes_long
    result = installed.smoke("--timeout-s", 250)
    (failed,) = [name for outcome, name in steps(result) if outcome == "FAILED"]
    assert failed in STAGES
    assert (result.exit_code, result.stderr) == (1, f"error: {failed}: not done after 250 s\n")
    assert steps(result)[-1] == ("ok", "clean-up")
    assert (installed.resources(), installed.left()) == (EMPTY, [])


def test_a_time_limit_interrupts_what_waits_and_keeps_the_alarm_that_was_set_before() -> None:
    earlier = signal.getitimer(signal.ITIMER_REAL)[0]
    with pytest.raises(smoke.OutOfTime, match=r"not done after 0\.05 s"), smoke.limit(0.05):
        time.sleep(30)
    left = signal.getitimer(signal.ITIMER_REAL)[0]
    assert 0 < left < earlier if earlier else left == 0


def test_what_cannot_be_deleted_is_named(installed, monkeypatch) -> None:
    def refuse(client: object, dataset: str) -> None:
        raise NotFound(f"dataset {dataset} is away")

    monkeypatch.setattr("services.client.api.Client.delete_dataset", refuse)
    result = installed.smoke()
    assert result.exit_code == 1
    assert ("ok", "image") in steps(result)
    assert ("FAILED", "clean-up") in steps(result)
    (name,) = installed.resources()["/v1/datasets"]
    assert f"is away; delete what is called {name} by hand" in result.stderr
    assert installed.resources() == {**EMPTY, "/v1/datasets": [name]}
