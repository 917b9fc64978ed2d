"""Every sampler equals diffusers' pipeline run alone, whatever runs beside it in the same U-Net calls."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UniPCMultistepScheduler,
)

from dde_core.conditioning import concatenated
from dde_core.config import SamplerName
from dde_core.engine.samplers import first_latents, make_scheduler, scaled_input, step
from dde_core.errors import ConfigError
from dde_core.models.folder import ModelFolder
from dde_core.models.text import TextEncoders
from dde_core.models.tokens import tokenize
from dde_core.noise import initial_latents, step_generator
from tests.support.tiny_folders import FOLDERS

SAMPLERS: tuple[SamplerName, ...] = get_args(SamplerName)
THEIRS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddim": (DDIMScheduler, {}),
    "euler": (EulerDiscreteScheduler, {}),
    "euler_a": (EulerAncestralDiscreteScheduler, {}),
    "dpmpp_2m": (DPMSolverMultistepScheduler, {}),
    "dpmpp_2m_karras": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "unipc": (UniPCMultistepScheduler, {}),
    "lcm": (LCMScheduler, {}),
}
"""How a user of diffusers makes each sampler from a pipeline's own scheduler."""

KINDS = [(family, kind) for family in FOLDERS for kind in ("epsilon", "v_prediction")]
TOLERANCE = 1e-5
"""Of the greatest latent. One step of another kind is off by 1e-2 and more."""

ZERO = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}


@cache
def folder_of(root: Path, family: str, prediction_type: str) -> ModelFolder:
    return ModelFolder(FOLDERS[family](root / f"{family}-{prediction_type}", prediction_type))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@dataclass
class Image:
    """One image of the company. It joins before turn ``joins``."""

    sampler: SamplerName
    steps: int
    guidance_scale: float
    joins: int
    seed: int
    prompt: str
    scheduler: Any = None
    latents: Any = None
    estimates: list[torch.Tensor] = field(default_factory=list)

    @property
    def is_finished(self) -> bool:
        return len(self.estimates) == self.steps


def company(guidance_scale: float, samplers=SAMPLERS) -> list[Image]:
    """Three images of every sampler, of 5, 7 and 9 steps, that join at different turns."""
    plans = [(sampler, steps) for sampler in samplers for steps in (5, 7, 9)]
    return [
        Image(sampler, steps, guidance_scale, joins=i % 5, seed=i, prompt=f"a small red circle {i % 3}")
        for i, (sampler, steps) in enumerate(plans)
    ]


def draw(
    folder: ModelFolder, images: list[Image], scale=scaled_input, share_schedulers: bool = False
) -> None:
    """The plain loop: every turn is one U-Net call for all images that run."""
    unet = folder.unet().requires_grad_(False)
    encoders = TextEncoders(folder)

    def encoded(captions: list[str]) -> dict[str, torch.Tensor]:
        text = encoders(tokenize(folder.tokenizers(), captions))
        sizes = np.full((len(captions), 2), 32)
        return encoders.with_sizes(text, sizes, np.zeros_like(sizes), (32, 32))

    generators = [step_generator(image.seed) for image in images]
    shared: dict[SamplerName, Any] = {}
    for turn in range(100):
        for image in images:
            if image.joins == turn:
                image.scheduler = make_scheduler(folder.scheduler_config(), image.sampler, image.steps)
                if share_schedulers:
                    image.scheduler = shared.setdefault(image.sampler, image.scheduler)
                image.latents = first_latents(image.scheduler, initial_latents(image.seed, (4, 8, 8))[None])
        running = [i for i, image in enumerate(images) if image.joins <= turn and not image.is_finished]
        if not running and turn > 5:
            return
        if not running:
            continue
        now = [images[i] for i in running]
        guided = now[0].guidance_scale > 1
        rows = torch.cat([scale(image.scheduler, image.latents) for image in now])
        t = torch.tensor([float(image.scheduler.timesteps[len(image.estimates)]) for image in now])
        conditioning = encoded([image.prompt for image in now])
        if guided:
            conditioning = concatenated(encoded([""] * len(now)), conditioning)
            rows = torch.cat([rows, rows])
            t = torch.cat([t, t])
        text = conditioning.pop("encoder_hidden_states")
        with torch.no_grad():
            output = unet(rows, t, text, added_cond_kwargs=conditioning or None).sample
        if guided:
            without, with_text = output.chunk(2)
            output = without + now[0].guidance_scale * (with_text - without)
        for i, own in zip(running, output.split(1), strict=True):
            image = images[i]
            image.latents, estimate = step(image.scheduler, own, image.latents, generators[i])
            image.estimates.append(estimate)
    raise AssertionError("the company never ends")


