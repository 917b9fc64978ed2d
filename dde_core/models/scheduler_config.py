"""What ``scheduler_config.json`` of a model folder may ask for. Imports no torch.

A field that asks for a noise schedule that sampling and training do not have is refused by name. Every error
is a ConfigError that names field and value.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dde_core.config import ObjectiveConfig
from dde_core.errors import ConfigError
from dde_core.methods import METHODS
from dde_core.models.json_files import Fields

PREDICTION_TYPES = ("epsilon", "v_prediction")
BETA_SCHEDULES = ("scaled_linear", "linear")
TIMESTEP_SPACINGS = ("leading", "trailing", "linspace")
SCHEDULERS = tuple(
    f"{name}Scheduler"
    for name in (
        *(
            "DDIM",
            "DDPM",
            "PNDM",
            "DEISMultistep",
            "DPMSolverMultistep",
            "DPMSolverSDE",
            "DPMSolverSinglestep",
        ),
        *("EulerAncestralDiscrete", "EulerDiscrete", "HeunDiscrete", "KDPM2AncestralDiscrete"),
        *("KDPM2Discrete", "LMSDiscrete", "UniPCMultistep"),
    )
)
"""Classes whose noise schedule is given by betas, so that DDIM can sample with it in their place."""

SINGLE_SHOT = ("dde", "dde_single")
"""Methods whose weight is 1/SNR(t)."""

NO_SIGNAL = float(np.finfo(np.float32).tiny)
"""alpha_bar below which nothing of an image is left: diffusers' tables, in float32, have no such number."""


def check_scheduler(config: Mapping[str, Any]) -> None:
    """Raises ConfigError for a ``scheduler_config.json`` with an invalid or unsupported noise schedule."""
    fields = Fields("", config)
    if str(config.get("_class_name", "")).startswith("FlowMatch"):
        raise fields.refusal("_class_name", "is of flow matching, which is not supported yet")
    fields.one_of("_class_name", SCHEDULERS[0], SCHEDULERS)
    for name in ("thresholding", "clip_sample", "use_flow_sigmas"):
        if fields.get(name):
            raise fields.refusal(name, "is not supported and must be false")
    fields.must_be("timestep_type", "discrete")
    prediction_type = fields.one_of("prediction_type", "epsilon", PREDICTION_TYPES)
    fields.one_of("timestep_spacing", "leading", TIMESTEP_SPACINGS)
    rescales = fields.flag("rescale_betas_zero_snr", False)
    if rescales and prediction_type == "epsilon":
        reason = "needs prediction_type 'v_prediction': noise says nothing about an image without signal"
        raise fields.refusal("rescale_betas_zero_snr", reason)
    fields.flag("set_alpha_to_one", False)
    _check_betas(fields, may_end_without_signal=prediction_type == "v_prediction")
    _check_signal(fields, ends_without_signal(config))
    fields.whole("steps_offset", 0, least=0, most=fields.whole("num_train_timesteps", None) - 1)


def ends_without_signal(config: Mapping[str, Any]) -> bool:
    """Whether a valid scheduler config has zero terminal SNR: nothing of an image is left at T."""
    trained_betas = config.get("trained_betas")
    return bool(config.get("rescale_betas_zero_snr") or (trained_betas and trained_betas[-1] == 1))


def check_error(config: ObjectiveConfig, prediction_type: str) -> None:
    """Raises ConfigError for errors of the velocity where the model predicts the noise."""
    if config.error == "velocity" and prediction_type != "v_prediction":
        reason = f"needs a base with prediction_type 'v_prediction', and this one has {prediction_type!r}"
        raise ConfigError("error", config.error, reason)


def check_terminal_weight(config: ObjectiveConfig, timesteps: int) -> None:
    """Raises ConfigError for an objective that is not defined at T of a base with zero terminal SNR: 1/SNR(T)
    is infinite, and no transition starts there."""
    if METHODS[config.method].on_policy and 2 * config.transitions == timesteps:
        reason = (
            f"must be less than half of the {timesteps} timesteps: the base's noise schedule has zero "
            f"terminal SNR, and the first transition would start at T, where nothing of an image is left"
        )
        raise ConfigError("transitions", config.transitions, reason)
    draws_last = config.t_max in (0, timesteps)
    if config.method in SINGLE_SHOT and draws_last and not config.max_weight:
        reason = (
            f"must be greater than 0, or t_max at most {timesteps - 1}: the base's noise schedule has zero "
            f"terminal SNR, so the weight of {config.method!r} is infinite at T = {timesteps}"
        )
        raise ConfigError("max_weight", config.max_weight, reason)


def _check_betas(fields: Fields, may_end_without_signal: bool) -> None:
    """Raises ConfigError unless all betas are in (0, 1); the last may be 1 if nothing need be left at T."""
    trained_betas = fields.get("trained_betas")
    required = ["num_train_timesteps"]
    if trained_betas is None:
        required += ["beta_schedule", "beta_start", "beta_end"]
    for name in required:
        if fields.get(name) is None:
            raise fields.refusal(name, "must be in the scheduler's config")
    timesteps = fields.whole("num_train_timesteps", None)
    if trained_betas is None:
        fields.one_of("beta_schedule", None, BETA_SCHEDULES)
        fields.number("beta_start", None, above=0, below=1)
        fields.number("beta_end", None, above=0, below=1)
        return
    if not isinstance(trained_betas, list | tuple) or len(trained_betas) != timesteps:
        length = len(trained_betas) if isinstance(trained_betas, list | tuple) else trained_betas
        raise ConfigError("trained_betas", length, f"must hold num_train_timesteps = {timesteps} values")
    for number, beta in enumerate(trained_betas, 1):
        is_number = isinstance(beta, int | float) and not isinstance(beta, bool)
        is_end = beta == 1 and number == timesteps and may_end_without_signal
        if not is_number or not (0 < beta < 1 or is_end):
            raise ConfigError("betas", beta, "must be between 0 and 1")


def _check_signal(fields: Fields, has_zero_terminal_snr: bool) -> None:
    """Raises ConfigError if nothing of an image is left at any t but a T of zero terminal SNR.

    A U-Net that predicts noise says nothing about an image there, and SNR(t-1)/SNR(t) would be 0/0 between
    two such timesteps.
    """
    timesteps = fields.whole("num_train_timesteps", None)
    trained_betas = fields.get("trained_betas")
    if trained_betas is not None:
        betas = np.array(trained_betas, np.float64)
    else:
        power = 0.5 if fields.get("beta_schedule") == "scaled_linear" else 1.0
        ends = [fields.number(name, None, above=0, below=1) for name in ("beta_start", "beta_end")]
        betas = np.linspace(ends[0] ** power, ends[1] ** power, timesteps) ** (1 / power)
    with np.errstate(under="ignore"):
        alpha_bar = np.cumprod(1 - betas)
    lost = np.flatnonzero(alpha_bar[: timesteps - has_zero_terminal_snr] < NO_SIGNAL)
    if len(lost):
        name = "beta_end" if trained_betas is None else "trained_betas"
        value = fields.get("beta_end") if trained_betas is None else trained_betas[lost[0]]
        reason = (
            f"leaves nothing of an image at t = {lost[0] + 1} of {timesteps}; only zero terminal SNR may, "
            "at T: v_prediction with rescale_betas_zero_snr or a last beta of 1"
        )
        raise ConfigError(name, value, reason)
