"""A run's configuration: frozen, validated dataclasses. Imports no torch, so the control plane can use them.

Each range is declared once, as an ``annotated_types`` constraint. pydantic validates it in API bodies (and
locates the error at the field); ``check`` validates it when a config is created in Python.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import cache
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt, MinLen, MultipleOf

from dde_core.errors import ConfigError
from dde_core.methods import METHODS, ErrorKind, MethodName, NoiseMode

CalibrationPoint = Literal["expected", "sampled", "mode"]
Background = Literal["white", "gray", "black"]
Posterior = Literal["mean", "sampled"]
SamplerName = Literal["ddim", "euler", "euler_a", "dpmpp_2m", "dpmpp_2m_karras", "unipc", "lcm"]

MAX_SIZE_PX = 2048
"""Greatest height and width of images."""

MAX_DRAWS = 1000
"""Most draws of a pair in a ledger."""

MAX_TRANSITION_BETA = 1000.0
"""Greatest beta of on-policy methods, whose pairs differ by the noise of one denoising step."""

FAR_T = 500
FAR_PASSES = 4
"""By default candidates above FAR_T are rewarded for the clean samples that so many passes estimate."""

Module = Annotated[str, MinLen(1)]
Constraint = tuple[str, Callable[[Any, Any], bool], str]

_CONSTRAINTS: dict[type, Constraint] = {
    Gt: ("gt", operator.gt, "must be greater than"),
    Ge: ("ge", operator.ge, "must be at least"),
    Lt: ("lt", operator.lt, "must be less than"),
    Le: ("le", operator.le, "must be at most"),
    MultipleOf: ("multiple_of", lambda value, bound: value % bound == 0, "must be a multiple of"),
    MinLen: ("min_length", lambda value, bound: len(value) >= bound, "its length must be at least"),
}
"""The attribute with the bound, whether value and bound satisfy the constraint, and its message."""


def check(config: Any) -> None:
    """Validate every field of a dataclass against its annotation. Raises ConfigError with field and value."""
    kind: Any = type(config)
    hints = _hints(kind)
    for field in fields(config):
        value = getattr(config, field.name)
        hint = hints[field.name]
        if get_origin(hint) is Literal and value not in get_args(hint):
            raise ConfigError(field.name, value, f"must be one of {', '.join(map(repr, get_args(hint)))}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(field.name, value, "must be a finite number")
        for constraint in getattr(hint, "__metadata__", ()):
            attribute, is_satisfied, message = _CONSTRAINTS[type(constraint)]
            bound = getattr(constraint, attribute)
            if value is not None and not is_satisfied(value, bound):
                raise ConfigError(field.name, value, f"{message} {bound}")


@cache
def _hints(kind: type) -> dict[str, Any]:
    """The annotations of a dataclass's fields, evaluated once."""
    return get_type_hints(kind, include_extras=True)


