from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from transformers import CLIPTextConfig, CLIPTextModel

from dde_core.config import SampleConfig
from dde_core.errors import ConfigError, NonFiniteError
from dde_core.noise import initial_latents
from dde_core.sampling import decode, sample_latents, timesteps
from dde_core.schedule import Schedule
from tests.support.tiny_unet import tiny_unet

ZERO = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}


@pytest.fixture(scope="module")
def parts():
    """Tiny random U-Net, VAE (f = 4) and text encoder of the real classes, and embeddings of two captions."""
    unet = tiny_unet()
    vae = AutoencoderKL(
        block_out_channels=(32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=99,
            hidden_size=32,
            intermediate_size=37,
            num_hidden_layers=2,
            num_attention_heads=4,
            bos_token_id=0,
            eos_token_id=1,
        )
    )
    unet, vae, text = (part.eval().requires_grad_(False) for part in (unet, vae, text))
    embeds = text(torch.randint(0, 99, (3, 77)))[0]
    latents = torch.stack([initial_latents(seed, (4, 8, 8)) for seed in (11, 12)])
    return SimpleNamespace(
        unet=unet, vae=vae, text=text, cond=embeds[:2], uncond=embeds[2:].repeat(2, 1, 1), latents=latents
    )


def theirs(parts, config, sample, output_type="latent"):
    pipeline = StableDiffusionPipeline(
        vae=parts.vae,
        text_encoder=parts.text,
        tokenizer=None,
        unet=parts.unet,
        scheduler=DDIMScheduler(**config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompt_embeds=parts.cond,
        negative_prompt_embeds=parts.uncond,
        latents=parts.latents,
        height=32,
        width=32,
        num_inference_steps=sample.steps,
        guidance_scale=sample.guidance_scale,
        output_type=output_type,
    ).images


def ours(parts, config, sample, **more):
    cond, uncond = {"encoder_hidden_states": parts.cond}, {"encoder_hidden_states": parts.uncond}
    return sample_latents(
        parts.unet, Schedule.from_config(config), parts.latents, cond, uncond, sample, **more
    )


@pytest.mark.parametrize(
    ("steps", "guidance", "change"),
    [
        (10, 5.0, {}),
        (7, 1.5, {}),  # 1000 is no multiple of 7
        (5, 1.0, {}),
        (5, 0.0, {}),
        (5, 5.0, {"set_alpha_to_one": True}),
        (5, 5.0, {"prediction_type": "v_prediction"}),
        (5, 5.0, {"num_train_timesteps": 100, "beta_end": 0.1}),
        (5, 5.0, {"num_train_timesteps": 10, "beta_end": 0.5}),  # ends at t = 0, which is not alpha_bar = 1
        (
            9,
            5.0,
            {"num_train_timesteps": 10, "beta_end": 0.5, "set_alpha_to_one": True},
        ),  # ends at t = 1, not 0
        (7, 5.0, {"timestep_spacing": "trailing"}),
        (10, 5.0, {"timestep_spacing": "linspace"}),
        (2, 5.0, {"timestep_spacing": "linspace"}),
        (7, 5.0, {"timestep_spacing": "trailing", **ZERO}),
        (6, 5.0, {"timestep_spacing": "linspace", "set_alpha_to_one": True, **ZERO}),
        (10, 5.0, ZERO),
    ],
)
def test_latents_equal_the_stable_diffusion_pipelines(parts, sd_config, steps, guidance, change):
    config, sample = sd_config | change, SampleConfig(steps=steps, guidance_scale=guidance)
    expected = theirs(parts, config, sample)
    assert (expected - parts.latents).abs().max() > 0.1
    torch.testing.assert_close(
        ours(parts, config, sample), expected, rtol=0, atol=1e-5 * expected.abs().max().item()
    )


def test_pictures_equal_the_stable_diffusion_pipelines(parts, sd_config):
    sample = SampleConfig(steps=4, guidance_scale=3.0)
    expected = np.stack([np.asarray(image) for image in theirs(parts, sd_config, sample, output_type="pil")])
    pictures = decode(parts.vae, ours(parts, sd_config, sample))
    assert pictures.shape == (2, 32, 32, 3)
    assert pictures.dtype == np.uint8
    assert expected.std() > 5
    off = np.abs(pictures.astype(int) - expected.astype(int))
    assert off.max() <= 1
    assert (off > 0).mean() < 0.01


def test_values_outside_of_the_picture_range_are_clamped_and_channels_come_last():
    pixels = torch.tensor([-3.0, 0.0, 3.0]).view(1, 3, 1, 1).expand(1, 3, 2, 4)
    seen = []
    vae = SimpleNamespace(
        config=SimpleNamespace(scaling_factor=0.5),
        dtype=torch.float32,
        decode=lambda z: (seen.append(z), SimpleNamespace(sample=pixels))[1],
    )
    pictures = decode(vae, torch.ones(1, 4, 2, 4))
    assert pictures.shape == (1, 2, 4, 3)
    assert (pictures == [0, 128, 255]).all()
    assert (seen[0] == 2).all()


def test_guidance_of_at_most_1_runs_the_conditional_pass_alone(parts, sd_config):
    sizes = []

    def unet(x, t, **conditioning):
        sizes.append(len(x))
        return parts.unet(x, t, **conditioning)

    cond, uncond = {"encoder_hidden_states": parts.cond}, {"encoder_hidden_states": parts.uncond}
    for guidance in (0.0, 1.0, 1.01):
        sample = SampleConfig(steps=1, guidance_scale=guidance)
        sample_latents(unet, Schedule.from_config(sd_config), parts.latents, cond, uncond, sample)
    assert sizes == [2, 2, 4]


def test_a_picture_does_not_depend_on_the_pictures_beside_it(parts, sd_config):
    sample, schedule = SampleConfig(steps=4), Schedule.from_config(sd_config)
    together = ours(parts, sd_config, sample)
    for i in range(2):
        cond, uncond = ({"encoder_hidden_states": rows[i : i + 1]} for rows in (parts.cond, parts.uncond))
        alone = sample_latents(parts.unet, schedule, parts.latents[i : i + 1], cond, uncond, sample)
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-5 * together.abs().max().item())


