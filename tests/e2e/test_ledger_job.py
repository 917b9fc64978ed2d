"""The same job twice over HTTP on the same draws: on a ledger, and with the reference in every step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dde_core.config import ObjectiveConfig, SampleConfig, TrainConfig
from dde_core.shapes import MODEL_DIR, PAIRS_FILE, PROMPTS_FILE
from services.api.answers import JobView
from services.api.requests import AlignmentJobCreate, EvaluationConfig
from services.client.api import Client

STEPS = 40
TRAINING = {"steps": STEPS, "batch_size": 64, "learning_rate": 5e-5, "draws": 2, "checkpoint_every": STEPS}


def run(client: Client, dataset: str, method: str, reference: str) -> JobView:
    request = AlignmentJobCreate(
        model="shapes",
        dataset=dataset,
        objective=ObjectiveConfig(
            method=method, noise="independent", calibration_bins=50 if method == "dde" else 0
        ),
        training=TrainConfig(**TRAINING, reference=reference),
        workers=1,
        evaluation=EvaluationConfig(
            prompts_uri=PROMPTS_FILE.as_uri(), num_prompts=2, sample=SampleConfig(steps=2, guidance_scale=3.0)
        ),
    )
    job = client.wait(client.create_job(request).id, timeout_s=400)
    assert job.status == "succeeded", job.reason
    return job


def metrics(client: Client, job: JobView) -> list[dict[str, float]]:
    return [row.metrics for row in client.metrics(job.id, "train")]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_on_a_ledger_trains_like_one_whose_reference_runs_in_every_step(client: Client, tmp_path: Path):
    client.create_model("shapes", MODEL_DIR.as_uri())
    dataset = client.create_dataset("pairs", PAIRS_FILE.as_uri()).id
    for method, reference in (
        ("uniform", "ledger"),
        ("dde", "auto"),
    ):  # the second finds the ledger of the first
        cached, online = (run(client, dataset, method, each) for each in (reference, "online"))
        events = [event.message for event in client.events(cached.id)]
        assert any(event.startswith("reference errors from ledger") for event in events), events
        assert ("stage ledger done" in events) == (reference == "ledger")
        with_ledger, without = metrics(client, cached), metrics(client, online)
        print(f"\n{method}: loss with ledger, online")
        for step in range(0, STEPS, 4):
            print(f"  step {step + 1:3}: {with_ledger[step]['loss']:.6f} {without[step]['loss']:.6f}")
        noise = {name: value for name, value in with_ledger[0].items() if name.startswith("step0_logit_std")}
        print(
            "  logit at step 0, root mean square with ledger: "
            + ", ".join(f"{n} {v:.2e}" for n, v in noise.items())
        )
        print(f"  pairs/s with ledger {speed(with_ledger):.1f}, online {speed(without):.1f}")
        assert noise["step0_logit_std_half"] < 0.01
        assert all(value == 0.0 for name, value in without[0].items() if name.startswith("step0_logit_std"))
        for name in ("loss", "margin", "implicit_accuracy"):
            curves = [np.array([row[name] for row in rows]) for rows in (with_ledger, without)]
            apart = np.abs(curves[0] - curves[1]).mean() / np.abs(curves[1]).mean()
            print(f"  {name}: mean distance of the curves {apart:.1e} of their mean")
            assert apart < 0.02, name


def speed(rows: list[dict[str, float]]) -> float:
    return float(np.median([row["pairs_per_s"] for row in rows[1:]]))
