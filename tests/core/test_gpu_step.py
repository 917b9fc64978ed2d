"""The benchmarks of a full-size step, run small on the CPU, and the public recipe that is their baseline."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dde_core.config import ObjectiveConfig, TrainConfig
from dde_core.models.policy import Policy
from dde_core.schedule import Schedule
from dde_core.train_step import PairBatch, pair_errors, step_losses
from tests.bench import gpu_laws
from tests.bench.gpu_speed import Ours, Sides
from tests.bench.gpu_step import estimated_memory, published_speed
from tests.bench.public_recipe import Images, PublicRecipe, diffusion_dpo_loss, noise_errors
from tests.bench.random_folder import RandomFolder
from tests.support.synthetic_pairs import synthetic_rows
from tests.support.unet_configs import SCHEDULER, random_pairs, unet

ROOT = Path(__file__).parents[2]
WITHOUT_RAY = (
    "import sys; sys.modules['ray'] = None; from tests.bench.gpu_step import main; main(sys.argv[1:])"
)
SMALL = (
    "--model tiny --device cpu --pairs 2 --micro 1 --steps 1 --rounds 1 "
    "--noise-pairs 20 --decoders 0 --checkpointing on"
)
CPU = torch.device("cpu")


def test_the_benchmark_runs_without_ray_and_merges_its_results_into_a_file(tmp_path):
    out = tmp_path / "results.json"
    kept = {"ratio": 2.0, "value": 1.0, "unit": "s", "against": "another", "machine": "m"}
    out.write_text(json.dumps({"another benchmark": kept}))
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT_RAY, *SMALL.split(), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=240)
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())
    assert results.pop("another benchmark") == kept
    assert all(set(result) == {"ratio", "value", "unit", "against", "machine"} for result in results.values())
    assert all(name.startswith("tiny at 64 px, bf16") for name in results)

    assert results["tiny at 64 px, bf16, step-0 logit, identical arithmetic, largest"]["value"] == 0.0
    spreads = {name: result["value"] for name, result in results.items() if "standard deviation" in name}
    assert len(spreads) == 2 * 2 * 10  # arithmetic of the reference, w, tenths of 1..T
    rounded = {
        w: [value for name, value in spreads.items() if f"float32, w = {w}," in name]
        for w in ("1/2", "1/SNR")
    }
    assert min(map(min, rounded.values())) > 0
    assert max(rounded["1/SNR"]) > 10 * max(rounded["1/2"])  # 1/SNR is 214 at t = T
    for against in ("train_vs_public_recipe", "train_vs_floor"):
        found = results[f"tiny at 64 px, bf16, micro 1, with gradient checkpointing, {against}"]
        assert found["ratio"] > 0
        assert found["value"] > 0


def test_the_laws_for_an_accelerator_hold_on_the_cpu(tmp_path):
    out = tmp_path / "results.json"
    before = torch.are_deterministic_algorithms_enabled()
    try:
        assert gpu_laws.main(["--device", "cpu", "--model", "tiny", "--out", str(out)]) == 0
    finally:
        torch.use_deterministic_algorithms(before)
    assert {name.removeprefix("law, ") for name in json.loads(out.read_text())} == set(gpu_laws.ALL)


def test_a_law_that_fails_is_reported_and_the_others_run(monkeypatch, capsys):
    broken = {
        "raises": (lambda laws: 1 / 0, 1.0, "x"),
        "too far": (lambda laws: 2.0, 1.0, "x"),
        "holds": (lambda laws: 0, 0, "x"),
    }
    monkeypatch.setattr(gpu_laws, "ALL", broken)
    try:
        assert gpu_laws.main(["--device", "cpu", "--model", "tiny"]) == 1
    finally:
        torch.use_deterministic_algorithms(False)
    assert capsys.readouterr().out.rstrip().endswith("1 passed, 2 failed")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_everything_for_an_accelerator_runs_on_a_tiny_model(tmp_path):
    out = tmp_path / "results.json"
    small = {
        "MODEL": "tiny",
        "LARGE": "tiny",
        "PAIRS": "4",
        "MICRO": "2",
        "DEADLINE_S": "800",
        "PYTHON": sys.executable,
    }
    done = subprocess.run(
        ["bash", "tests/bench/gpu.sh", str(out)],
        env=os.environ | small,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    names = set(json.loads(out.read_text()))
    assert {"tiny, VAE encode, tf32", "law, gradient, float32"} <= names
    assert any("compiled, train_vs_floor" in name for name in names)


def test_real_models_are_compared_with_the_estimated_memory_and_the_published_speed():
    training = TrainConfig(
        batch_size=32, micro_batch_size=4, precision="bf16", gradient_checkpointing=True, reference="ledger"
    )
    assert estimated_memory(training, "sd15").endswith("GB of ours estimated by dde_core.planning.estimate")
    assert published_speed("sd15").startswith("2.96 pairs/s of Diffusion-DPO on an A100 (")
    assert published_speed("sdxl").startswith("0.237 pairs/s of Diffusion-DPO on an A100 (")


def test_our_side_starts_at_log_2_on_a_ledger_of_the_model_itself(tmp_path):
    training = TrainConfig(
        steps=1, batch_size=2, micro_batch_size=1, draws=1, precision="bf16", reference="ledger"
    )
    try:
        sides = Sides("tiny", CPU, training, tmp_path, workers=0, timed_steps=1)
        ours = Ours(RandomFolder("tiny", CPU), training, CPU, tmp_path, sides.record)
        with ours.reader:
            first, second = ours.step(), ours.step()
    finally:
        torch.use_deterministic_algorithms(False)
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-12)
    assert second["loss"] != pytest.approx(math.log(2), rel=1e-12)


# ---- the public recipe


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_public_recipes_loss_is_uniform_on_the_same_draws(prediction_type):
    schedule = Schedule.from_config(SCHEDULER | {"prediction_type": prediction_type})
    pairs = random_pairs("tiny", 6, "cpu", seed=3)
    pairs = PairBatch(**{**vars(pairs), "noise_l": pairs.noise_w})
    policy, reference = (unet("tiny", "cpu", seed=seed) for seed in (1, 2))
    conditioning = {name: torch.cat([rows, rows]) for name, rows in pairs.conditioning_w.items()}
    given = (
        torch.cat([pairs.latents_w, pairs.latents_l]),
        torch.cat([pairs.noise_w] * 2),
        torch.cat([pairs.t] * 2),
        conditioning,
    )
    beta = 20.0
    with torch.no_grad():
        theta, ref = (noise_errors(model, schedule, *given) for model in (policy, reference))
        ours = [pair_errors(model, schedule, pairs) for model in (policy, reference)]
    if prediction_type == "epsilon":
        objective = ObjectiveConfig(method="uniform", beta=beta)
        losses = step_losses(*ours, pairs.t, objective, schedule).loss
        assert diffusion_dpo_loss(theta, ref, beta).item() == pytest.approx(losses.mean().item(), rel=1e-5)
        assert losses.std() > 0.01
    else:  # the error on v is the error on eps over alpha_bar: Salimans and Ho, 2022, appendix D
        alpha_bar = schedule.alpha_bar[pairs.t].float()
        assert torch.allclose(theta.chunk(2)[0], ours[0].w / alpha_bar, rtol=1e-3)


def test_the_public_recipe_casts_its_frozen_models_to_bf16_once_and_keeps_its_loss():
    rows = list(synthetic_rows(4, size=64))
    encoded = {}
    losses = {}
    for precision, frozen in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        training = TrainConfig(batch_size=4, precision=precision)
        recipe = PublicRecipe(RandomFolder("tiny", CPU), training, CPU, rows, 64, beta=20.0, workers=0)
        assert {model.dtype for model in (recipe.vae, recipe.reference, *recipe.text.encoders)} == {frozen}
        assert {parameter.dtype for parameter in recipe.policy.parameters()} == {torch.float32}
        move_away(recipe.policy)
        pixels, _, ids, _ = recipe.images[0]
        with torch.no_grad():
            encoded[precision] = recipe.vae.encode(pixels[None].to(frozen)).latent_dist.mean.float()
        torch.manual_seed(0)
        latents = torch.randn(8, 4, 8, 8)
        losses[precision] = recipe.loss(latents, recipe.text(ids.repeat(4, 1, 1).numpy())).item()
        assert math.isfinite(recipe.step())
    off = (encoded["bf16"] - encoded["fp32"]).square().mean().sqrt() / encoded["fp32"].std()
    assert off < 0.05, "relative to the latents' standard deviation: bf16 has 8 bits"
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)
    assert abs(losses["fp32"] - math.log(2)) > 4 * abs(losses["bf16"] - losses["fp32"]), (
        "the loss depends on the reference"
    )


@torch.no_grad()
def move_away(policy: Policy) -> None:
    """Change the policy's weights, by the same numbers every time."""
    generator = torch.Generator().manual_seed(0)
    for parameter in policy.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def test_the_public_recipe_scales_the_shorter_side_crops_the_center_and_puts_the_winner_first():
    left_to_right = np.tile(np.linspace(0, 255, 96, dtype=np.uint8), (48, 1))
    winner, loser = (
        _png(np.stack([grey] * 3, axis=2)) for grey in (left_to_right, np.zeros((48, 96), np.uint8))
    )
    row = {"jpg_0": loser, "jpg_1": winner, "label_0": 0.0, "caption": "a small red circle"}
    pixels_w, pixels_l, ids, size = Images([row], RandomFolder("tiny", CPU).tokenizers(), 24)[0]
    assert pixels_w.shape == pixels_l.shape == (3, 24, 24)
    assert pixels_l.unique().tolist() == [-1.0]
    assert pixels_w[0, 0, 0].item() == pytest.approx(-0.5, abs=0.05), "a quarter of the way"
    assert pixels_w[0, 0, -1].item() == pytest.approx(0.5, abs=0.05)
    assert ids.shape == (1, 77)
    assert size.tolist() == [48, 96]


def _png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()
