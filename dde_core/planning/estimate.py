"""What a full-size run needs: memory of one GPU and GPU-hours, each a sum of terms with its formula. Imports no torch.

Memory is counted in GB of 10^9 bytes while gradients are computed. Not in it: CUDA's context, cuDNN's workspaces, the
allocator's gaps and what the optimizer takes for a moment (nothing where it is fused), for which a tenth should stay free.

Time is arithmetic divided by speed. The arithmetic of a pair is its text and its U-Net passes: a backward pass is two forward
ones (one where the weights are frozen and adapters are trained), gradient checkpointing does the forward once more, the
frozen reference is one more, or none where its errors are read from a ledger. The speed is a share of the GPU's peak, and
that share is what Diffusion-DPO's published A100-hours come to for the arithmetic of that run, in which the VAE encoded every
picture in every epoch. Other GPUs are taken to reach the same share of their peak, which a faster one seldom does. So hours
are an order of magnitude, good for comparing runs and for asking for machines; `dde_core/planning/plan.py` goes further.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from dde_core.config import LoraConfig, ObjectiveConfig, TrainConfig
from dde_core.errors import ConfigError
from dde_core.methods import METHODS
from dde_core.planning.facts import BFLOAT16, FACTS, FLOAT32, GPUS, Facts, Gpu


@dataclass(frozen=True)
class Term:
    """One line of an estimate: ``formula`` in words with its numbers, ``value`` in ``unit``."""

    name: str
    formula: str
    value: float
    unit: str = "GB"


@dataclass(frozen=True)
class Estimate:
    """``memory`` adds up to ``memory_gb``; ``time`` leads from one sample's arithmetic to the run's hours."""

    model: str
    gpu: Gpu
    memory: tuple[Term, ...]
    time: tuple[Term, ...]

    @property
    def memory_gb(self) -> float:
        """Of one GPU, in 10^9 bytes."""
        return sum(term.value for term in self.memory)

    @property
    def room(self) -> str:
        """Whether the memory suffices, in words."""
        return room_of(self.memory_gb, self.gpu)

    @property
    def gpu_hours(self) -> float:
        return next(term.value for term in self.time if term.name == "GPU-hours")


def room_of(memory_gb: float, gpu: Gpu) -> str:
    """Whether a GPU's memory suffices, in words."""
    if memory_gb > gpu.memory_gb:
        return "does not fit"
    return "fits" if memory_gb <= 0.9 * gpu.memory_gb else "tight: less than a tenth stays free"


