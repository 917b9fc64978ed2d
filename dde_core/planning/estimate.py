"""Memory of one GPU and GPU-hours of a full-size run, each a sum of terms with its formula. Imports no torch.

Memory is counted in GB of 10^9 bytes while gradients are computed. It leaves out CUDA's context, cuDNN's
workspaces, allocator fragmentation and the optimizer's temporary buffers (none where it is fused): a tenth of
the GPU should stay free for them.

Time is arithmetic divided by speed. A pair costs its text and its U-Net passes: a backward pass is two
forward ones (one where the weights are frozen and adapters are trained), gradient checkpointing repeats the
forward, and the frozen reference is one more, unless its errors are read from a ledger.

Speed is the MFU (model FLOPs utilization: achieved over peak FLOP/s) of Diffusion-DPO's published A100-hours,
in which the VAE encoded every image in every epoch. Other GPUs are assumed to reach the same MFU, which a
faster one seldom does. So hours are an order of magnitude, good for comparing runs and for sizing a cluster;
`dde_core/planning/plan.py` goes further.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from dde_core.config import LoraConfig, ObjectiveConfig, TrainConfig
from dde_core.errors import ConfigError
from dde_core.methods import METHODS
from dde_core.parallelism import (
    FLOAT32,
    Parameters,
    StateTerm,
    adafactor_averages,
    micro_batch_counts,
    runs_reference,
    state_terms,
)
from dde_core.planning.facts import FACTS, GPUS, Facts, Gpu


@dataclass(frozen=True)
class Term:
    """One line of an estimate: ``value`` in ``unit``, and the ``formula`` that gives it, with its numbers."""

    name: str
    formula: str
    value: float
    unit: str = "GB"


@dataclass(frozen=True)
class Estimate:
    """``memory`` adds up to ``memory_gb``; ``time`` leads from the arithmetic of one sample to the hours of
    the run."""

    model: str
    gpu: Gpu
    memory: tuple[Term, ...]
    time: tuple[Term, ...]

    @property
    def memory_gb(self) -> float:
        """Of one GPU, in 10^9 bytes."""
        return sum(term.value for term in self.memory)

    @property
    def fit(self) -> str:
        """Whether the run fits in the GPU's memory, for people."""
        return fit_in_memory(self.memory_gb, self.gpu)

    @property
    def gpu_hours(self) -> float:
        return next(term.value for term in self.time if term.name == "GPU-hours")


def fit_in_memory(memory_gb: float, gpu: Gpu) -> str:
    """Whether so much fits in the GPU's memory, for people."""
    if memory_gb > gpu.memory_gb:
        return "does not fit"
    return "fits" if memory_gb <= 0.9 * gpu.memory_gb else "tight: less than a tenth stays free"


def estimate(
    family: str, objective: ObjectiveConfig, training: TrainConfig, workers: int, gpu: str = "a100"
) -> Estimate:
    """Memory and time of a run with one GPU per worker. ``family`` is a key of FACTS, ``gpu`` of GPUS.

    Raises ConfigError with field and value.
    """
    _check(family, training, workers, gpu)
    facts = FACTS[family]
    return Estimate(
        model=facts.title,
        gpu=GPUS[gpu],
        memory=tuple(memory_terms(facts, objective, training, workers)),
        time=tuple(time_terms(facts, objective, training, workers, GPUS[gpu])),
    )


def _check(family: str, training: TrainConfig, workers: int, gpu: str) -> None:
    if family not in FACTS:
        raise ConfigError("family", family, f"must be one of {', '.join(FACTS)}")
    if gpu not in GPUS:
        raise ConfigError("gpu", gpu, f"must be one of {', '.join(GPUS)}")
    if workers < 1:
        raise ConfigError("workers", workers, "must be greater than 0")
    if workers > training.batch_size:
        raise ConfigError("workers", workers, f"must be at most training.batch_size = {training.batch_size}")


# ---- memory


def memory_terms(
    facts: Facts, objective: ObjectiveConfig, training: TrainConfig, workers: int
) -> Iterator[Term]:
    """The memory of one GPU while gradients are computed: the state of a whole model, text encoders, one
    micro-batch."""
    state = state_terms(objective.method, training, parameters_of(facts, training))
    for name, held in state.items():
        yield _state(name, held, training)
    yield _bytes("text encoders", StateTerm(facts.text_encoder_parameters, FLOAT32), "parameters", "float32")
    yield _batch(facts, objective, training, workers)
    yield _activations(facts, objective, training, workers)


