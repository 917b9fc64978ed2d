"""Equal to what is published: diffusers' schedulers, and the loss of Diffusion-DPO written out.

kappa is not compared: made from a table in float32, as diffusers has it, it is wrong by up to 8e-5.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, PNDMScheduler
from torch.nn import functional as F

from dde_core.config import ObjectiveConfig
from dde_core.models.folder import ModelFolder
from dde_core.models.text import TextEncoders
from dde_core.models.tokens import tokenize
from dde_core.schedule import Schedule, add_noise, epsilon_from, x0_from
from dde_core.train_step import PairBatch, pair_errors, step_losses
from tests.support.tiny_folders import FOLDERS

COMMON = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "trained_betas": None,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
PUBLISHED = {
    "sd15": COMMON,
    "sdxl": COMMON
    | {"prediction_type": "epsilon", "interpolation_type": "linear", "sample_max_value": 1.0}
    | {"timestep_spacing": "leading", "use_karras_sigmas": False},
}
"""The scheduler_config.json of Stable Diffusion 1.5 (PNDM) and XL (Euler)."""

KINDS = {"DDPM": DDPMScheduler, "DDIM": DDIMScheduler, "Euler": EulerDiscreteScheduler, "PNDM": PNDMScheduler}
EVERY_T = torch.arange(1, 1001)


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest relative L2 distance of a sample."""
    return ((found - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)).max().item()


@pytest.fixture(params=["epsilon", "v_prediction"])
def prediction_type(request) -> str:
    return request.param


@pytest.mark.parametrize("beta_schedule", ["scaled_linear", "linear"])
@pytest.mark.parametrize("family", PUBLISHED)
@pytest.mark.parametrize("kind", KINDS)
def test_tables_and_noised_samples_are_those_of_diffusers_at_every_timestep(
    kind, family, beta_schedule, prediction_type
):
    config = PUBLISHED[family] | {"beta_schedule": beta_schedule, "prediction_type": prediction_type}
    theirs, ours = KINDS[kind].from_config(config), Schedule.from_config(config)
    assert ours.prediction_type == prediction_type == theirs.config.prediction_type
    torch.testing.assert_close(ours.alpha_bar[1:], theirs.alphas_cumprod.double(), rtol=1e-6, atol=0)
    x0, noise = (randn(1000, 4, 8, 8, seed=seed) for seed in range(2))
    if kind == "Euler":  # its samples are x0 + sigma noise
        noised = theirs.add_noise(x0, noise, EVERY_T.float() - 1) * ours.alpha_bar[1:].sqrt().view(
            -1, 1, 1, 1
        )
    else:
        noised = theirs.add_noise(x0, noise, EVERY_T - 1)
    assert distance(add_noise(ours, x0, noise, EVERY_T), noised) < 1e-6


@pytest.mark.parametrize("beta_schedule", ["scaled_linear", "linear"])
@pytest.mark.parametrize("kind", ["DDPM", "DDIM"])  # Euler's get_velocity reads its table from the other end
def test_a_velocity_of_diffusers_is_read_as_the_noise_and_the_sample_that_it_was_made_from(
    kind, beta_schedule
):
    config = PUBLISHED["sdxl"] | {"beta_schedule": beta_schedule, "prediction_type": "v_prediction"}
    theirs, ours = KINDS[kind].from_config(config), Schedule.from_config(config)
    x0, noise = (randn(1000, 4, 8, 8, seed=seed) for seed in range(2))
    x_t, velocity = add_noise(ours, x0, noise, EVERY_T), theirs.get_velocity(x0, noise, EVERY_T - 1)
    assert distance(epsilon_from(ours, velocity, x_t, EVERY_T), noise) < 1e-6
    assert distance(x0_from(ours, velocity, x_t, EVERY_T), x0) < 1e-6
    as_noise = dataclasses.replace(ours, prediction_type="epsilon")
    assert distance(epsilon_from(as_noise, velocity, x_t, EVERY_T), noise) > 0.1


# ---- Diffusion-DPO

BETA = 20.0
"""At which no sigmoid is saturated."""