@cache
def pipeline_of(path: Path, family: str) -> Any:
    kind = {"sd15": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}[family]
    pipeline = kind.from_pretrained(path, dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def alone(folder: ModelFolder, image: Image) -> torch.Tensor:
    """The image as diffusers' pipeline draws it, and nothing beside it."""
    pipeline = pipeline_of(folder.path, folder.family)
    kind, settings = THEIRS[image.sampler]
    # Not of pipeline.scheduler.config: it keeps the settings of the samplers before this one.
    pipeline.scheduler = kind.from_config(folder.scheduler_config(), **settings)
    return pipeline(
        image.prompt,
        latents=initial_latents(image.seed, (4, 8, 8))[None],
        generator=step_generator(image.seed),
        num_inference_steps=image.steps,
        guidance_scale=image.guidance_scale,
        output_type="latent",
    ).images


def error_of(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The greatest difference, as a part of the greatest value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


@cache
def drawn(folder: ModelFolder, guidance_scale: float) -> list[Image]:
    images = company(guidance_scale)
    draw(folder, images)
    return images


# ---- in company, and alone


def company_cases() -> Iterator[Any]:
    """Every product. The fast half of them holds every pair of two of the three."""
    places = itertools.product(enumerate(SAMPLERS), enumerate(KINDS), enumerate((5.0, 1.0)))
    for (i, sampler), (j, kind), (k, guidance_scale) in places:
        marks = () if (i + j + k) % 2 == 0 else (pytest.mark.slow,)
        yield pytest.param(sampler, *kind, guidance_scale, marks=marks)


@pytest.mark.parametrize(("sampler", "family", "prediction_type", "guidance_scale"), list(company_cases()))
def test_an_image_in_company_equals_that_of_diffusers_pipeline_alone(
    root: Path, sampler, family, prediction_type, guidance_scale
):
    folder = folder_of(root, family, prediction_type)
    images = [image for image in drawn(folder, guidance_scale) if image.sampler == sampler]
    assert [image.steps for image in images] == [5, 7, 9]
    for image in images:
        expected = alone(folder, image)
        assert (expected - initial_latents(image.seed, (4, 8, 8))).abs().max() > 0.1
        assert error_of(image.latents, expected) < TOLERANCE


def unscaled(scheduler: Any, latents: torch.Tensor) -> torch.Tensor:
    return latents


@pytest.mark.parametrize(
    ("sampler", "mistake"),
    [
        ("euler", {"scale": unscaled}),
        ("euler_a", {"scale": unscaled}),
        *((sampler, {"share_schedulers": True}) for sampler in SAMPLERS),
    ],
)
def test_a_mistake_is_seen(root: Path, sampler, mistake):
    """The input not scaled; one scheduler for two images of the same steps."""
    folder = folder_of(root, "sd15", "epsilon")
    images = [Image(sampler, 5, 5.0, joins=i, seed=i, prompt="a red circle") for i in range(2)]
    try:
        draw(folder, images, **mistake)
    except IndexError:  # a shared scheduler has no step left
        return
    assert max(error_of(image.latents, alone(folder, image)) for image in images) > 100 * TOLERANCE


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_vector_of_timesteps_into_a_scheduler_raises_or_is_wrong(sd_config, sampler):
    schedulers = [make_scheduler(sd_config, sampler, steps) for steps in (5, 7)]
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    right = []
    for scheduler, row in zip(schedulers, latents.split(1), strict=True):
        step(scheduler, row / 2, scaled_input(scheduler, row), step_generator(0))
        right.append(step(scheduler, row / 2, scaled_input(scheduler, row), step_generator(0))[0])
    shared = make_scheduler(sd_config, sampler, 5)
    t = torch.stack([scheduler.timesteps[1] for scheduler in schedulers])
    shared.set_begin_index(1) if hasattr(shared, "set_begin_index") else None
    try:
        scaled = shared.scale_model_input(latents, t)
        found = shared.step(latents / 2, t, scaled).prev_sample
    except (RuntimeError, ValueError, TypeError):
        return
    assert error_of(found[1:], right[1]) > 100 * TOLERANCE


# ---- estimates of the clean latents


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_of_a_perfect_model_every_estimate_is_the_clean_image(sd_config, sampler, prediction_type):
    """The output is what a model would give that knows x0: epsilon or v of x_t and x0."""
    scheduler = make_scheduler(sd_config | {"prediction_type": prediction_type}, sampler, 8)
    x0 = 3 * initial_latents(1, (4, 8, 8))[None]
    generator = step_generator(0)
    latents = first_latents(scheduler, initial_latents(0, (4, 8, 8))[None])
    for t in scheduler.timesteps:
        x_t = scaled_input(scheduler, latents)
        # Karras' sigmas lie between two timesteps: their alpha_bar is the scheduler's own.
        alpha_bar = alpha_bar_of(scheduler, t)
        epsilon = (x_t - alpha_bar**0.5 * x0) / (1 - alpha_bar) ** 0.5
        v = alpha_bar**0.5 * epsilon - (1 - alpha_bar) ** 0.5 * x0
        output = epsilon if prediction_type == "epsilon" else v
        latents, estimate = step(scheduler, output, latents, generator)
        assert error_of(estimate, x0) < 1e-4
        assert estimate.shape == latents.shape
    assert error_of(latents, x0) < (0.1 if sampler == "ddim" else 1e-3), "ddim's folder ends at t = 1"


def alpha_bar_of(scheduler: Any, t: torch.Tensor) -> float:
    if hasattr(scheduler, "sigmas"):
        return 1 / (1 + scheduler.sigmas[scheduler.steps_done].item() ** 2)
    return scheduler.alphas_cumprod[int(t)].item()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_last_estimate_is_the_image_where_the_path_ends_at_0(sd_config, sampler, prediction_type):
    config = sd_config | {"prediction_type": prediction_type, "set_alpha_to_one": True}
    latents, estimates, _ = walk(make_scheduler(config, sampler, 6))
    torch.testing.assert_close(estimates[-1], latents, rtol=1e-4, atol=1e-4)
    assert error_of(estimates[0], latents) > 0.01


def walk(scheduler: Any, seed: int = 0) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """Latents, estimates and the path, with a model that is some smooth function of its input."""
    generator = step_generator(seed)
    latents = first_latents(scheduler, initial_latents(seed, (4, 8, 8))[None])
    estimates, path = [], [latents]
    for t in scheduler.timesteps:
        output = model(scaled_input(scheduler, latents), t)
        latents, estimate = step(scheduler, output, latents, generator)
        estimates.append(estimate)
        path.append(latents)
    return latents, estimates, path


def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return 0.9 * torch.sin(x + float(t) / 1000) + 0.1 * x.roll(1, -1)


# ---- ddim is the reference loop


# ---- what a folder says is honored, or refused by name


def accepted(config: dict[str, Any], sampler: SamplerName, steps: int) -> Any:
    try:
        return make_scheduler(config, sampler, steps)
    except ConfigError:
        return None


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_steps_are_refused_just_where_they_do_not_fit(sd_config, sampler, spacing):
    """Accepted: so many steps, inside the U-Net's range, each below the one before. Refused: else."""
    refused = 0
    for T, offset in ((10, 0), (10, 1), (50, 3), (1000, 1)):
        config = sd_config | {
            "num_train_timesteps": T,
            "steps_offset": offset,
            "timestep_spacing": spacing,
            "original_inference_steps": min(T, 50),
        }
        all_steps = range(1, T + 2) if T < 1000 else (*range(1, 70, 3), 61, 500, 997, 998, 999, 1000, 1001)
        for steps in all_steps:
            scheduler = accepted(config, sampler, steps)
            refused += scheduler is None
            assert (scheduler is not None) == fits(config, sampler, steps), (T, offset, steps)
            if scheduler is not None:
                assert len(scheduler.timesteps) == steps
    assert refused > 3


def fits(config: dict[str, Any], sampler: SamplerName, steps: int) -> bool:
    """Whether diffusers' own object, less its surplus step, has a path that makes sense."""
    T = config["num_train_timesteps"]
    kind, settings = THEIRS[sampler]
    scheduler = kind.from_config(config | {"_class_name": kind.__name__}, **settings)
    try:
        scheduler.set_timesteps(steps)
    except ValueError:
        return False
    path = scheduler.timesteps[:steps]
    if path.max() >= T or path.min() < 0 or steps > T:
        return False
    if config["timestep_spacing"] == "linspace" and steps == 1 and path[0] == 0:
        return False
    falling = scheduler.sigmas[:steps] if "karras" in sampler else path
    return bool((falling.diff() < 0).all())


CHANGES: tuple[dict[str, Any], ...] = (
    {"timestep_spacing": "trailing"},
    {"timestep_spacing": "linspace"},
    {"steps_offset": 5},
    {"num_train_timesteps": 500},
    {"beta_start": 0.002},
    {"beta_end": 0.02},
    {"beta_schedule": "linear"},
    {"trained_betas": np.linspace(0.001, 0.02, 1000).tolist()},
    {"prediction_type": "v_prediction"},
    ZERO,
    ZERO | {"timestep_spacing": "trailing"},
)
OWN_SPACING = ("lcm", "dpmpp_2m_karras")
"""Samplers whose path begins at T by their own rule."""


def theirs(config: dict[str, Any], sampler: SamplerName, steps: int) -> Any:
    """diffusers' scheduler of a config in which every default is written, as in saved folders."""
    kind, settings = THEIRS[sampler]
    scheduler = kind.from_config({"timestep_spacing": "leading", **config}, **settings)
    scheduler.set_timesteps(steps)
    scheduler.steps_done = 0
    return scheduler


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: "-".join(change))
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_noise_schedule_of_the_folder_is_honored(sd_config, sampler, change):
    found, _, _ = walk(make_scheduler(sd_config | change, sampler, 6))
    expected, _, _ = walk(theirs(sd_config | change, sampler, 6))
    assert torch.equal(found, expected)
    assert found.isfinite().all()
    plain, _, _ = walk(make_scheduler(sd_config, sampler, 6))
    is_read = not (sampler in OWN_SPACING and {*change} <= {"timestep_spacing", "steps_offset"})
    assert (error_of(found, plain) > 1e-4) == is_read


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "dpmpp_2m_karras", "unipc"])
def test_a_path_that_ends_above_0_is_honored(sd_config, sampler):
    config = sd_config | {"final_sigmas_type": "sigma_min"}
    found, _, path = walk(make_scheduler(config, sampler, 6))
    assert torch.equal(found, walk(theirs(config, sampler, 6))[0])
    assert (found - walk(make_scheduler(sd_config, sampler, 6))[0]).abs().max() > 1e-4
    assert all(latents.isfinite().all() for latents in path)