ON_POLICY_FIELDS = (
    *("transitions", "eta", "guidance_scale", "candidates", "lookahead", "min_gap"),
    *("continue_from", "temperature", "anchor"),
)
"""Fields of an objective that only on-policy methods read."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """The loss, and every convention that changes the meaning of its numbers.

    ``beta`` multiplies errors reduced over latent elements by ``reduction``: the mean, as in Diffusion-DPO's
    published code. (A beta tuned for sums is too large by the number of elements.) ``noise`` None is the
    method's default. ``t_min`` and ``t_max`` are timesteps of 1..T (DDE's numbering; the U-Net is called with
    t - 1); ``t_max`` 0 means T. ``max_weight`` caps w(t); 0 means no cap.

    ``error``: what a model with v-prediction is compared in. "noise" converts its output; "velocity" compares
    the output itself, as diffusers' trainers do, which multiplies the error by 1 / alpha_bar(t). DDE's
    formulas hold for the noise alone.

    ``time_ids`` (SDXL): "per_side" conditions winner and loser on the size and crop of their own images.
    "fixed" tells both that their image has the size that it was encoded at and no crop: sides of unequal
    size then differ in nothing but the image. ``dropped_caption``: "model" encodes a caption that is dropped
    as the model's pipeline encodes none (SDXL: zeros); "empty" encodes the empty caption, as diffusers'
    trainers do.

    ``label``: "hard" trains on the winner, whatever its share p of the preference (0.75 for three of four
    votes). "soft" trains on p: the loss is -p log sigmoid(logit) - (1 - p) log sigmoid(-logit). The two are
    equal at p = 1.

    Calibration (`dde`, `dde_step`): ``ema_rate`` is mu. ``calibration_point`` is where log p/q is evaluated.
    ``calibration_bins`` gives neighboring timesteps one coefficient; 0 means one for each t.

    `discounted`: ``gamma`` is the discount of each of 50 DDIM steps. ``t_sampling`` "method" draws t from the
    method's distribution. "uniform" draws t uniformly and multiplies each pair's loss by the ratio of the two
    distributions; the expectation is the same.

    On-policy methods (`tailorpo`, `tailorpo_g`): the policy draws images in ``transitions`` steps of DDIM
    with noise ``eta`` and ``guidance_scale``, in rollouts and in training alike. Transitions that start at t
    in ``t_min`` .. ``t_max`` are trained. In each, ``candidates`` are drawn from one x_t and ranked by the
    reward of the clean samples that ``lookahead`` passes of deterministic DDIM estimate; 0 means 4 passes
    above t = 500 and 1 below. The best and the worst become a pair if their rewards differ by more than
    ``min_gap``. The trajectory goes on from a random candidate, or from the winner. ``label`` "soft": the
    winner's share is sigmoid(gap / ``temperature``). ``anchor``: the policy is compared with the base, or
    with the weights that drew the round. `tailorpo_g` moves the winner's noise along the reward's gradient by
    ``guidance_strength`` times its own length. ``beta`` must be given: 10 is what SPO, the nearest published
    method, uses.
    """

    method: MethodName = "dde"
    label: Literal["hard", "soft"] = "hard"
    beta: Annotated[float, Gt(0)] = 5000.0
    reduction: Literal["mean"] = "mean"
    noise: NoiseMode | None = None
    error: ErrorKind = "noise"
    time_ids: Literal["per_side", "fixed"] = "per_side"
    dropped_caption: Literal["model", "empty"] = "model"
    t_min: Annotated[int, Ge(1)] = 1
    t_max: Annotated[int, Ge(0)] = 0
    max_weight: Annotated[float, Ge(0)] = 0.0
    ema_rate: Annotated[float, Gt(0), Le(1)] = 0.1
    calibration_point: CalibrationPoint = "expected"
    calibration_bins: Annotated[int, Ge(0)] = 0
    gamma: Annotated[float, Gt(0), Le(1)] = 0.9
    t_sampling: Literal["method", "uniform"] = "method"
    transitions: Annotated[int, Ge(2), Le(1000)] = 20
    eta: Annotated[float, Gt(0), Le(1)] = 1.0
    guidance_scale: Annotated[float, Ge(0)] = 5.0
    candidates: Annotated[int, Ge(2), Le(16)] = 2
    lookahead: Annotated[int, Ge(0), Le(50)] = 0
    min_gap: Annotated[float, Ge(0)] = 0.0
    continue_from: Literal["random", "winner"] = "random"
    temperature: Annotated[float, Gt(0)] = 1.0
    anchor: Literal["base", "round"] = "base"
    guidance_strength: Annotated[float, Gt(0)] = 0.5

    def __post_init__(self) -> None:
        check(self)
        if METHODS[self.method].on_policy and self.beta > MAX_TRANSITION_BETA:
            reason = (
                f"must be at most {MAX_TRANSITION_BETA:g} for method {self.method!r}, whose pairs are of one "
                f"denoising step: 10 is usual (the other methods' default is 5000)"
            )
            raise ConfigError("beta", self.beta, reason)
        if self.t_max and self.t_max < self.t_min:
            raise ConfigError("t_max", self.t_max, f"must be 0 or at least t_min = {self.t_min}")
        if self.error == "velocity" and METHODS[self.method].noise_errors_only:
            reason = (
                f"is not defined for method {self.method!r}: its weights and corrections are of the noise"
            )
            raise ConfigError("error", self.error, reason)

    @property
    def noise_mode(self) -> NoiseMode:
        """The noise of winner and loser: the configured one, else the method's default. `sft` has one side
        only."""
        method = METHODS[self.method]
        if not method.has_loser:
            return method.noise
        return self.noise or method.noise

    def starts(self, timesteps: int) -> list[int]:
        """Where all transitions of an on-policy method start, in falling order: DDIM's steps with "leading"
        spacing and an offset of 1, as Stable Diffusion's, but the last, which has no noise.

        Raises ConfigError if there are more ``transitions`` than half of a base's ``timesteps``.
        """
        stride = timesteps // self.transitions
        if stride < 2:
            reason = f"must be at most half of the schedule's {timesteps} timesteps"
            raise ConfigError("transitions", self.transitions, reason)
        return [2 + stride * step for step in range(self.transitions - 1, 0, -1)]

    def ranked_starts(self, timesteps: int) -> list[int]:
        """Where the transitions start that an on-policy method ranks and trains, in falling order.

        A base has so many ``timesteps``. Raises ConfigError if there are more ``transitions`` than half of
        them, or if none starts in t_min..t_max. (`dde_core/transitions.py` has their tables.)
        """
        starts = self.starts(timesteps)
        ranked = [t for t in starts if self.t_min <= t <= (self.t_max or timesteps)]
        if not ranked:
            reason = f"and t_max = {self.t_max} hold none of the transitions, which start at {starts}"
            raise ConfigError("t_min", self.t_min, reason)
        return ranked

    def ignored(self) -> dict[str, Any]:
        """Settings that differ from their defaults although the method ignores them, with their values."""
        method = METHODS[self.method]
        unread: list[str] = []
        if not method.corrected:
            unread += ["ema_rate", "calibration_point", "calibration_bins"]
        if not method.discounted:
            unread += ["gamma", "t_sampling"]
        if not method.has_loser:
            unread += ["beta", "noise", "max_weight", "label"]
        if method.on_policy:
            unread += ["noise", "max_weight", "time_ids", "dropped_caption"]
        else:
            unread += ON_POLICY_FIELDS
        if not method.reward_gradient:
            unread += ["guidance_strength"]
        return {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.name in unread and getattr(self, f.name) != f.default
        }

    def lookahead_passes(self, t: int) -> int:
        """Passes of DDIM that estimate the clean samples of a transition that starts at t."""
        if self.lookahead:
            return self.lookahead
        return FAR_PASSES if t > FAR_T else 1


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters. ``targets`` are suffixes of module names; ``alpha`` 0 means ``rank``."""

    rank: Annotated[int, Gt(0), Le(1024)] = 16
    alpha: Annotated[int, Ge(0)] = 0
    targets: Annotated[tuple[Module, ...], MinLen(1)] = ("to_q", "to_k", "to_v", "to_out.0")

    def __post_init__(self) -> None:
        check(self)
        if not self.targets or not all(self.targets):
            raise ConfigError("targets", list(self.targets), "must name at least one module")

    def matches(self, layer: str) -> bool:
        """Whether the layer of this name gets adapters."""
        return any(_matches(target, layer) for target in self.targets)

    def unmatched(self, layers: Iterable[str]) -> list[str]:
        """The targets that match none of these layers."""
        names = list(layers)
        return [target for target in self.targets if not any(_matches(target, name) for name in names)]


