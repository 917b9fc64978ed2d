"""A dataset that a scorer makes over HTTP on real Ray: drawn, encoded, trained on, labeled anew."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from dde_core.config import ObjectiveConfig, SampleConfig, TrainConfig
from dde_core.shapes import MODEL_DIR, PROMPTS_FILE
from dde_core.shapes.scenes import all_scenes, caption, omit_attributes
from services.api.answers import DatasetView
from services.api.requests import AlignmentJobCreate, EvaluationConfig, GeneratePairs, Relabel
from services.client.api import Client

SAMPLE = SampleConfig(steps=4, guidance_scale=3.0)
LAST_PROMPTS = 20
"""Prompts that no dataset is made of."""


def wait(client: Client, dataset_id: str, timeout_s: float = 300.0) -> DatasetView:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        dataset = client.dataset(dataset_id)
        if dataset.status != "generating":
            return dataset
        time.sleep(0.3)
    raise TimeoutError(dataset_id)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_pairs_made_by_a_scorer_are_registered_encoded_and_trained_on(client: Client, tmp_path: Path):
    lines = PROMPTS_FILE.read_text().splitlines()
    own, held_out = tmp_path / "own.txt", tmp_path / "held_out.txt"
    own.write_text("\n".join(lines[:-LAST_PROMPTS]))
    held_out.write_text("\n".join(lines[-LAST_PROMPTS:]))
    if "shapes" not in {model.name for model in client.models()}:
        client.create_model("shapes", MODEL_DIR.as_uri())
    wanted = GeneratePairs(
        model="shapes",
        prompts_uri=own.as_uri(),
        num_prompts=20,
        images_per_prompt=3,
        scorers={"taste": 1.0},
        keep="all_pairs",
        sample=SAMPLE,
    )
    made = wait(client, client.generate_dataset("by-taste", wanted).id)
    events = [event.message for event in client.dataset_events(made.id)]
    assert made.status == "ready", events
    assert made.counts is not None
    assert made.result is not None
    assert made.counts.pairs + made.result.ties == 60
    assert any(event.startswith("60 images are scored") for event in events), events

    again = wait(
        client, client.relabel_dataset("by-fidelity", Relabel(dataset=made.id, scorer="fidelity")).id
    )
    assert again.status == "ready", again.reason
    assert again.result is not None
    assert again.result.prompts == made.counts.pairs
    assert 0 < (again.result.agreement or 0) < 1
    assert again.digest != made.digest

    job = client.wait(
        client.create_job(
            AlignmentJobCreate(
                model="shapes",
                dataset=made.id,
                objective=ObjectiveConfig(method="uniform"),
                training=TrainConfig(steps=2, batch_size=8, learning_rate=5e-5),
                evaluation=EvaluationConfig(prompts_uri=held_out.as_uri(), num_prompts=4, sample=SAMPLE),
            )
        ).id,
        timeout_s=300,
    )
    assert job.status == "succeeded", job.reason
    assert job.result.encode is not None
    assert job.result.encode.counts["pairs"] == made.counts.pairs
    assert job.result.encode.bad == {}
    assert not any("held out" in event.message for event in client.events(job.id))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_model_aligned_on_a_scorers_pairs_is_better_by_that_scorer_on_held_out_prompts(
    client: Client, tmp_path: Path
):
    """The labels are of `taste` alone; 200 prompts of which no image was drawn for the dataset decide."""
    held_out = [line.strip() for line in PROMPTS_FILE.read_text().splitlines()]
    rng = np.random.default_rng(0)
    drawn = (
        caption(omit_attributes(scene, rng)) for scene in rng.permutation(np.array(all_scenes(), object))
    )
    prompts = list(dict.fromkeys(text for text in drawn if text not in set(held_out)))[:300]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    if "shapes" not in {model.name for model in client.models()}:
        client.create_model("shapes", MODEL_DIR.as_uri())
    sample = SampleConfig(steps=20, guidance_scale=3.0)
    wanted = GeneratePairs(
        model="shapes",
        prompts_uri=(tmp_path / "prompts.txt").as_uri(),
        num_prompts=len(prompts),
        images_per_prompt=4,
        scorers={"taste": 1.0},
        keep="all_pairs",
        margin=0.5,
        sample=sample,
    )
    made = wait(client, client.generate_dataset("by-taste", wanted).id, 1200)
    assert made.counts is not None
    print(f"{made.counts.pairs} pairs, {made.result}")
    job = client.wait(
        client.create_job(
            AlignmentJobCreate(
                model="shapes",
                dataset=made.id,
                objective=ObjectiveConfig(method="dde", beta=5000, calibration_bins=50),
                training=TrainConfig(steps=120, batch_size=64, learning_rate=5e-5, checkpoint_every=120),
                evaluation=EvaluationConfig(
                    prompts_uri=PROMPTS_FILE.as_uri(), num_prompts=200, sample=sample
                ),
            )
        ).id,
        timeout_s=2400,
    )
    assert job.status == "succeeded", job.reason
    assert job.result.evaluate is not None
    for name, of_candidates in job.result.evaluate.scores.items():
        scores = of_candidates[job.name]
        print(f"{name}: beat ratio {scores.beat_ratio}, difference {scores.difference}")
    print(f"seconds {job.stage_seconds}")
    assert job.result.evaluate.scores["taste"][job.name].difference.low > 0
