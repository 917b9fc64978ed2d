"""The real U-Nets, without weights where shapes suffice, and one real step of the smaller one on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from dde_core.conditioning import predict
from dde_core.config import ObjectiveConfig
from dde_core.planning.estimate import FACTS
from dde_core.train_step import pair_errors, step_losses
from tests.support.unet_configs import TOKENS, UNETS, random_pairs, schedule, unet

ROOT = Path(__file__).parents[2]
REAL = ("sd15", "sdxl")


@pytest.mark.parametrize(("name", "parameters"), [("sd15", 859_520_964), ("sdxl", 2_567_463_684)])
def test_the_real_unets_have_the_published_number_of_parameters(name, parameters):
    assert sum(parameter.numel() for parameter in unet(name).parameters()) == parameters


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("method", ["dde", "dde_single", "dde_step", "uniform", "discounted"])
def test_a_step_of_pairs_goes_through_the_real_unets(name, method):
    model = unet(name)
    batch = random_pairs(name, 3)
    tables = schedule("meta")
    size = UNETS[name]["sample_size"]
    assert batch.latents_w.shape == (3, 4, size, size)
    assert batch.conditioning_w["encoder_hidden_states"].shape == (
        3,
        TOKENS,
        UNETS[name]["cross_attention_dim"],
    )
    with torch.no_grad():
        ref = pair_errors(model, tables, batch)
    theta = pair_errors(model, tables, batch)
    assert [tuple(errors.shape) for errors in (theta.w, theta.l, ref.w, ref.l)] == [(3,)] * 4
    assert theta.w.dtype == torch.float32
    correction = torch.zeros(3, dtype=torch.float64, device="meta")
    terms = step_losses(theta, ref, batch.t, ObjectiveConfig(method=method), tables, correction)
    assert terms.loss.shape == (3,)
    terms.loss.mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", REAL)
def test_the_output_of_the_real_unets_has_the_shape_of_the_latents(name):
    batch = random_pairs(name, 2)
    output = predict(unet(name), batch.latents_w, batch.t, batch.conditioning_w)
    assert output.shape == batch.latents_w.shape


@pytest.mark.parametrize("name", REAL)
def test_winners_alone_go_through_the_real_unets(name):
    theta = pair_errors(unet(name), schedule("meta"), batch := random_pairs(name, 3, losers=False))
    terms = step_losses(theta, None, batch.t, ObjectiveConfig(method="sft"), schedule("meta"))
    assert terms.loss.shape == (3,)


@pytest.mark.slow
@pytest.mark.skipif(
    psutil.virtual_memory().available < 9e9, reason="8 GB for weights and gradients are not free"
)
def test_one_real_step_of_860_million_weights_is_the_same_with_and_without_gradient_checkpointing(capsys):
    size = 16
    samples = 2
    command = [sys.executable, "-W", "ignore", "-m", "tests.support.cpu_step", str(size)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=280)
    assert done.returncode == 0, done.stderr
    checkpointed, kept = (json.loads(done.stdout)[how] for how in ("checkpointed", "kept"))
    for name in ("loss", "error_w", "grad_norm"):
        assert checkpointed[name] == kept[name]
    assert kept["loss"] == pytest.approx(torch.log(torch.tensor(2.0)).item())
    assert kept["grad_norm"] > 0

    facts = FACTS["sd15"]
    saved = kept["peak_gb"] - checkpointed["peak_gb"]
    whole, parts = (
        facts.activation_bytes["fp32", ckpt] * samples * (size / 64) ** 2 / 1e9 for ckpt in (False, True)
    )
    with capsys.disabled():
        print(
            f"\npeak {checkpointed['peak_gb']:.2f} GB with gradient checkpointing,"
            f" {kept['peak_gb']:.2f} GB without: {saved:.3f} GB more, {whole - parts:.3f} counted"
        )
    assert 2 * 4 * facts.parameters / 1e9 < checkpointed["peak_gb"] < 1.2 * 2 * 4 * facts.parameters / 1e9
    assert (whole - parts) / 2 < saved < (whole - parts) * 2
