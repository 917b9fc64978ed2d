"""What a run is told: frozen dataclasses that refuse nonsense. Imports no torch, so the control plane can use them.

Ranges stand once, as ``annotated_types`` constraints: pydantic reads them where a config is part of an API body (and
locates the error at the field), ``check`` reads them where a config is made in Python.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt, MultipleOf

from dde_core.errors import ConfigError

Method = Literal["dde", "uniform"]
NoiseMode = Literal["independent", "shared"]

DEFAULT_NOISE: dict[str, NoiseMode] = {"dde": "independent", "uniform": "shared"}
"""Each method's own source: DDE's Algorithm 1 line 3 draws two noises, Diffusion-DPO draws one for both sides."""

MAX_SIZE_PX = 2048
"""Pictures are at most this high and wide."""

_SAYS = {
    Gt: ("must be greater than", lambda v, c: v > c.gt, "gt"),
    Ge: ("must be at least", lambda v, c: v >= c.ge, "ge"),
    Lt: ("must be less than", lambda v, c: v < c.lt, "lt"),
    Le: ("must be at most", lambda v, c: v <= c.le, "le"),
    MultipleOf: ("must be a multiple of", lambda v, c: v % c.multiple_of == 0, "multiple_of"),
}


def check(config: Any) -> None:
    """Hold every field of a dataclass against its annotated range. Raises ConfigError with field and value."""
    hints = get_type_hints(type(config), include_extras=True)
    for field in fields(config):
        value, hint = getattr(config, field.name), hints[field.name]
        if get_origin(hint) is Literal and value not in get_args(hint):
            raise ConfigError(field.name, value, f"must be one of {', '.join(map(repr, get_args(hint)))}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(field.name, value, "must be a finite number")
        for constraint in getattr(hint, "__metadata__", ()):
            words, holds, bound = _SAYS[type(constraint)]
            if value is not None and not holds(value, constraint):
                raise ConfigError(field.name, value, f"{words} {getattr(constraint, bound)}")


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Which preference loss is minimised, and every convention that changes what its numbers mean.

    ``beta`` multiplies MEAN squared errors over latent elements (as the published Diffusion-DPO code does).
    ``t_min``/``t_max`` are timesteps of 1..T (DDE's numbering; the U-Net is called with t - 1); 0 for ``t_max`` means T.
    ``ema_rate`` is mu of the calibration coefficients, ``calibration_bins`` shares them between neighbouring timesteps
    (0: one bin for each t), ``max_weight`` caps w(t) (0: no cap).
    """

    method: Method = "dde"
    beta: Annotated[float, Gt(0)] = 5000.0
    noise: NoiseMode | None = None
    t_min: Annotated[int, Ge(1)] = 1
    t_max: Annotated[int, Ge(0)] = 0
    ema_rate: Annotated[float, Gt(0), Le(1)] = 0.1
    calibration_bins: Annotated[int, Ge(0)] = 0
    max_weight: Annotated[float, Ge(0)] = 0.0

    def __post_init__(self) -> None:
        check(self)
        if self.t_max and self.t_max < self.t_min:
            raise ConfigError("t_max", self.t_max, f"must be 0 or at least t_min = {self.t_min}")

    @property
    def noise_mode(self) -> NoiseMode:
        """The noise of winner and loser: as asked for, else as the method's own source has it."""
        return self.noise or DEFAULT_NOISE[self.method]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One fine-tune. ``batch_size`` counts pairs of the GLOBAL batch and never depends on the number of workers.

    ``learning_rate`` is constant after ``warmup_steps`` of linear warm-up. ``caption_dropout`` is the probability that
    a pair's caption is empty (the same for winner and loser). ``seed`` keys the order of pairs and every draw.
    """

    steps: Annotated[int, Gt(0)] = 2000
    batch_size: Annotated[int, Gt(0)] = 2048
    learning_rate: Annotated[float, Gt(0), Lt(1)] = 2.05e-5
    warmup_steps: Annotated[int, Ge(0)] = 0
    weight_decay: Annotated[float, Ge(0)] = 0.01
    max_grad_norm: Annotated[float, Gt(0)] = 1.0
    caption_dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    checkpoint_every: Annotated[int, Gt(0)] = 50
    seed: Annotated[int, Ge(0), Lt(2**63)] = 0

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """How pictures are drawn: DDIM (eta 0) with classifier-free guidance. ``height``/``width`` 0: the model's own size."""

    steps: Annotated[int, Gt(0), Le(1000)] = 25
    guidance_scale: Annotated[float, Ge(0)] = 5.0
    height: Annotated[int, Ge(0), Le(MAX_SIZE_PX), MultipleOf(8)] = 0
    width: Annotated[int, Ge(0), Le(MAX_SIZE_PX), MultipleOf(8)] = 0

    def __post_init__(self) -> None:
        check(self)
