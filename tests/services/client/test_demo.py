"""What the demo prepares and what it writes; tests/e2e runs all of it."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from dde_core.shapes import PAIRS_FILE, PROMPTS_FILE
from services.api.answers import JobView, parse
from services.api.images import ImageRequest
from services.api.records import EvaluateResult
from services.client import tables
from services.client.demo import copy_grid, evaluation_of, job_file_of, prepare, write_summary
from services.client.up import first_prompt, generate_command, register_base
from services.errors import ServiceError
from tests.services.client.conftest import EVALUATED, job, model


def test_the_demo_registers_what_is_shipped_and_fills_in_the_job(server, client) -> None:
    request = prepare(client, job_file_of("dde"))
    assert server.sent("POST", "/v1/models")[0][2]["name"] == request.model == "shapes"
    assert server.sent("POST", "/v1/datasets")[0][2]["uri"] == PAIRS_FILE.as_uri()
    assert (request.dataset, request.evaluation.prompts_uri) == ("new_1", PROMPTS_FILE.as_uri())


def test_the_base_model_is_registered_once(server, client) -> None:
    server.items["/v1/models"] = [model()]
    register_base(client)
    assert server.sent("POST", "/v1/models") == []


def test_a_job_that_did_not_succeed_is_an_error_with_its_reason() -> None:
    reason = {"code": "NonFiniteError", "message": "the loss is nan at step 3", "param": None}
    with pytest.raises(ServiceError, match="ajob_1 failed: the loss is nan at step 3"):
        evaluation_of(parse(JobView, job("failed", reason=reason)))
    with pytest.raises(ServiceError, match="ajob_1 cancelled"):
        evaluation_of(parse(JobView, job("cancelled")))


def test_the_summary_holds_every_number_of_the_tables(tmp_path) -> None:
    done = parse(JobView, job("succeeded", result={"evaluate": EVALUATED}))
    write_summary(tmp_path / "summary.json", done, evaluation_of(done), {"train": 20.5})
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["scores"] == {name: of_scorer["better"] for name, of_scorer in EVALUATED["scores"].items()}
    assert (summary["model"], summary["num_prompts"], summary["seconds"]) == ("better", 200, {"train": 20.5})


def test_the_grid_is_copied_from_storage(tmp_path) -> None:
    (tmp_path / "a folder").mkdir()
    source = tmp_path / "a folder" / "grid.png"
    source.write_bytes(b"picture")
    result = parse(
        JobView, job("succeeded", result={"evaluate": {**EVALUATED, "grid": source.as_uri()}})
    ).result.evaluate
    assert copy_grid(result, tmp_path) == tmp_path / "grid.png"
    assert (tmp_path / "grid.png").read_bytes() == b"picture"


def test_the_comparison_fits_eighty_columns_and_keeps_the_order_of_scorers() -> None:
    scores = dict.fromkeys(("fidelity", "match", "taste"), EVALUATED["scores"]["match"])
    scores = {name: {"shapes-aligned": each["better"]} for name, each in scores.items()}
    result = EvaluateResult.model_validate({**EVALUATED, "scores": scores})
    out = io.StringIO()
    Console(file=out, width=80).print(tables.comparison(result, "shapes-aligned"))
    lines = [line for line in out.getvalue().splitlines() if "[0.571, 0.703]" in line]
    assert [line.split()[0] for line in lines] == ["match", "taste", "fidelity"]
    assert all("+0.100 [+0.050, +0.150]" in line for line in lines)


def test_the_curl_line_carries_a_request_that_the_api_takes() -> None:
    body = generate_command("shapes-aligned", Path("state")).split(" -d '")[1].removesuffix("'")
    assert ImageRequest.model_validate_json(body).prompt == first_prompt() != ""
