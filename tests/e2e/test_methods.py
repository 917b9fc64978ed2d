"""Each method, run as a job: `dde credit` predicts the gradient weight that training logged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow.parquet as pq
import pytest

from dde_core.methods import METHODS, MethodName
from dde_core.shapes import MODEL_DIR, PAIRS_FILE, PROMPTS_FILE
from services.api.requests import AlignmentJobCreate
from services.client.api import Client
from services.client.local import LocalSystem

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

WITHIN = 0.05
BINS = 50


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
            "objective": {
                "method": method,
                **({"calibration_bins": BINS} if method in ("dde", "dde_step") else {}),
            },
            "training": {
                "steps": 60,
                "batch_size": 64,
                "learning_rate": 5e-5,
                "checkpoint_every": 25,
                "held_out_pairs": 300,
            },
            "evaluation": {
                "prompts_uri": PROMPTS_FILE.as_uri(),
                "num_prompts": 25,
                "sample": {"steps": 10, "guidance_scale": 3.0},
            },
        }

    requests = {
        method: AlignmentJobCreate.model_validate_json(json.dumps(body(method)))
        for method in get_args(MethodName)
    }
    return {method: client.create_job(each).id for method, each in requests.items()}


def by_hand(method: str, step: np.ndarray, t: np.ndarray, margin: np.ndarray) -> np.ndarray:
    """Every pair's gradient weight from the formulas alone, on Stable Diffusion's schedule with BINS bins."""
    if not METHODS[method].has_loser:
        return np.ones(len(t))
    alpha_bar = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    snr = np.concatenate([[np.inf], alpha_bar / (1 - alpha_bar)])  # entry t
    w = 1 / snr[t] if method in ("dde", "dde_single") else np.full(len(t), 0.5)
    g, r = np.zeros(len(t)), np.zeros(BINS)
    bin_of = (np.arange(1001) - 2) * BINS // 999  # of timesteps 2..1000
    for now in np.unique(step):
        rows = np.flatnonzero(step == now)
        at = r[bin_of[2:]]  # calibration at timesteps 2..1000
        c = np.array([at[k - 1 :].sum() for k in t[rows]])  # timesteps k + 1..1000
        c *= method in ("dde", "dde_step")
        g[rows] = w[rows] / (1 + np.exp(5000 * (w[rows] * margin[rows] + c)))
        rows = rows[t[rows] > 1]
        credit = (snr[t[rows] - 1] / snr[t[rows]] - 1) / 2 * margin[rows]
        for number in np.unique(bin_of[t[rows]]):
            r[number] += 0.1 * (credit[bin_of[t[rows]] == number].mean() - r[number])
    return g


@pytest.mark.parametrize("method", get_args(MethodName))
def test_the_logged_gradient_weight_is_the_predicted_one(
    client: Client, system: LocalSystem, jobs: dict[str, str], method: str
):
    job = client.wait(jobs[method])
    assert job.status == "succeeded", job.reason
    command = [
        str(Path(sys.executable).with_name("dde")),
        "credit",
        "--method",
        method,
        "--job",
        job.id,
        "--json",
    ]
    where = {"DDE_URL": system.url, "DDE_API_KEY": system.key}
    printed = json.loads(
        subprocess.run(command, env=os.environ | where, capture_output=True, check=True).stdout
    )
    buckets = printed["job"]["buckets"]
    metrics = job.result.train.metrics
    print(f"\n{method}: held-out implicit accuracy {metrics['held_out_accuracy']:.3f} "
          f"[{metrics['held_out_accuracy_low']:.3f}, {metrics['held_out_accuracy_high']:.3f}]")  # fmt: skip
    print("           t  pairs      margin      logged   predicted")
    for each in buckets:
        margin = "-" if each["margin"] is None else f"{each['margin']:.6f}"
        span = f"{each['t_first']}..{each['t_last']}"
        print(
            f"{span:>12} {each['pairs']:>6} {margin:>11} {each['logged']:>11.6g} {each['predicted']:>11.6g}"
        )
    assert sum(each["pairs"] for each in buckets) == 60 * 64
    files = sorted((system.state / "storage" / "jobs" / job.id / "train" / "run" / "pairs").glob("*.parquet"))
    step, t, margin = (
        np.concatenate([pq.read_table(file)[name].to_numpy() for file in files])
        for name in ("step", "t", "margin")
    )
    g = by_hand(method, step, t, margin.astype(np.float64))
    for each in buckets:
        assert each["logged"] == pytest.approx(each["predicted"], rel=WITHIN)
        assert each["predicted"] == pytest.approx(
            g[(t >= each["t_first"]) & (t <= each["t_last"])].mean(), rel=1e-3
        )