def test_a_path_that_ends_above_0_is_refused_by_the_sampler_that_cannot(sd_config):
    with pytest.raises(ConfigError, match="final_sigmas_type must be zero for sampler 'euler_a'") as error:
        make_scheduler(sd_config | {"final_sigmas_type": "sigma_min"}, "euler_a", 6)
    assert (error.value.field, error.value.value) == ("final_sigmas_type", "sigma_min")


def test_solver_settings_of_the_folders_own_scheduler_are_not_read(sd_config):
    other = {
        "_class_name": "DPMSolverMultistepScheduler",
        "algorithm_type": "sde-dpmsolver++",
        "solver_order": 3,
        "solver_type": "heun",
        "use_karras_sigmas": True,
        "lower_order_final": False,
        "interpolation_type": "log_linear",
    }
    for sampler in SAMPLERS:
        found = walk(make_scheduler(sd_config | other, sampler, 6))[0]
        assert torch.equal(found, walk(make_scheduler(sd_config, sampler, 6))[0])


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "dpmpp_2m_karras", "unipc"])
def test_with_zero_terminal_snr_every_path_leads_to_ddims_image(sd_config, sampler):
    """diffusers takes sigma = 4096 in place of infinity: right, as the paths meet with more steps."""
    config = sd_config | ZERO | {"timestep_spacing": "trailing", "set_alpha_to_one": True}
    fine, _, _ = walk(make_scheduler(config, "ddim", 1000))
    few, many = (error_of(walk(make_scheduler(config, sampler, steps))[0], fine) for steps in (20, 200))
    assert many < min(0.01, few)
    if sampler == "euler":  # Euler's step in sigma is DDIM's
        ddim, _, _ = walk(make_scheduler(config, "ddim", 20))
        assert error_of(walk(make_scheduler(config, sampler, 20))[0], ddim) < 2e-3


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_schedule_that_ends_at_infinite_sigma_is_refused_where_sigma_is_used(sd_config, sampler):
    betas = np.linspace(0.001, 0.02, 999).tolist()
    config = sd_config | {"trained_betas": [*betas, 1.0], "prediction_type": "v_prediction"}
    if sampler in ("ddim", "lcm"):
        latents, estimates, _ = walk(make_scheduler(config | {"timestep_spacing": "trailing"}, sampler, 5))
        assert torch.stack([latents, *estimates]).isfinite().all()
        return
    with pytest.raises(ConfigError, match=f"sampler cannot begin at T .* Use ddim or lcm.*'{sampler}'"):
        make_scheduler(config, sampler, 5)


