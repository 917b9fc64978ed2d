"""Each method, run through the job API: what training logged is what `dde credit` makes of the run's margins."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from dde_core.config import Method
from dde_core.shapes import MODEL_DIR, PAIRS_FILE, PROMPTS_FILE
from services.client.api import Client
from services.client.local import LocalSystem
from services.contracts import AlignmentJobCreate

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

WITHIN = 0.05


@pytest.fixture(scope="module")
def jobs(client: Client) -> dict[str, str]:
    """One job for each method, started together."""
    client.create_model("shapes-methods", MODEL_DIR.as_uri())
    dataset = client.create_dataset("pairs-methods", PAIRS_FILE.as_uri())

    def body(method: str) -> dict:
        return {
            "model": "shapes-methods",
            "dataset": dataset.id,
            "name": f"shapes-{method.replace('_', '-')}",
            "objective": {"method": method, **({"calibration_bins": 50} if method in ("dde", "dde_step") else {})},
            "training": {"steps": 60, "batch_size": 64, "learning_rate": 5e-5, "checkpoint_every": 25, "held_out_pairs": 300},
            "evaluation": {
                "prompts_uri": PROMPTS_FILE.as_uri(),
                "num_prompts": 25,
                "sample": {"steps": 10, "guidance_scale": 3.0},
            },
        }

    asked = {method: AlignmentJobCreate.model_validate_json(json.dumps(body(method))) for method in get_args(Method)}
    return {method: client.create_job(each).id for method, each in asked.items()}


@pytest.mark.parametrize("method", get_args(Method))
def test_the_gradient_weight_that_was_logged_is_the_predicted_one(
    client: Client, system: LocalSystem, jobs: dict[str, str], method: str
):
    job = client.wait(jobs[method])
    assert job.status == "succeeded", job.reason
    command = [str(Path(sys.executable).with_name("dde")), "credit", "--method", method, "--job", job.id, "--json"]
    where = {"DDE_URL": system.url, "DDE_API_KEY": system.key}
    printed = json.loads(subprocess.run(command, env=os.environ | where, capture_output=True, check=True).stdout)
    buckets = printed["job"]["buckets"]
    metrics = job.result.train.metrics
    print(f"\n{method}: held-out implicit accuracy {metrics['held_out_accuracy']:.3f} "
          f"[{metrics['held_out_accuracy_low']:.3f}, {metrics['held_out_accuracy_high']:.3f}]")  # fmt: skip
    print("           t  pairs      margin      logged   predicted")
    for each in buckets:
        margin = "-" if each["margin"] is None else f"{each['margin']:.6f}"
        span = f"{each['t_first']}..{each['t_last']}"
        print(f"{span:>12} {each['pairs']:>6} {margin:>11} {each['logged']:>11.6g} {each['predicted']:>11.6g}")
    assert sum(each["pairs"] for each in buckets) == 60 * 64
    for each in buckets:
        assert each["logged"] == pytest.approx(each["predicted"], rel=WITHIN)
