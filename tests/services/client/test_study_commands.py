"""`dde study`: the file as a request, what is refused before anything is sent, and what is printed."""

from __future__ import annotations

import json
import math
from collections import deque
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from services.client.cli import app
from tests.services.client.conftest import KEY, event, study

ROOT = Path(__file__).parents[3]
SHIPPED = sorted((ROOT / "deploy" / "studies").glob("*.yaml"))
FILE = """
name: paper
base:
  model: shapes
  dataset: ds_1
  training: {learning_rate: 5.0e-5}
  evaluation: {prompts_uri: prompts.txt}
grid:
  objective.method: [dde, sft]
  training.lora: [null, {rank: 4}]
  evaluation.prompts_uri: [a.txt, s3://bucket/b.txt]
evaluation: {prompts_uri: prompts.txt, num_prompts: 3}
"""
INTERVAL = {"value": 0.02, "low": 0.01, "high": 0.03}
RESULT = {
    "report": "file:///r.json",
    "page": "file:///r.html",
    "base_scores": {"taste": 0.5},
    "settings": [
        {
            "setting": "dde",
            "overrides": {},
            "cells": 2,
            "models": 1,
            "scores": {"taste": 0.52},
            "seconds": {"train": 60.0, "evaluate": 5.5},
            "images": 40,
        }
    ],
    "contrasts": [
        {
            "scorer": "taste",
            "setting": "dde",
            "against": None,
            "seeds": 2,
            "prompts": 200,
            "difference": INTERVAL,
            "by": "t",
            "p": 0.01,
            "adjusted_p": 0.02,
        }
    ],
    "seconds": 30.0,
    "images": 600,
}


