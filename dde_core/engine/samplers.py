"""Samplers are diffusers' own scheduler objects, one for each image.

The sampler's name decides the solver; the model folder decides the noise schedule, the prediction type, the
spacing of timesteps and where the path ends. Solver settings of the folder belong to the scheduler that the
folder names, and are not read.

A scheduler keeps what it has seen of its image (earlier outputs, its step), so it is never shared, and never
given a vector of timesteps: Euler and Euler ancestral would read the first sigma for all.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)
from jaxtyping import Float
from torch import Tensor

from dde_core.config import SamplerName
from dde_core.errors import ConfigError
from dde_core.models.json_files import Fields
from dde_core.models.scheduler_config import check_scheduler, ends_without_signal

NOISE_SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": None,
    "beta_schedule": None,
    "beta_start": None,
    "beta_end": None,
    "trained_betas": None,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 0,
    "rescale_betas_zero_snr": False,
}
"""What every sampler reads from the folder, with the defaults of ``Schedule.from_config``. A field of default
None is passed on only where the folder has it."""


@dataclass(frozen=True, kw_only=True)
class _Solver:
    """A scheduler class, its fixed settings, and what it can do.

    ``reads`` are fields that it takes from the folder beside NOISE_SCHEDULE, with their defaults.
    """

    kind: type[Any]
    settings: Mapping[str, Any] = field(default_factory=dict)
    reads: Mapping[str, Any] = field(default_factory=dict)
    uses_sigmas: bool = True
    """Whether it computes with sigma = sqrt((1 - alpha_bar) / alpha_bar): infinite where nothing is left."""
    points_between: int = 0
    """One for a class whose n steps, leading or linspace, are those of n + 1 points without the last."""


_ENDS = {"final_sigmas_type": "zero"}
_DPM = {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint"}

_SOLVERS: dict[SamplerName, _Solver] = {
    "ddim": _Solver(
        kind=DDIMScheduler,
        settings={"clip_sample": False},
        reads={"set_alpha_to_one": False},
        uses_sigmas=False,
    ),
    "euler": _Solver(kind=EulerDiscreteScheduler, reads=_ENDS),
    "euler_a": _Solver(kind=EulerAncestralDiscreteScheduler),
    "dpmpp_2m": _Solver(kind=DPMSolverMultistepScheduler, settings=_DPM, reads=_ENDS, points_between=1),
    "dpmpp_2m_karras": _Solver(
        kind=DPMSolverMultistepScheduler, settings=_DPM | {"use_karras_sigmas": True}, reads=_ENDS
    ),
    "unipc": _Solver(
        kind=UniPCMultistepScheduler,
        settings={"solver_order": 2, "solver_type": "bh2"},
        reads=_ENDS,
        points_between=1,
    ),
    "lcm": _Solver(
        kind=LCMScheduler,
        settings={"clip_sample": False},
        reads={"original_inference_steps": 50, "timestep_scaling": 10.0},
        uses_sigmas=False,
    ),
}

_DRAW_NOISE = (EulerAncestralDiscreteScheduler, LCMScheduler)
"""Classes whose steps add noise."""

_KEEP_ESTIMATES = (DPMSolverMultistepScheduler, UniPCMultistepScheduler)
"""Classes that keep their estimates of the clean latents, and do not return them."""


def make_scheduler(config: Mapping[str, Any], sampler: SamplerName, steps: int) -> Any:
    """A new scheduler with its timesteps set, before its first step. Cheap: it is a copy of a cached one.

    ``config`` is a folder's ``sampling_config()``. Raises
    ConfigError for a schedule that the sampler cannot follow, and for steps that do not fit.
    """
    scheduler = copy.copy(_prototype(json.dumps(dict(config), sort_keys=True), sampler, steps))
    # Tables are shared: nothing writes to them. Lists hold what a scheduler has seen of its image.
    for name, value in vars(scheduler).items():
        if isinstance(value, list):
            setattr(scheduler, name, list(value))
    return scheduler


def first_latents(scheduler: Any, noise: Float[Tensor, "1 c h w"]) -> Float[Tensor, "1 c h w"]:
    """The latents before the first step, from standard normal noise: Euler's are as large as its sigma."""
    latents: Tensor = noise * scheduler.init_noise_sigma
    return latents


def scaled_input(scheduler: Any, latents: Float[Tensor, "1 c h w"]) -> Float[Tensor, "1 c h w"]:
    """What the U-Net is given for the next step; the U-Net's timestep is ``timesteps[steps_done]``."""
    scaled: Tensor = scheduler.scale_model_input(latents, scheduler.timesteps[scheduler.steps_done])
    return scaled


def shared_step(scheduler: Any) -> Hashable | None:
    """Images whose schedulers return the same value may take their next step in one call.

    None for a scheduler that steps alone, because what it has seen of its image counts.
    """
    if isinstance(scheduler, DDIMScheduler):
        return id(scheduler.timesteps), scheduler.steps_done  # copies of one prototype share this table
    return None