def published_loss(unet, reference, scheduler, batch: PairBatch, compared: str) -> torch.Tensor:
    """Diffusion-DPO's loss: winners and losers share timestep, noise and text; means over C, H, W.

    It is published for models that predict noise. ``compared`` "noise" converts the output to noise;
    "output" compares velocities, as diffusers' example scripts do.
    """
    timesteps, latents = (batch.t - 1).repeat(2), torch.cat([batch.latents_w, batch.latents_l])
    target = batch.noise_w.repeat(2, 1, 1, 1)
    noisy = scheduler.add_noise(latents, target, timesteps)
    told = {
        name: torch.cat([batch.conditioning_w[name], batch.conditioning_l[name]])
        for name in batch.conditioning_w
    }
    text, added = told.pop("encoder_hidden_states"), told or None
    signal = scheduler.alphas_cumprod.double()[timesteps].sqrt().view(-1, 1, 1, 1)
    velocity = scheduler.config.prediction_type == "v_prediction"
    if velocity and compared == "output":
        target = scheduler.get_velocity(latents, target, timesteps)

    def difference(model):
        prediction = model(noisy, timesteps, text, added_cond_kwargs=added).sample
        if velocity and compared == "noise":
            prediction = signal * prediction + (1 - signal**2).sqrt() * noisy
        losses_w, losses_l = (prediction - target).pow(2).mean(dim=[1, 2, 3]).chunk(2)
        return losses_w - losses_l

    with torch.no_grad():
        ref_difference = difference(reference)
    return -F.logsigmoid(-0.5 * BETA * (difference(unet) - ref_difference))


def moved(unet: torch.nn.Module, seed: int) -> torch.nn.Module:
    """The U-Net in float64, away from where it was."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in unet.double().parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return unet


@pytest.fixture(params=["sd15", "sdxl"])
def model(request, prediction_type, tmp_path: Path) -> ModelFolder:
    return ModelFolder(FOLDERS[request.param](tmp_path / "model", prediction_type))


def shared_noise_pairs(model: ModelFolder, b: int = 6) -> PairBatch:
    """Random pairs with real text; SDXL's winners and losers have sizes and crops of their own."""
    encoders = TextEncoders(model)
    text = encoders(tokenize(model.tokenizers(), [f"a red circle number {i}" for i in range(b)]))
    rng, told = np.random.default_rng(0), {}
    for side in "wl":
        sized = encoders.with_sizes(text, rng.integers(32, 99, (b, 2)), rng.integers(0, 32, (b, 2)), (32, 32))
        told[f"conditioning_{side}"] = {name: rows.double() for name, rows in sized.items()}
    noise, t = randn(b, 4, 8, 8, seed=2), torch.tensor([1, 2, 200, 500, 800, 1000])
    latents = {f"latents_{side}": randn(b, 4, 8, 8, seed=seed) for seed, side in enumerate("wl")}
    noises = {"noise_w": noise, "noise_l": noise}
    ids = tuple(map(str, range(b)))
    return PairBatch(pair_ids=ids, t=t, share=torch.ones(b), **noises, **latents, **told)


def ours_of(model: ModelFolder, unet, reference, batch: PairBatch):
    schedule = model.schedule()
    with torch.no_grad():
        ref = pair_errors(reference, schedule, batch)
    return step_losses(
        pair_errors(unet, schedule, batch),
        ref,
        batch.t,
        ObjectiveConfig(method="uniform", beta=BETA),
        schedule,
    )


def test_uniform_is_the_published_loss_of_diffusion_dpo_and_has_its_gradient(model: ModelFolder):
    batch, reference = shared_noise_pairs(model), moved(model.unet(), 1)
    ours, theirs = moved(model.unet(), 2), moved(model.unet(), 2)
    scheduler = DDPMScheduler.from_config(model.scheduler_config())
    loss = ours_of(model, ours, reference, batch).loss
    published = published_loss(theirs, reference, scheduler, batch, "noise")
    torch.testing.assert_close(loss, published, rtol=1e-6, atol=0)
    assert (loss - math.log(2)).abs().max() > 1e-2, "the policy is not its reference"
    loss.mean().backward()
    published.mean().backward()
    gradient, expected = (torch.cat([p.grad.flatten() for p in unet.parameters()]) for unet in (ours, theirs))
    assert expected.norm() > 1e-3
    assert ((gradient - expected).norm() / expected.norm()).item() < 1e-6


@pytest.mark.parametrize("prediction_type", ["v_prediction"], indirect=True)
def test_comparing_velocities_would_be_the_same_logit_without_the_factor_alpha_bar(model: ModelFolder):
    """eps - eps_model = sqrt(alpha_bar) (v - v_model), whatever the prediction type."""
    batch, reference, unet = shared_noise_pairs(model), moved(model.unet(), 1), moved(model.unet(), 2)
    scheduler = DDPMScheduler.from_config(model.scheduler_config())
    with torch.no_grad():
        logit = ours_of(model, unet, reference, batch).logit
        loss = published_loss(unet, reference, scheduler, batch, "output")
    of_velocities = -torch.log(torch.expm1(loss))  # loss = log(1 + exp(-logit))
    torch.testing.assert_close(
        logit, model.schedule().alpha_bar[batch.t] * of_velocities, rtol=1e-5, atol=1e-9
    )
    assert (of_velocities[-1] / logit[-1]).abs() > 100
