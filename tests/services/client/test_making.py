"""``dde datasets generate`` and ``relabel``: what is sent, and what is reported of the run."""

from __future__ import annotations

from collections import deque
from pathlib import Path

import pytest

from services.client import dataset_commands
from services.client.dataset_commands import weights_of
from services.errors import BadRequest
from tests.services.client import conftest
from tests.services.client.test_cli import the_body

EXAMPLE = {"row": "0.parquet:0:0", "chosen": "jpg_0", "rejected": "jpg_1", "caption": "a red cross"}
COUNTS = {"rows": 8, "pairs": 8, "ties": 0, "missing": 0}
RESULT = {
    "digest": "d", "counts": COUNTS, "example": EXAMPLE, "prompts": 10, "images": 40, "ties": 1,
    "prompts_without_pair": 2, "spreads": {"taste": 0.125}, "seconds": 1.0,
}  # fmt: skip
REASON = {"code": "data_error", "message": "no pair is left of 10", "param": None}


def making(**other) -> dict:
    """A dataset that a run makes."""
    unknown = {"digest": None, "counts": None, "job": "djob_1", "status": "generating"}
    return conftest.dataset(**{"id": "new_1", **unknown, **other})


def ready(**result) -> dict:
    return making(status="ready", digest="d", counts=COUNTS, example=EXAMPLE, result=RESULT | result)


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    monkeypatch.setattr(dataset_commands, "POLL_S", 0.01)


@pytest.fixture
def run(server) -> deque[dict]:
    """What the server answers about the dataset, one after another."""
    answers: deque[dict] = deque([making(), ready()])
    server.single["/v1/datasets/new_1"] = answers
    server.items["/v1/datasets/new_1/events"] = [conftest.event(1, "created: ..."), conftest.event(2, "done")]
    return answers


GENERATE = ("datasets", "generate", "drawn", "--model", "shapes", "--prompts", "s3://b/p.txt")


def test_a_dataset_is_drawn_and_told_of_when_it_is_ready(server, dde, run) -> None:
    result = dde(*GENERATE, "--num-prompts", "10", "--scorer", "taste", "--scorer", "fidelity=0.5",
                 "--keep", "all_pairs", "--margin", "0.2", "--seed", "7", "--steps", "20")  # fmt: skip
    assert (result.exit_code, result.stdout) == (0, "new_1\n")
    assert the_body(server, "/v1/datasets") == {
        "name": "drawn",
        "columns": {},
        "generate": {
            "model": "shapes",
            "prompts_uri": "s3://b/p.txt",
            "num_prompts": 10,
            "images_per_prompt": 4,
            "scorers": {"taste": 1.0, "fidelity": 0.5},
            "keep": "all_pairs",
            "margin": 0.2,
            "seed": 7,
            "sample": {"sampler": "ddim", "steps": 20, "guidance_scale": 5.0, "height": 0, "width": 0},
        },
    }
    assert result.stderr.splitlines() == [
        "created: ...",
        "done",
        "8 rows: 8 pairs, 0 ties, 0 without a label",
        'for example jpg_0 is preferred to jpg_1 for "a red cross" (0.parquet:0:0)',
        "40 images scored, 1 ties dropped; spreads: taste 0.125; 2 of 10 prompts have no pair",
    ]


def test_without_waiting_the_id_is_all_that_is_printed(server, dde) -> None:
    result = dde(*GENERATE, "--num-prompts", "10", "--scorer", "taste", "--no-wait")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "new_1\n", "")
    assert [path for _, path, *_ in server.requests] == ["/v1/datasets"]


def test_a_relabeling_tells_how_often_the_scorer_agrees(server, dde, run) -> None:
    run[1] = ready(agreement=0.75, bad={"image_missing": 2})
    result = dde("datasets", "relabel", "labeled", "ds_1", "--scorer", "match", "--margin", "0.1")
    assert the_body(server, "/v1/datasets") == {
        "name": "labeled",
        "columns": {},
        "relabel": {"dataset": "ds_1", "scorer": "match", "margin": 0.1, "background": "white"},
    }
    assert result.stderr.splitlines()[-1] == (
        "40 images scored, 1 ties dropped; spreads: taste 0.125; agrees with the former labels on 75.0%; "
        "2 cannot be used"
    )


def test_a_run_that_fails_ends_the_command_with_its_reason(dde, run) -> None:
    run[1] = making(status="failed", reason=REASON)
    result = dde(*GENERATE, "--num-prompts", "10", "--scorer", "taste")
    assert (result.exit_code, result.stdout) == (1, "new_1\n")
    assert result.stderr.splitlines()[-1] == "error: new_1 failed: no pair is left of 10"


def test_a_list_shows_what_is_not_ready(server, dde) -> None:
    server.items["/v1/datasets"] = [making(), ready()]
    rows = [line.split("\t") for line in dde("datasets", "list").stdout.splitlines()]
    assert [row[2] for row in rows] == ["pairs", "generating", "8"]


def test_making_a_dataset_is_cancelled_by_its_id(server, dde) -> None:
    server.single["/v1/datasets/ds_1/cancel"] = deque([making()])
    assert dde("datasets", "cancel", "ds_1").stdout == "generating\n"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--num-prompts", "0", "--scorer", "taste"), "num_prompts: Input should be greater than or equal"),
        (("--num-prompts", "5", "--scorer", "taste=x"), "--scorer must be NAME or NAME=WEIGHT"),
        (("--num-prompts", "5", "--scorer", "taste", "--keep", "best"), "keep: Input should be 'best_worst'"),
        (("--num-prompts", "5", "--scorer", "taste=-1"), "scorers.taste: Input should be greater than 0"),
        (("--num-prompts", "5", "--scorer", "taste", "--images-per-prompt", "1"), "images_per_prompt: Input"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_sent(server, dde, options, words) -> None:
    result = dde(*GENERATE, *options)
    assert result.exit_code == 1
    assert words in result.stderr
    assert server.requests == []


def test_weights_have_one_number_a_scorer() -> None:
    assert weights_of(["taste", "match=0.25"]) == {"taste": 1.0, "match": 0.25}
    with pytest.raises(BadRequest, match="taste is given twice"):
        weights_of(["taste", "taste=2"])


def test_prompts_are_named_by_path(server, dde, run, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    options = ("--prompts", str(path), "--num-prompts", "5", "--scorer", "taste", "--no-wait")
    assert dde("datasets", "generate", "drawn", "--model", "shapes", *options).exit_code == 0
    assert the_body(server, "/v1/datasets")["generate"]["prompts_uri"] == path.as_uri()