@pytest.fixture
def dde(server, tmp_path, monkeypatch):
    """Run the command in a folder of its own; returns its result."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("services.client.study_commands.POLL_S", 0.01)

    def run(*arguments):
        environment = {"DDE_URL": server.url, "DDE_API_KEY": KEY, "COLUMNS": "200"}
        return CliRunner().invoke(app, ["study", *map(str, arguments)], env=environment)

    return run


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "study.yaml"
    path.write_text(FILE)
    return path


def sent(server) -> dict:
    ((_, _, body),) = server.sent("POST", "/v1/studies")
    return body


def test_a_yaml_file_becomes_the_request_and_every_path_of_prompts_a_uri(server, dde, file, tmp_path):
    result = dde("run", file)
    assert (result.exit_code, result.stdout) == (0, "new_1\n"), result.stderr
    body = sent(server)
    uri = (tmp_path / "prompts.txt").as_uri()
    assert body["base"]["evaluation"] == {"prompts_uri": uri}
    assert body["evaluation"]["prompts_uri"] == uri
    assert body["grid"]["evaluation.prompts_uri"] == [(tmp_path / "a.txt").as_uri(), "s3://bucket/b.txt"]
    assert body["grid"]["training.lora"] == [None, {"rank": 4}]
    assert body["base"]["training"] == {"learning_rate": 5e-5}


def test_options_override_the_file(server, dde, file, tmp_path):
    arguments = ("--model", "m", "--dataset", "ds_2", "--prompts", "p.txt")
    assert dde("run", file, *arguments).exit_code == 0
    body = sent(server)
    assert (body["base"]["model"], body["base"]["dataset"]) == ("m", "ds_2")
    assert body["evaluation"]["prompts_uri"] == (tmp_path / "p.txt").as_uri()
    assert body["base"]["evaluation"]["prompts_uri"] == (tmp_path / "p.txt").as_uri()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [", "is neither JSON nor YAML"),
        ("- a\n- b", "must hold an object, got list"),
        ("name: a\nbase: 3\nevaluation: {prompts_uri: p}", "base: must be an object, got 3"),
        ("name: a\nbase: {since: 2026-01-01}\nevaluation: {prompts_uri: p}", "not JSON serializable"),
        ("name: a\nbase: {x: .nan}\nevaluation: {prompts_uri: p}", "not JSON"),
        (
            "name: a\nbase: {}\ngrid: {a: []}\nevaluation: {prompts_uri: p}",
            "grid.a: List should have at least 1",
        ),
        ("name: a\nbase: {}\ngird: {a: [1]}\nevaluation: {prompts_uri: p}", "gird: Extra inputs"),
        ("name: a/b\nbase: {}\nevaluation: {prompts_uri: p}", "name: String should match pattern"),
        ("name: a\nbase: {}\nparallel: 0\nevaluation: {prompts_uri: p}", "parallel: Input should be greater"),
        ("name: a\nbase: {}", "evaluation.prompts_uri: Field required"),
        (
            "name: a\nbase: {}\ngrid: {'A b': [1]}\nevaluation: {prompts_uri: p}",
            "String should match pattern",
        ),
    ],
)
def test_a_wrong_file_is_one_line_that_names_the_field_and_nothing_is_sent(
    server, dde, tmp_path, text, message
):
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    result = dde("run", path)
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert server.requests == []


def test_a_refusal_of_the_server_names_the_cell_and_its_field(server, dde, file):
    server.fail(400, "cell dde: objective.bta: unexpected, got 1", param="cells.dde.objective.bta")
    result = dde("run", file)
    assert result.exit_code == 1
    assert "cells.dde.objective.bta" in result.stderr
    assert "cell dde: objective.bta" in result.stderr


def test_a_dry_run_lists_the_cells_and_sends_nothing(server, dde, file):
    result = dde("run", file, "--dry-run")
    lines = [line.split("\t") for line in result.stdout.splitlines()]
    assert len(lines) == 1 + 8, result.stderr
    assert [line[0] for line in lines[1:3]] == ["dde-lora-null-prompts_uri1", "dde-lora-null-prompts_uri2"]
    assert {line[2] for line in lines[1:]} == {f"paper-{line[0]}" for line in lines[1:]}
    assert server.requests == []


def test_a_cell_that_is_no_job_is_named_by_a_dry_run(dde, file):
    file.write_text(FILE.replace("[dde, sft]", "[dde, dpo]"))
    result = dde("run", file, "--dry-run")
    assert result.exit_code == 1
    assert "error: cell dpo-" in result.stderr
    assert "objective.method" in result.stderr


def test_following_prints_events_until_the_end_and_then_the_findings(server, dde, file):
    server.single["/v1/studies/new_1"] = deque(
        [study(id="new_1"), study("succeeded", id="new_1", result=RESULT)]
    )
    server.items["/v1/studies/new_1/events"] = [event(1, "cell dde-seed0: ajob_1"), event(2, "done")]
    result = dde("run", file, "--follow")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("cell dde-seed0: ajob_1") == 1
    for part in ("dde - base", "+0.020 [+0.010, +0.030]", "0.520", "1/2", "file:///r.html"):
        assert part in result.stdout


def test_following_a_study_that_fails_has_exit_code_1(server, dde, file):
    reason = {"code": "no_cell_succeeded", "message": "none of 2 cells succeeded", "param": None}
    server.single["/v1/studies/new_1"] = deque([study("failed", reason=reason)])
    result = dde("run", file, "--follow")
    assert result.exit_code == 1
    assert "none of 2 cells succeeded" in result.stderr


def test_show_list_cancel_and_resume(server, dde):
    single = deque([study("succeeded", result=RESULT)])
    server.single["/v1/studies/study_1"] = single
    shown = dde("show", "study_1").stdout
    assert "paper: study_1 succeeded" in shown
    assert "dde-seed1" in shown
    server.items["/v1/studies"] = [study()]
    assert "2 waiting" in dde("list").stdout
    server.single["/v1/studies/study_1/cancel"] = deque([study("cancelled")])
    assert dde("cancel", "study_1").stdout == "cancelled\n"
    server.single["/v1/studies/study_1/resume"] = deque([study("evaluating")])
    assert dde("resume", "study_1").stdout == "evaluating\n"
    assert server.sent("POST", "/v1/studies/study_1/resume")[0][2] is None


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_study_is_valid(dde, path):
    result = dde("run", path, "--dataset", "ds_1", "--prompts", "prompts.txt", "--dry-run")
    assert result.exit_code == 0, result.stderr
    content = yaml.safe_load(path.read_text())
    lines = result.stdout.splitlines()[1:]
    grid = content.get("grid", {})
    assert len(lines) == (math.prod(map(len, grid.values())) if grid else 0) + len(content.get("cells", []))
    overrides = [json.loads(line.split("\t")[3]) for line in lines]
    assert {each["objective.method"] for each in overrides if grid} == set(grid.get("objective.method", []))
    assert len(SHIPPED) > 1