def step(
    scheduler: Any,
    output: Float[Tensor, "b c h w"],
    latents: Float[Tensor, "b c h w"],
    generator: torch.Generator,
) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]:
    """The next latents, and the estimate of the clean ones that this step was taken with.

    ``output`` is the U-Net's for this image, guidance included; ``shared_step`` says whether there may be
    several. ``euler_a`` and ``lcm`` draw their noise from the image's own ``generator``, on its device. LCM's
    estimate is its consistency function.
    """
    t = scheduler.timesteps[scheduler.steps_done]
    own_noise = {"generator": generator} if isinstance(scheduler, _DRAW_NOISE) else {}
    result = scheduler.step(output, t, latents, **own_noise)
    scheduler.steps_done += 1
    if isinstance(scheduler, _KEEP_ESTIMATES):
        return result.prev_sample, scheduler.model_outputs[-1]
    if isinstance(scheduler, LCMScheduler):
        return result.prev_sample, result.denoised
    return result.prev_sample, result.pred_original_sample


@lru_cache(maxsize=1024)
def _prototype(config_json: str, sampler: SamplerName, steps: int) -> Any:
    """The scheduler that ``make_scheduler`` copies. It never takes a step."""
    config = json.loads(config_json)
    solver = _SOLVERS[sampler]
    settings = _settings(config, sampler)
    _check_steps(settings, sampler, steps)
    scheduler = solver.kind(**settings)
    scheduler.set_timesteps(steps)
    _drop_surplus(scheduler, steps)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    scheduler.steps_done = 0  # DDIM has no count of its own
    return scheduler


def _settings(config: Mapping[str, Any], sampler: SamplerName) -> dict[str, Any]:
    """The scheduler's arguments. Raises ConfigError for fields that the sampler cannot follow."""
    check_scheduler(config)
    solver = _SOLVERS[sampler]
    fields = Fields("", {**solver.reads, **config})
    end = fields.one_of("final_sigmas_type", "zero", ("zero", "sigma_min"))
    if end != "zero" and solver.kind is EulerAncestralDiscreteScheduler:
        raise fields.refusal("final_sigmas_type", f"must be zero for sampler {sampler!r}: use euler or ddim")
    if solver.uses_sigmas and ends_without_signal(config) and not config.get("rescale_betas_zero_snr"):
        reason = (
            "cannot begin at T of this model, whose trained_betas end at 1: sigma is infinite there. "
            "Use ddim or lcm, or give beta_start, beta_end and rescale_betas_zero_snr"
        )
        raise ConfigError("sampler", sampler, reason)
    if solver.kind is LCMScheduler:
        timesteps = fields.whole("num_train_timesteps", None)
        fields.whole("original_inference_steps", None, most=timesteps)
        fields.number("timestep_scaling", None, above=0)
    known = {**NOISE_SCHEDULE, **solver.reads}
    settings = {name: config.get(name, default) for name, default in known.items()}
    return {name: value for name, value in settings.items() if value is not None} | dict(solver.settings)


def _check_steps(settings: Mapping[str, Any], sampler: SamplerName, steps: int) -> None:
    """Raises ConfigError unless the scheduler has as many different timesteps, all of the U-Net's."""
    T = settings["num_train_timesteps"]
    spacing = settings["timestep_spacing"]
    offset = settings["steps_offset"]
    solver = _SOLVERS[sampler]
    if steps < 1:
        raise ConfigError("steps", steps, "must be at least 1")
    if solver.kind is LCMScheduler:
        most = settings["original_inference_steps"]
        if steps > most:
            raise ConfigError("steps", steps, f"must be at most {most} with sampler 'lcm'")
        return
    follows_spacing = "use_karras_sigmas" not in solver.settings
    points = steps + solver.points_between if follows_spacing and spacing != "trailing" else steps
    greatest = offset + (points - 1) * (T // points) if follows_spacing and spacing == "leading" else 0
    if points > T or greatest >= T:
        reason = f"must fit T = {T} with steps_offset = {offset}"
        raise ConfigError(
            "steps", steps, f"{reason} and sampler {sampler!r}" if sampler != "ddim" else reason
        )
    if follows_spacing and spacing == "linspace" and points == 1:
        raise ConfigError("steps", steps, "must be at least 2 with timestep_spacing linspace")


def _drop_surplus(scheduler: Any, steps: int) -> None:
    """Drop the step at t = -1 that diffusers adds where T / steps is rounded down, with spacing trailing.

    It does so at 61 and 103 steps, for example, with T = 1000.
    """
    if len(scheduler.timesteps) == steps:
        return
    scheduler.timesteps = scheduler.timesteps[:steps]
    scheduler.num_inference_steps = steps
    if hasattr(scheduler, "sigmas"):
        scheduler.sigmas = torch.cat([scheduler.sigmas[:steps], scheduler.sigmas[-1:]])