@pytest.mark.parametrize(
    ("sampler", "steps", "change", "message"),
    [
        ("ddim", 1000, {}, "steps must fit T = 1000 with steps_offset = 1, got 1000"),
        (
            "ddim",
            1,
            {"timestep_spacing": "linspace"},
            "steps must be at least 2 with timestep_spacing linspace",
        ),
        (
            "euler",
            1,
            {"timestep_spacing": "linspace"},
            "steps must be at least 2 with timestep_spacing linspace",
        ),
        ("euler", 1001, {}, "steps must fit T = 1000 with steps_offset = 1 and sampler 'euler', got 1001"),
        (
            "dpmpp_2m",
            999,
            {},
            "steps must fit T = 1000 with steps_offset = 1 and sampler 'dpmpp_2m', got 999",
        ),
        ("lcm", 51, {}, "steps must be at most 50 with sampler 'lcm', got 51"),
        (
            "lcm",
            4,
            {"num_train_timesteps": 10},
            "original_inference_steps must be a whole number from 1 to 10",
        ),
        ("unipc", 5, {"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule must be one of"),
        ("euler_a", 5, {"final_sigmas_type": "other"}, "final_sigmas_type must be one of zero, sigma_min"),
        ("unipc", 0, {}, "steps must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_sampled_is_refused_before_a_step(sd_config, sampler, steps, change, message):
    with pytest.raises(ConfigError, match=message):
        make_scheduler(sd_config | change, sampler, steps)


# ---- one scheduler for each image


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_schedulers_of_the_same_settings_share_no_state(sd_config, sampler):
    expected = walk(make_scheduler(sd_config, sampler, 5), seed=7)[0]
    first, second = (make_scheduler(sd_config, sampler, 5) for _ in range(2))
    latents = first_latents(first, initial_latents(1, (4, 8, 8))[None])
    for t in first.timesteps[:3]:
        latents, _ = step(first, model(scaled_input(first, latents), t), latents, step_generator(1))
    assert (first.steps_done, second.steps_done) == (3, 0)
    assert torch.equal(walk(second, seed=7)[0], expected)
    assert torch.equal(walk(make_scheduler(sd_config, sampler, 5), seed=7)[0], expected)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_only_the_images_own_generator_is_drawn_from(sd_config, sampler):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    generator, untouched = step_generator(3), step_generator(3)
    scheduler = make_scheduler(sd_config, sampler, 5)
    latents = first_latents(scheduler, initial_latents(0, (4, 8, 8))[None])
    step(scheduler, torch.ones_like(latents), scaled_input(scheduler, latents), generator)
    assert torch.equal(torch.get_rng_state(), before)
    is_drawn = not torch.equal(generator.get_state(), untouched.get_state())
    assert is_drawn == (sampler in ("euler_a", "lcm"))
    one, other = (walk(make_scheduler(sd_config, sampler, 5), seed)[0] for seed in (0, 1))
    assert not torch.equal(one, other)