def _matches(target: str, layer: str) -> bool:
    return layer == target or layer.endswith(f".{target}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One fine-tune.

    ``batch_size`` counts the pairs of the GLOBAL batch, whatever the number of workers. A worker runs
    ``micro_batch_size`` pairs at a time; 0 means all of its pairs at once. (1 can become 2 if the number of
    workers does not divide ``batch_size``, because all workers run equally many micro-batches.)
    ``learning_rate`` is constant after ``warmup_steps`` of linear warm-up. ``lora`` None trains the whole
    U-Net. ``precision`` is that of the U-Net's arithmetic; weights, errors and losses are float32 or wider.
    With ``ema_decay`` > 0 the running average of the weights becomes the model. ``caption_dropout`` is the
    probability that a pair's caption is empty, for winner and loser alike. ``held_out_pairs`` are excluded
    from training, whole captions at a time; implicit accuracy is measured on them at the end. ``seed``
    determines the order of pairs and the initial adapters.

    ``optimizer``: "adamw"; "adamw_8bit", whose moments take a byte each; or "adafactor" (arXiv 1804.04235) at
    ``learning_rate``, without relative steps and scaled parameters, as Diffusion-DPO's trainer runs it for
    SDXL: it keeps averages of squared gradients by row and column, has no first moment, and limits the root
    mean square of an update to the learning rate. ``weight_decay`` is decoupled in all three: a step first
    subtracts ``weight_decay`` times the learning rate of it from a weight.

    ``parallelism``: with "ddp" every worker holds the whole model. With "fsdp" (FSDP2) each holds a shard of
    weights, gradients, moments and reference. "auto" is "fsdp" if the whole model does not fit on a worker's
    device. ``compile`` compiles the U-Net with torch.compile; with our deterministic kernels a step was then
    0.75 as fast on an H100. A checkpoint is stored every ``checkpoint_every`` steps. The last
    ``keep_checkpoints`` are kept, and the best one if validation names a metric.

    ``reference``: "online" computes the frozen model's errors in every step. "ledger" reads them from the
    dataset's ledger, which is written first if it does not exist. "auto" reads them if a matching ledger
    exists. ``draw_seed`` determines noise, timestep and caption dropout of every visit. A pair's n-th visit
    uses draw n mod ``draws``; 0 means as many draws as the run has epochs.
    """

    steps: Annotated[int, Gt(0)] = 2000
    batch_size: Annotated[int, Gt(0)] = 2048
    micro_batch_size: Annotated[int, Ge(0)] = 0
    learning_rate: Annotated[float, Gt(0), Lt(1)] = 2.05e-5
    warmup_steps: Annotated[int, Ge(0)] = 0
    optimizer: Literal["adamw", "adamw_8bit", "adafactor"] = "adamw"
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
        """The number of draws of each pair in a run on ``num_pairs`` pairs: ``draws``, else one for each
        begun epoch."""
        return self.draws or -(-self.steps * self.batch_size // num_pairs)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How a dataset's images are encoded. All but ``max_bad_fraction`` is part of the encoded dataset's
    identity.

    Every image is cropped to its center square and scaled to ``resolution`` pixels; 0 means the model's own
    size. ``flip`` "all" mirrors every image. Transparent pixels show the ``background``. A job fails if more
    than ``max_bad_fraction`` of the dataset's rows are bad.

    ``posterior``: the latents of an image are the "mean" of the VAE's posterior, or one "sampled" from it, as
    Diffusion-DPO's trainer takes. The sample is keyed by the image's file: it is the same in every pair, run
    and epoch, where that trainer draws another one in each epoch.
    """

    resolution: Annotated[int, Ge(0), Le(MAX_SIZE_PX), MultipleOf(8)] = 0
    flip: Literal["none", "all"] = "none"
    background: Background = "white"
    posterior: Posterior = "mean"
    max_bad_fraction: Annotated[float, Ge(0), Le(1)] = 0.01

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """How images are sampled, with classifier-free guidance. ``sampler`` names a scheduler of diffusers (see
    ``dde_core.engine.samplers``); "ddim" has eta 0. Size 0 means the model's own."""

    sampler: SamplerName = "ddim"
    steps: Annotated[int, Gt(0), Le(1000)] = 25
    guidance_scale: Annotated[float, Ge(0)] = 5.0
    height: Annotated[int, Ge(0), Le(MAX_SIZE_PX), MultipleOf(8)] = 0
    width: Annotated[int, Ge(0), Le(MAX_SIZE_PX), MultipleOf(8)] = 0

    def __post_init__(self) -> None:
        check(self)