def estimate(
    family: str, objective: ObjectiveConfig, training: TrainConfig, workers: int, gpu: str = "a100"
) -> Estimate:
    """Memory and time of a run with one GPU a worker. ``family`` is a key of FACTS, ``gpu`` of GPUS.

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
    for field, value, known in (("family", family, FACTS), ("gpu", gpu, GPUS)):
        if value not in known:
            raise ConfigError(field, value, f"must be one of {', '.join(known)}")
    if workers < 1:
        raise ConfigError("workers", workers, "must be greater than 0")
    if workers > training.batch_size:
        raise ConfigError("workers", workers, f"must be at most training.batch_size = {training.batch_size}")


# ---- memory


def memory_terms(
    facts: Facts, objective: ObjectiveConfig, training: TrainConfig, workers: int
) -> Iterator[Term]:
    """What lies on one GPU while gradients are computed."""
    all_of_it, trained = facts.parameters, trained_parameters(facts, training)
    moments = 2 * (1 if training.optimizer == "adamw_8bit" else FLOAT32)
    yield _bytes("weights", all_of_it, "U-Net parameters", FLOAT32, "float32")
    if training.lora:
        yield _bytes("adapters", trained, "LoRA parameters", FLOAT32, f"float32, rank {training.lora.rank}")
    yield _bytes("gradients", trained, "trained parameters", FLOAT32, "float32")
    yield _bytes("optimizer", trained, "trained parameters", moments, f"{training.optimizer} moments")
    if runs_reference(objective, training) and not training.lora:
        yield _bytes("reference", all_of_it, "frozen parameters", FLOAT32, "float32")
    if training.ema_decay:
        yield _bytes("average", trained, "trained parameters", FLOAT32, "float32")
    if training.precision == "bf16":
        yield _bytes("casts", all_of_it, "U-Net parameters", BFLOAT16, "bf16, autocast")
    yield _bytes("text encoders", facts.text_encoder_parameters, "parameters", FLOAT32, "float32")
    yield _batch(facts, objective, training, workers)
    yield _activations(facts, objective, training, workers)


def _bytes(name: str, count: int, what: str, bytes_each: int, kind: str) -> Term:
    return Term(name, f"{count / 1e6:,.1f}M {what} x {bytes_each} bytes ({kind})", count * bytes_each / 1e9)


def _batch(facts: Facts, objective: ObjectiveConfig, training: TrainConfig, workers: int) -> Term:
    """Latents, noise (and z of `sampled`) of a micro-batch on each side, and one text."""
    pairs, sides = pairs_at_a_time(training, workers), sides_of(objective)
    kinds = 3 if draws_evaluation_points(objective) else 2
    latents, text = math.prod(facts.latent_shape), math.prod(facts.text_shape)
    formula = f"{pairs} pairs x ({sides * kinds} x {latents:,} latents + {text:,} text) x 4 bytes"
    return Term("batch", formula, pairs * (sides * kinds * latents + text) * FLOAT32 / 1e9)


def _activations(facts: Facts, objective: ObjectiveConfig, training: TrainConfig, workers: int) -> Term:
    pairs, sides = pairs_at_a_time(training, workers), sides_of(objective)
    each = facts.activation_bytes[training.precision, training.gradient_checkpointing]
    how = "checkpointed" if training.gradient_checkpointing else "all kept"
    formula = f"{pairs} pairs x {spelled(sides)} x {each / 1e9:.3f} GB ({training.precision}, {how})"
    return Term("activations", formula, pairs * sides * each / 1e9)


def pairs_of_a_worker(training: TrainConfig, workers: int) -> int:
    """The largest share of the global batch that one worker has."""
    return -(-training.batch_size // workers)


def pairs_at_a_time(training: TrainConfig, workers: int) -> int:
    """Pairs in one forward and backward; the gradients of several add up."""
    share = pairs_of_a_worker(training, workers)
    return min(training.micro_batch_size or share, share)


def sides_of(objective: ObjectiveConfig) -> int:
    """U-Net samples of a pair: winner and loser, or the winner alone."""
    return 2 if METHODS[objective.method].has_loser else 1


def draws_evaluation_points(objective: ObjectiveConfig) -> bool:
    """Whether each side has a sample z beside its noise."""
    return METHODS[objective.method].corrected and objective.calibration_point == "sampled"


def spelled(sides: int) -> str:
    return "1 side" if sides == 1 else f"{sides} sides"


def trained_parameters(facts: Facts, training: TrainConfig) -> int:
    """All of the U-Net's, or its adapters'."""
    return (
        lora_parameters(facts.blocks, facts.text_shape[1], training.lora)
        if training.lora
        else facts.parameters
    )


def lora_parameters(blocks: dict[int, int], text_width: int, lora: LoraConfig) -> int:
    """rank (inputs + outputs) for every linear layer of a transformer block that a target names (LoRA, arXiv 2106.09685).

    Raises ConfigError for a target outside of these blocks: their layers alone are known here.
    """
    total = 0
    for width, count in blocks.items():
        for name, (inputs, outputs) in linear_layers(width, text_width).items():
            total += count * lora.rank * (inputs + outputs) if lora.matches(name) else 0
    if unknown := lora.unmatched(linear_layers(1, text_width)):
        raise ConfigError(
            "training.lora.targets",
            unknown[0],
            "must name linear layers of transformer blocks to be estimated",
        )
    return total


def linear_layers(width: int, text_width: int) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of the linear layers of one transformer block: self-attention, cross-attention, a GEGLU."""
    layers = {
        f"{attention}.{name}": (width, width)
        for attention in ("attn1", "attn2")
        for name in ("to_q", "to_out.0")
    }
    layers |= {f"attn1.{name}": (width, width) for name in ("to_k", "to_v")}
    layers |= {f"attn2.{name}": (text_width, width) for name in ("to_k", "to_v")}
    return layers | {"ff.net.0.proj": (width, 8 * width), "ff.net.2": (4 * width, width)}


