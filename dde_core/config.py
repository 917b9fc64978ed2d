"""What a run is told: frozen dataclasses that refuse nonsense. Imports no torch, so the control plane can use them.

Ranges stand once, as ``annotated_types`` constraints: pydantic reads them where a config is part of an API body (and
locates the error at the field), ``check`` reads them where a config is made in Python.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt, MultipleOf

from dde_core.errors import ConfigError
from dde_core.methods import METHODS, MethodName, NoiseMode

CalibrationPoint = Literal["expected", "sampled", "mode"]

MAX_SIZE_PX = 2048
"""Pictures are at most this high and wide."""

MAX_DRAWS = 1000
"""A ledger holds at most so many draws of a pair."""

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
    """Which loss is minimised, and every convention that changes what its numbers mean.

    ``beta`` multiplies errors reduced over latent elements by ``reduction`` (the mean, as the published Diffusion-DPO
    code has it; a beta that was tuned for sums is too large by the number of elements). ``noise`` None: as the method's
    own source has it. ``t_min``/``t_max`` are timesteps of 1..T (DDE's numbering; the U-Net is called with t - 1); 0 for
    ``t_max`` means T. ``max_weight`` caps w(t) (0: no cap).

    Calibration (`dde`, `dde_step`): ``ema_rate`` is mu, ``calibration_point`` where log p/q is evaluated,
    ``calibration_bins`` shares coefficients between neighbouring timesteps (0: one for each t).

    `discounted`: ``gamma`` for each of 50 DDIM steps. ``t_sampling`` "method" draws t from the method's own distribution,
    "uniform" draws it uniformly and weights each pair's loss by the ratio of the two, which has the same expectation.
    """

    method: MethodName = "dde"
    beta: Annotated[float, Gt(0)] = 5000.0
    reduction: Literal["mean"] = "mean"
    noise: NoiseMode | None = None
    t_min: Annotated[int, Ge(1)] = 1
    t_max: Annotated[int, Ge(0)] = 0
    max_weight: Annotated[float, Ge(0)] = 0.0
    ema_rate: Annotated[float, Gt(0), Le(1)] = 0.1
    calibration_point: CalibrationPoint = "expected"
    calibration_bins: Annotated[int, Ge(0)] = 0
    gamma: Annotated[float, Gt(0), Le(1)] = 0.9
    t_sampling: Literal["method", "uniform"] = "method"

    def __post_init__(self) -> None:
        check(self)
        if self.t_max and self.t_max < self.t_min:
            raise ConfigError("t_max", self.t_max, f"must be 0 or at least t_min = {self.t_min}")

    @property
    def noise_mode(self) -> NoiseMode:
        """The noise of winner and loser: as asked for, else as the method's own source has it. `sft` sees one side."""
        method = METHODS[self.method]
        if not method.has_loser:
            return method.noise
        return self.noise or method.noise

    def ignored(self) -> dict[str, Any]:
        """The settings that were changed from their defaults and that this method does not read."""
        method = METHODS[self.method]
        unread: list[str] = []
        if not method.corrected:
            unread += ["ema_rate", "calibration_point", "calibration_bins"]
        if not method.discounted:
            unread += ["gamma", "t_sampling"]
        if not method.has_loser:
            unread += ["beta", "noise", "max_weight"]
        return {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.name in unread and getattr(self, f.name) != f.default
        }


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters instead of the whole U-Net. ``targets`` are suffixes of module names, ``alpha`` 0 means ``rank``."""

    rank: Annotated[int, Gt(0), Le(1024)] = 16
    alpha: Annotated[int, Ge(0)] = 0
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")

    def __post_init__(self) -> None:
        check(self)
        if not self.targets or not all(self.targets):
            raise ConfigError("targets", list(self.targets), "must name at least one module")

    def matches(self, layer: str) -> bool:
        """Whether the layer of this name gets adapters."""
        return any(_names(target, layer) for target in self.targets)

    def unmatched(self, layers: Iterable[str]) -> list[str]:
        """The targets that are the name of none of these layers."""
        known = list(layers)
        return [target for target in self.targets if not any(_names(target, layer) for layer in known)]


def _names(target: str, layer: str) -> bool:
    return layer == target or layer.endswith(f".{target}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One fine-tune. ``batch_size`` counts pairs of the GLOBAL batch and never depends on the number of workers.

    ``learning_rate`` is constant after ``warmup_steps`` of linear warm-up. ``caption_dropout`` is the probability that
    a pair's caption is empty (the same for winner and loser). ``seed`` keys the order of pairs and the first adapters.
    ``lora`` None trains the whole U-Net. A worker runs ``micro_batch_size`` pairs at a time (0: its whole share at once; 1
    can become 2 where ``batch_size`` does not divide by the workers, who must all have equally many parts).
    ``precision`` is that of the U-Net's arithmetic; weights, errors and losses are float32 or wider. ``ema_decay`` 0 keeps
    no average of the weights; otherwise the average is what is saved as the model. ``held_out_pairs`` are kept out of
    training, whole captions at a time, and the policy's implicit accuracy is measured on them at the end.

    ``parallelism``: how several workers hold the model. "ddp": each a whole one; "fsdp": each a share of weights, gradients,
    moments and reference (FSDP2); "auto": "fsdp" where a whole one does not fit on the worker's device. ``compile`` lets
    torch.compile make the U-Net's kernels. Every ``checkpoint_every`` steps the run's state is stored; the last
    ``keep_checkpoints`` are kept, and the best one where validation names a metric.

    ``reference``: where the errors of the frozen model come from. "online" computes them in every step, "ledger" reads them
    from the dataset's ledger, which is written first where it is not there, "auto" reads them where a fitting ledger is there.
    ``draw_seed`` keys noise, timestep and caption dropout of every visit; a pair's n-th visit uses draw n mod ``draws``
    (0: as many draws as the run has epochs).
    """

    steps: Annotated[int, Gt(0)] = 2000
    batch_size: Annotated[int, Gt(0)] = 2048
    micro_batch_size: Annotated[int, Ge(0)] = 0
    learning_rate: Annotated[float, Gt(0), Lt(1)] = 2.05e-5
    warmup_steps: Annotated[int, Ge(0)] = 0
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    weight_decay: Annotated[float, Ge(0)] = 0.01
    max_grad_norm: Annotated[float, Gt(0)] = 1.0
    lora: LoraConfig | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    gradient_checkpointing: bool = False
    ema_decay: Annotated[float, Ge(0), Lt(1)] = 0.0
    caption_dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    held_out_pairs: Annotated[int, Ge(0)] = 0
    parallelism: Literal["auto", "ddp", "fsdp"] = "auto"
    compile: bool = False
    checkpoint_every: Annotated[int, Gt(0)] = 50
    keep_checkpoints: Annotated[int, Gt(0), Le(100)] = 2
    reference: Literal["auto", "ledger", "online"] = "auto"
    draw_seed: Annotated[int, Ge(0), Lt(2**63)] = 0
    draws: Annotated[int, Ge(0), Le(MAX_DRAWS)] = 0
    seed: Annotated[int, Ge(0), Lt(2**63)] = 0

    def __post_init__(self) -> None:
        check(self)

    def num_draws(self, num_pairs: int) -> int:
        """How many draws a run on this many pairs makes use of: those it asks for, else one for each epoch that it begins."""
        return self.draws or -(-self.steps * self.batch_size // num_pairs)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is made of a dataset's pictures. Every one is cut to its centre square and scaled to ``resolution`` pixels (0: the
    size that the model was made for); ``flip`` "all" mirrors every one. Both belong to the encoded dataset's identity.

    A job fails where more than ``max_bad_fraction`` of the dataset's rows are bad.
    """

    resolution: Annotated[int, Ge(0), Le(MAX_SIZE_PX), MultipleOf(8)] = 0
    flip: Literal["none", "all"] = "none"
    max_bad_fraction: Annotated[float, Ge(0), Le(1)] = 0.01

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