_OPTIMIZER_STATE = {
    "adamw": ("trained parameters", "adamw moments"),
    "adamw_8bit": ("trained parameters", "adamw_8bit moments"),
    "adafactor": ("averages by row and column", "float32, adafactor"),
}


def _state(name: str, held: StateTerm, training: TrainConfig) -> Term:
    rank = training.lora.rank if training.lora else 0
    what, kind = {
        "weights": ("U-Net parameters", "float32"),
        "adapters": ("LoRA parameters", f"float32, rank {rank}"),
        "gradients": ("trained parameters", "float32"),
        "optimizer": _OPTIMIZER_STATE[training.optimizer],
        "reference": ("frozen parameters", "float32"),
        "average": ("trained parameters", "float32"),
        "casts": ("U-Net parameters", "bf16, autocast"),
    }[name]
    return _bytes(name, held, what, kind)


def _bytes(name: str, held: StateTerm, what: str, kind: str) -> Term:
    formula = f"{held.numbers / 1e6:,.1f}M {what} x {held.bytes_each} bytes ({kind})"
    return Term(name, formula, held.bytes / 1e9)


def _batch(facts: Facts, objective: ObjectiveConfig, training: TrainConfig, workers: int) -> Term:
    """Latents, noise (and z of `sampled`) of a micro-batch on each side, and one text."""
    _, pairs = micro_batch_counts(training, workers)
    kinds = 3 if draws_evaluation_points(objective) else 2
    tensors = sides_of(objective) * kinds
    latents = math.prod(facts.latent_shape)
    text = math.prod(facts.text_shape)
    formula = f"{pairs} pairs x ({tensors} x {latents:,} latents + {text:,} text) x 4 bytes"
    return Term("batch", formula, pairs * (tensors * latents + text) * FLOAT32 / 1e9)


def _activations(facts: Facts, objective: ObjectiveConfig, training: TrainConfig, workers: int) -> Term:
    _, pairs = micro_batch_counts(training, workers)
    sides = sides_of(objective)
    each = facts.activation_bytes[training.precision, training.gradient_checkpointing]
    how = "checkpointed" if training.gradient_checkpointing else "all kept"
    formula = f"{pairs} pairs x {sides_text(objective)} x {each / 1e9:.3f} GB ({training.precision}, {how})"
    return Term("activations", formula, pairs * sides * each / 1e9)


def sides_of(objective: ObjectiveConfig) -> int:
    """U-Net samples of a pair: winner and loser, or the winner alone. A pair of an on-policy method has one
    sample, which guidance runs with its caption and without."""
    method = METHODS[objective.method]
    if method.on_policy:
        return guided_rows(objective)
    return 2 if method.has_loser else 1


def guided_rows(objective: ObjectiveConfig) -> int:
    """U-Net samples of one pass of an on-policy method."""
    return 2 if objective.guidance_scale > 1 else 1


def draws_evaluation_points(objective: ObjectiveConfig) -> bool:
    """Whether each side has a sample z beside its noise."""
    return METHODS[objective.method].corrected and objective.calibration_point == "sampled"


def sides_text(objective: ObjectiveConfig) -> str:
    sides = sides_of(objective)
    if METHODS[objective.method].on_policy:
        return "1 sample" if sides == 1 else f"{sides} samples (guidance)"
    return "1 side" if sides == 1 else f"{sides} sides"


def parameters_of(facts: Facts, training: TrainConfig) -> Parameters:
    """Those of the U-Net, those that are trained (the same, or its adapters'), and Adafactor's averages of
    these."""
    if training.lora is None:
        return Parameters(facts.parameters, facts.parameters, facts.averages)
    text_width = facts.text_shape[1]
    averages = sum(
        count * adafactor_averages(shape)
        for count, shape in _lora_shapes(facts.blocks, text_width, training.lora)
    )
    return Parameters(facts.parameters, lora_parameters(facts.blocks, text_width, training.lora), averages)


def lora_parameters(blocks: dict[int, int], text_width: int, lora: LoraConfig) -> int:
    """Parameters of the adapters: rank (inputs + outputs) for each targeted linear layer of a transformer
    block (LoRA, arXiv 2106.09685).

    Raises ConfigError for a target outside of transformer blocks, whose layers are not counted here.
    """
    return sum(count * math.prod(shape) for count, shape in _lora_shapes(blocks, text_width, lora))