def test_the_hook_is_called_before_each_step_and_can_stop_the_sampling(parts, sd_config):
    calls = []

    def stop_at_2(i, n):
        calls.append((i, n))
        if i == 2:
            raise ConnectionAbortedError("the client left")

    with pytest.raises(ConnectionAbortedError):
        ours(parts, sd_config, SampleConfig(steps=4), on_step=stop_at_2)
    assert calls == [(0, 4), (1, 4), (2, 4)]


def test_steps_descend_by_equal_strides_from_the_schedulers_offset(schedule, sd_config):
    assert timesteps(schedule, 4) == [752, 502, 252, 2]
    theirs = DDIMScheduler(**sd_config)
    for steps in (1, 7, 25, 50, 333, 999):
        theirs.set_timesteps(steps)
        assert timesteps(schedule, steps) == (theirs.timesteps + 1).tolist()


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
@pytest.mark.parametrize("T", [10, 50, 1000])
def test_other_spacings_are_diffusers_at_every_number_of_steps(sd_config, spacing: str, T: int):
    config = sd_config | {"timestep_spacing": spacing, "num_train_timesteps": T}
    schedule = Schedule.from_config(config)
    theirs = DDIMScheduler(**config)
    for steps in range(1 + (spacing == "linspace"), T + 1):
        theirs.set_timesteps(steps)
        assert timesteps(schedule, steps) == (theirs.timesteps + 1).tolist()[:steps]
    assert timesteps(schedule, T) == list(range(T, 0, -1))


def test_values_that_are_not_finite_are_no_images(parts, sd_config):
    def unet(x, t, **conditioning):
        output = torch.zeros_like(x)
        output[1, 0, 0, 0] = float("nan")
        return SimpleNamespace(sample=output)

    cond = {"encoder_hidden_states": parts.cond}
    schedule = Schedule.from_config(sd_config)
    with pytest.raises(NonFiniteError, match="latents are not finite in 1 of 2 images"):
        sample_latents(unet, schedule, parts.latents, cond, cond, SampleConfig(steps=2, guidance_scale=1.0))
    with pytest.raises(NonFiniteError, match="decoded images are not finite in 2 of 2 images"):
        decode(parts.vae, parts.latents * float("inf"))


def test_steps_that_do_not_fit_the_schedule_are_refused(schedule, sd_config):
    with pytest.raises(ConfigError, match="steps must fit T = 1000 with steps_offset = 1, got 1000"):
        timesteps(schedule, 1000)
    linspace = Schedule.from_config(sd_config | {"timestep_spacing": "linspace"})
    with pytest.raises(ConfigError, match="steps must be at least 2 with timestep_spacing linspace, got 1"):
        timesteps(linspace, 1)
    with pytest.raises(ConfigError, match="steps must fit T = 10"):
        timesteps(Schedule.from_config(sd_config | {"num_train_timesteps": 10}), 11)
    assert timesteps(Schedule.from_config(sd_config | {"steps_offset": 0}), 1000) == list(range(1000, 0, -1))