# ---- time


def time_terms(
    facts: Facts, objective: ObjectiveConfig, training: TrainConfig, workers: int, gpu: Gpu
) -> Iterator[Term]:
    """From one sample's passes to the hours of the run."""
    parts = passes(objective, training)
    flops, share = pair_flops(facts, objective, training), published_share(facts)
    pairs = training.steps * training.batch_size
    hours = pairs * flops / (share * gpu.peak) / 3600
    yield Term(
        "passes",
        " + ".join(f"{count} {name}" for name, count in parts.items()),
        sum(parts.values()),
        "forwards",
    )
    arithmetic = (
        f"passes x {spelled(sides_of(objective))} x {facts.forward_flops / 1e12:.3f} TFLOP of one forward"
    )
    arithmetic += f" + {facts.text_flops / 1e12:.3f} of its text"
    yield Term("arithmetic", arithmetic, flops / 1e12, "TFLOP a pair")
    speed = f"{100 * share:.1f}% of peak {gpu.peak / 1e12:.0f}, Diffusion-DPO's share"
    yield Term("speed", speed, share * gpu.peak / 1e12, "TFLOP/s")
    yield Term("pace", "speed / arithmetic", share * gpu.peak / flops, "pairs/s a GPU")
    yield Term("GPU-hours", f"{training.steps} steps x {training.batch_size} pairs / pace", hours, "h")
    yield Term("time", f"GPU-hours / {workers} GPUs", hours / workers, "h")
    if reads_ledger(objective, training) and not training.draws:
        once = "a forward of every visit, once for all runs with its key: steps x pairs x arithmetic of a forward / speed"
        yield Term("ledger", once, pairs * forward_flops(facts) / (share * gpu.peak) / 3600, "h")


def passes(objective: ObjectiveConfig, training: TrainConfig) -> dict[str, int]:
    """The U-Net passes of one sample, counted in forwards."""
    parts = {"forward": 1, "backward": 1 if training.lora else 2}
    parts |= {"recomputed": 1} if training.gradient_checkpointing else {}
    return parts | ({"reference": 1} if runs_reference(objective, training) else {})


def pair_flops(facts: Facts, objective: ObjectiveConfig, training: TrainConfig) -> float:
    """FLOPs of a pair in a training step: its text once, and the U-Net's passes on each side."""
    return (
        facts.text_flops
        + sides_of(objective) * sum(passes(objective, training).values()) * facts.forward_flops
    )


def forward_flops(facts: Facts) -> float:
    """FLOPs of a pair in a ledger's pass: its text, and one forward on each side."""
    return facts.text_flops + 2 * facts.forward_flops


def public_recipe_flops(facts: Facts, passes: int) -> float:
    """FLOPs of a pair in a step of the public recipe: text, and on each side the VAE and the U-Net's ``passes``."""
    return facts.text_flops + 2 * (facts.vae_flops + passes * facts.forward_flops)


def runs_reference(objective: ObjectiveConfig, training: TrainConfig) -> bool:
    """Whether the frozen reference runs in every step."""
    return METHODS[objective.method].has_reference and training.reference != "ledger"


def reads_ledger(objective: ObjectiveConfig, training: TrainConfig) -> bool:
    """Whether the reference's errors are read from a ledger."""
    return METHODS[objective.method].has_reference and training.reference == "ledger"


def published_share(facts: Facts) -> float:
    """What part of an A100's peak the published run made use of."""
    run = facts.published
    flops = run.steps * run.batch_size * public_recipe_flops(facts, run.passes)
    return flops / (run.gpu_hours * 3600 * GPUS["a100"].peak)
