"""Jobs of on-policy methods over HTTP: prompts and a scorer in, an aligned and served model out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dde_core.shapes import MODEL_DIR, PAIRS_FILE, PROMPTS_FILE
from services.api.answers import JobView
from services.api.images import ImageRequest
from services.api.requests import AlignmentJobCreate, ScorerCreate
from services.client.api import Client
from tests.support.scorers import write_tiny
from tests.support.tiny_folders import sdxl_folder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
SIDE_PX = 64
SHAPES = {"method": "tailorpo", "beta": 100, "guidance_scale": 3, "t_min": 752, "t_max": 902}


def run(client: Client, body: dict[str, Any]) -> JobView:
    job = client.wait(client.create_job(AlignmentJobCreate.model_validate_json(json.dumps(body))).id)
    for event in client.events(job.id):
        print(event.message)
    return job


@pytest.fixture(scope="module")
def shapes(client: Client) -> str:
    client.create_model("shapes-on-policy", MODEL_DIR.as_uri())
    return "shapes-on-policy"


def shapes_job(model: str, dataset: str, **more: Any) -> dict[str, Any]:
    return {
        "model": model,
        "objective": SHAPES | more.pop("objective", {}),
        "rollouts": {
            "prompts_uri": f"captions:{dataset}",
            "num_prompts": 40,
            "scorers": {"taste": 1.0},
            "prompts_per_round": 8,
            "prompts_per_call": 4,
        }
        | more.pop("rollouts", {}),
        "training": {"steps": 3, "batch_size": 12, "learning_rate": 2e-5} | more.pop("training", {}),
        "evaluation": {
            "prompts_uri": PROMPTS_FILE.as_uri(),
            "num_prompts": 8,
            "sample": {"steps": 4, "guidance_scale": 3},
        },
        **more,
    }


@pytest.fixture(scope="module")
def dataset(client: Client) -> str:
    return client.create_dataset("captions-on-policy", PAIRS_FILE.as_uri()).id


@pytest.mark.parametrize("method", ["tailorpo", "tailorpo_g"])
def test_a_scorer_alone_aligns_evaluates_and_serves_a_model(
    client: Client, shapes: str, dataset: str, method: str
):
    job = run(
        client, shapes_job(shapes, dataset, name=method.replace("_", "-"), objective={"method": method})
    )
    assert job.status == "succeeded", job.reason
    assert job.dataset is None
    assert job.result.encode is None
    rows = list(client.metrics(job.id, "train"))
    rounds = [row.metrics["round"] for row in rows if "round" in row.metrics]
    assert rounds == [0, 1, 2]
    assert rows[0].metrics["rollout_images"] == 8 * 4 * 2
    assert job.result.train is not None
    lineage = job.result.train.model.lineage
    assert lineage["objective"]["method"] == method
    assert lineage["rollouts"]["scorers"] == {"taste": 1.0}
    assert "our reading" in lineage["conventions"]["candidates"]
    answer = client.generate(ImageRequest(model=job.name, prompt="a red circle", steps=4))
    assert answer.data[0].content.startswith(b"\x89PNG")


def test_adapters_of_an_sdxl_kind_follow_a_scorer_on_a_checkpoint(client: Client, tmp_path: Path):
    client.create_model("tiny-xl", sdxl_folder(tmp_path / "model").as_uri())
    checkpoint, processor = write_tiny("pickscore", tmp_path / "pickscore")
    body = {"name": "tiny-pick", "kind": "pickscore", "uri": checkpoint.as_uri()}
    if processor:
        body["processor"] = processor.as_uri()
    client.create_scorer(ScorerCreate.model_validate(body))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"a red star number {i}" for i in range(20)))
    held = tmp_path / "held.txt"
    held.write_text("\n".join(f"a blue star number {i}" for i in range(6)))
    job = run(
        client,
        {
            "model": "tiny-xl",
            "name": "tiny-xl-aligned",
            "objective": {"method": "tailorpo_g", "beta": 10, "transitions": 5, "guidance_strength": 0.2},
            "rollouts": {
                "prompts_uri": prompts.as_uri(),
                "num_prompts": 20,
                "scorers": {"tiny-pick": 1.0},
                "prompts_per_round": 4,
                "prompts_per_call": 2,
                "updates_per_round": 2,
            },
            "training": {
                "steps": 4,
                "batch_size": 4,
                "learning_rate": 1e-3,
                "checkpoint_every": 2,
                "lora": {"rank": 2},
            },
            "evaluation": {
                "prompts_uri": held.as_uri(),
                "num_prompts": 6,
                "scorers": ["tiny-pick"],
                "sample": {"steps": 2, "height": SIDE_PX, "width": SIDE_PX},
            },
        },
    )
    assert job.status == "succeeded", job.reason
    assert job.result.train is not None
    assert job.result.train.model.adapter_of is not None
    answer = client.generate(
        ImageRequest(model="tiny-xl-aligned", prompt="a star", steps=2, size=f"{SIDE_PX}x{SIDE_PX}")
    )
    assert answer.data[0].content.startswith(b"\x89PNG")


def test_a_reward_that_cannot_tell_candidates_apart_fails_the_job_by_name(
    client: Client, shapes: str, dataset: str
):
    job = run(
        client,
        shapes_job(shapes, dataset, name="flat", objective={"min_gap": 2.0}, rollouts={"max_blocks": 2}),
    )
    assert job.status == "failed"
    assert job.reason is not None
    assert "the reward cannot tell candidates apart: 0 of 12 pairs" in job.reason.message


def test_the_guard_ends_training_at_the_last_checkpoint_that_it_allows(
    client: Client, shapes: str, dataset: str
):
    """A learning rate that ruins the model: fidelity falls at once. Taste counts as risen, unmeasured."""
    held = {"every": 2, "num_prompts": 16, "prompts_uri": PROMPTS_FILE.as_uri()}
    job = run(
        client,
        shapes_job(
            shapes,
            dataset,
            name="guarded",
            rollouts={"guard": {"fidelity": 0.01}, "allow_evaluation_prompts": True},
            training={"steps": 40, "learning_rate": 3e-3, "checkpoint_every": 2, "keep_checkpoints": 2},
            validation=held,
            evaluation={
                "prompts_uri": PROMPTS_FILE.as_uri(),
                "num_prompts": 8,
                "scorers": ["fidelity"],
                "sample": {"steps": 4, "guidance_scale": 3},
            },
        ),
    )
    events = [event.message for event in client.events(job.id)]
    assert any("fidelity is" in message and "training ends" in message for message in events), events
    assert max(row.step for row in client.metrics(job.id, "train")) < 40
    if job.status == "failed":
        assert job.reason is not None
        assert "no checkpoint can become the model" in job.reason.message
    else:
        assert any("the last one that the guard allows" in message for message in events)
