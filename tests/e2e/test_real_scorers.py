"""A small model of Stable Diffusion's kind and its aligned version, compared by every kind of scorer."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from dde_core.shapes import PAIRS_FILE
from services.api.requests import AlignmentJobCreate, EvaluationCreate, ScorerCreate
from services.client.api import Client
from services.storage import files
from tests.support.scorers import write_tiny
from tests.support.tiny_folders import sd15_folder

OF_IMAGES = ("clip", "pickscore", "hps", "aesthetic", "imagereward")
KINDS = (*OF_IMAGES, "diversity", "drift")
SIDE_PX = 64


class Page(HTMLParser):
    """Collects what a page loads and its headings."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.headings: list[str] = []
        self._in_heading = False
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self._in_heading = tag in ("h1", "h2")
        self.loads += [value or "" for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        if self._in_heading:
            self.headings.append(data)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_model_and_its_aligned_version_are_compared_by_every_kind_of_scorer(client: Client, tmp_path: Path):
    folder = sd15_folder(tmp_path / "model")
    client.create_model("tiny", folder.as_uri())
    dataset = client.create_dataset("tiny-pairs", PAIRS_FILE.as_uri())
    for kind in KINDS:
        checkpoint, processor = write_tiny(kind, tmp_path / kind)
        body = {"name": f"tiny-{kind}", "kind": kind, "uri": checkpoint.as_uri()}
        if processor:
            body["processor"] = processor.as_uri()
        assert client.create_scorer(ScorerCreate.model_validate(body)).kind == kind
    rows = ["Prompt\tCategory", *(f"a {color} star on the {color} text {i}\t{color}" for i, color in
                                  enumerate(["red", "blue"] * 10))]  # fmt: skip
    prompts = tmp_path / "prompts.tsv"
    prompts.write_text("\n".join(rows) + "\n" + "a big red star " * 40 + "\tred\n")
    evaluation = {
        "prompts_uri": prompts.as_uri(),
        "num_prompts": 21,
        "images_per_prompt": 2,
        "scorers": [f"tiny-{kind}" for kind in KINDS],
        "sample": {"steps": 2, "height": SIDE_PX, "width": SIDE_PX},
    }
    job = client.wait(
        client.create_job(
            AlignmentJobCreate.model_validate_json(
                json.dumps(
                    {
                        "model": "tiny",
                        "dataset": dataset.id,
                        "name": "tiny-aligned",
                        "objective": {"method": "uniform"},
                        "training": {"steps": 2, "batch_size": 8},
                        "evaluation": evaluation,
                        "promote_if": {
                            "scorer": "tiny-pickscore",
                            "beat_ratio_low": 0.0,
                            "not_worse": ["tiny-clip"],
                        },
                    }
                )
            )
        ).id
    )
    assert job.status == "succeeded", job.reason
    assert job.result.gate is not None
    models = {model.version: model.aliases for model in client.models()}
    assert models[job.aligned_model] == (["production"] if job.result.gate.passed else [])

    third = sd15_folder(tmp_path / "third", prediction_type="v_prediction")
    client.create_model("third", third.as_uri())
    request = {"models": ["tiny", "tiny-aligned", "third"], **evaluation}
    compared = client.wait_evaluation(
        client.create_evaluation(EvaluationCreate.model_validate_json(json.dumps(request))).id
    )
    assert compared.status == "succeeded", compared.reason
    result = compared.result
    assert result.images_drawn == 21 * 2, "the job drew those of the other two"
    assert set(result.scores) == {f"tiny-{kind}" for kind in (*OF_IMAGES, "diversity")}
    assert (
        result.scores["tiny-clip"]["tiny-aligned"] == job.result.evaluate.scores["tiny-clip"]["tiny-aligned"]
    )
    assert set(result.drift["tiny-drift"]) == {"tiny-aligned", "third"}
    report = files.read_json(result.report)
    assert {row["category"] for row in report["categories"]} == {"red", "blue"}
    assert [row["is_truncated"] for row in report["prompts"]] == [False] * 20 + [True]
    assert len(report["strengths"]) == 3 * (len(OF_IMAGES) + 1)
    page = Page(files.read_bytes(result.page).decode())
    assert all(load.startswith(("data:image/", "#")) for load in page.loads)
    assert {"Drift from tiny", "Is a scorer gamed?"} <= {heading.strip() for heading in page.headings}
