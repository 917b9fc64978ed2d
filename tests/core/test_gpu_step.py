"""The benchmark of a full-size step, run small on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.bench.gpu_step import counted, published

ROOT = Path(__file__).parents[2]
SMALL = ["--model", "tiny", "--device", "cpu", "--pairs", "4", "--micro", "2", "--steps", "1", "--noise-pairs", "40"]


def test_the_benchmark_merges_its_numbers_into_a_file(tmp_path):
    out = tmp_path / "results.json"
    kept = {"ratio": 2.0, "value": 1.0, "unit": "s", "against": "another", "machine": "m"}
    out.write_text(json.dumps({"another benchmark": kept}))
    command = [sys.executable, "-W", "ignore", "-m", "tests.bench.gpu_step", *SMALL, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())
    assert results.pop("another benchmark") == kept
    assert all(set(result) == {"ratio", "value", "unit", "against", "machine"} for result in results.values())
    assert all(name.startswith("tiny at 64 px, bf16") for name in results)

    assert results["tiny at 64 px, bf16, step-0 logit, identical arithmetic, largest"]["value"] == 0.0
    spreads = {name: result["value"] for name, result in results.items() if "standard deviation" in name}
    assert len(spreads) == 2 * 2 * 10  # how the reference ran, w, tenths of 1..T
    rounded = {w: [value for name, value in spreads.items() if f"float32, w = {w}," in name] for w in ("1/2", "1/SNR")}
    assert min(map(min, rounded.values())) > 0
    assert max(rounded["1/SNR"]) > 10 * max(rounded["1/2"])  # 1/SNR is 214 at t = T
    for how in ("with", "without"):
        speed, memory = (results[f"tiny at 64 px, bf16, step, micro 2, {how} gradient checkpointing, {what}"]["value"]
                         for what in ("speed", "peak memory"))  # fmt: skip
        assert speed > 0
        assert memory > 0


def test_real_models_are_held_against_the_estimate_and_the_published_pace():
    assert counted("sd15", 4, 32, True) == "21.2 GB counted by dde_core.estimate"
    assert published("sd15") == "2.96 pairs/s of Diffusion-DPO on an A100 (6.1% of its peak)"
    assert published("sdxl") == "0.237 pairs/s of Diffusion-DPO on an A100 (5.1% of its peak)"