def _lora_shapes(
    blocks: dict[int, int], text_width: int, lora: LoraConfig
) -> Iterator[tuple[int, tuple[int, int]]]:
    """How many adapter matrices have which shape: two for each targeted layer."""
    if unknown := lora.unmatched(linear_layers(1, text_width)):
        reason = "must name linear layers of transformer blocks to be estimated"
        raise ConfigError("training.lora.targets", unknown[0], reason)
    for width, count in blocks.items():
        for name, (inputs, outputs) in linear_layers(width, text_width).items():
            if lora.matches(name):
                yield count, (lora.rank, inputs)
                yield count, (outputs, lora.rank)


def linear_layers(width: int, text_width: int) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of the linear layers of one transformer block: self-attention, cross-attention, a
    GEGLU."""
    return {
        "attn1.to_q": (width, width),
        "attn1.to_k": (width, width),
        "attn1.to_v": (width, width),
        "attn1.to_out.0": (width, width),
        "attn2.to_q": (width, width),
        "attn2.to_k": (text_width, width),
        "attn2.to_v": (text_width, width),
        "attn2.to_out.0": (width, width),
        "ff.net.0.proj": (width, 8 * width),
        "ff.net.2": (4 * width, width),
    }


# ---- time


def time_terms(
    facts: Facts, objective: ObjectiveConfig, training: TrainConfig, workers: int, gpu: Gpu
) -> Iterator[Term]:
    """From the passes of one sample to the hours of the run."""
    parts = passes(objective, training)
    passes_text = " + ".join(f"{count} {name}" for name, count in parts.items())
    yield Term("passes", passes_text, sum(parts.values()), "forwards")

    flops = pair_flops(facts, objective, training)
    forward = f"{facts.forward_flops / 1e12:.3f} TFLOP of one forward"
    text = f"{facts.text_flops / 1e12:.3f} of its text"
    arithmetic = f"passes x {sides_text(objective)} x {forward} + {text}"
    yield Term("arithmetic", arithmetic, flops / 1e12, "TFLOP a pair")

    mfu = published_mfu(facts)
    flops_per_s = mfu * gpu.peak
    speed = f"MFU {100 * mfu:.1f}% of peak {gpu.peak / 1e12:.0f}, as in Diffusion-DPO's runs"
    yield Term("speed", speed, flops_per_s / 1e12, "TFLOP/s")
    yield Term("pace", "speed / arithmetic", flops_per_s / flops, "pairs/s a GPU")

    visits = training.steps * training.batch_size
    hours = visits * flops / flops_per_s / 3600
    yield Term("GPU-hours", f"{training.steps} steps x {training.batch_size} pairs / pace", hours, "h")
    yield Term("time", f"GPU-hours / {workers} GPUs", hours / workers, "h")
    if reads_ledger(objective, training) and not training.draws:
        ledger = "steps x pairs x arithmetic of a forward / speed: once for all runs with the ledger's key"
        yield Term("ledger", ledger, visits * ledger_pair_flops(facts) / flops_per_s / 3600, "h")


def passes(objective: ObjectiveConfig, training: TrainConfig) -> dict[str, int]:
    """The U-Net passes of one sample, counted in forwards."""
    parts = {"forward": 1, "backward": 1 if training.lora else 2}
    if training.gradient_checkpointing:
        parts["recomputed"] = 1
    if runs_reference(objective.method, training):
        parts["reference"] = 1
    return parts


def reads_ledger(objective: ObjectiveConfig, training: TrainConfig) -> bool:
    """Whether the reference's errors are read from a ledger."""
    method = METHODS[objective.method]
    return method.has_reference and not method.on_policy and training.reference == "ledger"


def pair_flops(facts: Facts, objective: ObjectiveConfig, training: TrainConfig) -> float:
    """FLOPs of a pair in a training step: its text once, and the U-Net's passes on each side."""
    forwards = sides_of(objective) * sum(passes(objective, training).values())
    return facts.text_flops + forwards * facts.forward_flops


def ledger_pair_flops(facts: Facts) -> float:
    """FLOPs of a pair in the pass that writes a ledger: its text, and one forward on each side."""
    return facts.text_flops + 2 * facts.forward_flops


def public_recipe_flops(facts: Facts, passes: int) -> float:
    """FLOPs of a pair in a step of the public recipe: text, and on each side the VAE and the U-Net's
    ``passes``."""
    return facts.text_flops + 2 * (facts.vae_flops + passes * facts.forward_flops)


def published_mfu(facts: Facts) -> float:
    """MFU of the published run on A100s: its FLOPs over what its hours allow at peak."""
    run = facts.published
    flops = run.steps * run.batch_size * public_recipe_flops(facts, run.passes)
    return flops / (run.gpu_hours * 3600 * GPUS["a100"].peak)
