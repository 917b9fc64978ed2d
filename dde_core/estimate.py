"""What a full-size run needs: memory of one GPU and GPU-hours, each a sum of terms with its formula. Imports no torch.

Memory is counted in GB of 10^9 bytes while gradients are computed. Not in it: CUDA's context, cuDNN's workspaces, the
allocator's gaps and what the optimizer takes for a moment (nothing where it is fused), for which a tenth should stay free.

Time is arithmetic divided by speed. The arithmetic of a pair is that of its U-Net passes: a backward pass is two forward
ones (one where the weights are frozen and adapters are trained), gradient checkpointing does the forward once more, the
frozen reference is one more, or none where its errors are read from a ledger. The speed is a share of the GPU's peak, and
that share is what Diffusion-DPO's published A100-hours come to for the arithmetic of that run. Those hours also paid for
encoding every picture in every epoch, which here is done once, before training; other GPUs are taken to reach the same share
of their peak, which a faster one seldom does. So hours are an order of magnitude, good for comparing runs and for asking for
machines.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from dde_core.config import CALIBRATED, LoraConfig, ObjectiveConfig, TrainConfig
from dde_core.errors import ConfigError

FLOAT32, BFLOAT16 = 4, 2
"""Bytes of a number."""


@dataclass(frozen=True)
class Gpu:
    """``peak`` is dense bf16 FLOP/s, ``memory_gb`` as sold: both from NVIDIA's data sheets, the SXM variants."""

    title: str
    peak: float
    memory_gb: float


GPUS: dict[str, Gpu] = {
    "a100": Gpu("A100 80 GB", 312e12, 80),
    "h100": Gpu("H100 80 GB", 989e12, 80),
    "h200": Gpu("H200 141 GB", 989e12, 141),
}


@dataclass(frozen=True)
class Published:
    """A run of Diffusion-DPO (arXiv 2311.12908) on 16 A100s, from the launch scripts of its repository
    (SalesforceAIResearch/DiffusionDPO). ``passes`` are the U-Net forwards that a sample cost there: 1 + 2 backward + 1
    reference, and 1 more with gradient checkpointing, which its README says is on for SDXL alone."""

    gpu_hours: float
    steps: int
    passes: int
    batch_size: int = 2048


@dataclass(frozen=True)
class Facts:
    """One model at its own resolution. Counts and FLOPs are recounted by `tests/core/test_estimate.py`, on tensors without
    storage: parameters, multiply-adds times two of one forward of one sample, and the bytes that live at once beyond
    weights and gradients in forward and backward of one sample, by precision and gradient checkpointing.

    ``blocks`` has for each width of the U-Net the number of its transformer blocks.
    """

    title: str
    parameters: int
    text_encoder_parameters: int
    forward_flops: float
    activation_bytes: dict[tuple[str, bool], float]
    latent_shape: tuple[int, int, int]
    text_shape: tuple[int, int]
    blocks: dict[int, int]
    published: Published


FACTS: dict[str, Facts] = {
    "sd15": Facts(
        title="Stable Diffusion 1.5 at 512 px",
        parameters=859_520_964,
        text_encoder_parameters=123_060_480,  # CLIP ViT-L/14
        forward_flops=0.8033e12,
        activation_bytes={
            ("bf16", False): 1.261e9,
            ("bf16", True): 0.281e9,
            ("fp32", False): 1.903e9,
            ("fp32", True): 0.483e9,
        },
        latent_shape=(4, 64, 64),
        text_shape=(77, 768),
        blocks={320: 5, 640: 5, 1280: 6},
        published=Published(gpu_hours=384, steps=2000, passes=4),  # "~24 hours / 2000 steps"
    ),
    "sdxl": Facts(
        title="SDXL at 1024 px",
        parameters=2_567_463_684,
        text_encoder_parameters=123_060_480 + 694_659_840,  # CLIP ViT-L/14 and OpenCLIP ViT-bigG/14
        forward_flops=6.761e12,
        activation_bytes={
            ("bf16", False): 8.726e9,
            ("bf16", True): 0.892e9,
            ("fp32", False): 13.82e9,
            ("fp32", True): 1.449e9,
        },
        latent_shape=(4, 128, 128),
        text_shape=(77, 2048),
        blocks={640: 10, 1280: 60},
        published=Published(gpu_hours=4800, steps=2000, passes=5),  # "~30 hours / 200 steps"
    ),
}


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
        if self.memory_gb > self.gpu.memory_gb:
            return "does not fit"
        return "fits" if self.memory_gb <= 0.9 * self.gpu.memory_gb else "tight: less than a tenth stays free"

    @property
    def gpu_hours(self) -> float:
        return next(term.value for term in self.time if term.name == "GPU-hours")


def estimate(family: str, objective: ObjectiveConfig, training: TrainConfig, workers: int, gpu: str = "a100") -> Estimate:
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


def memory_terms(facts: Facts, objective: ObjectiveConfig, training: TrainConfig, workers: int) -> Iterator[Term]:
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
    kinds = 3 if objective.method in CALIBRATED and objective.calibration_point == "sampled" else 2
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
    """`sft` sees winners alone."""
    return 1 if objective.method == "sft" else 2


def spelled(sides: int) -> str:
    return "1 side" if sides == 1 else f"{sides} sides"


def trained_parameters(facts: Facts, training: TrainConfig) -> int:
    """All of the U-Net's, or its adapters'."""
    return lora_parameters(facts.blocks, facts.text_shape[1], training.lora) if training.lora else facts.parameters


def lora_parameters(blocks: dict[int, int], text_width: int, lora: LoraConfig) -> int:
    """rank (inputs + outputs) for every linear layer of a transformer block that a target names (LoRA, arXiv 2106.09685).

    Raises ConfigError for a target outside of these blocks: their layers alone are known here.
    """
    total = 0
    for width, count in blocks.items():
        for name, (inputs, outputs) in linear_layers(width, text_width).items():
            total += count * lora.rank * (inputs + outputs) if lora.matches(name) else 0
    if unknown := lora.unmatched(linear_layers(1, text_width)):
        raise ConfigError("training.lora.targets", unknown[0], "must name linear layers of transformer blocks to be estimated")
    return total


def linear_layers(width: int, text_width: int) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of the linear layers of one transformer block: self-attention, cross-attention, a GEGLU."""
    layers = {f"{attention}.{name}": (width, width) for attention in ("attn1", "attn2") for name in ("to_q", "to_out.0")}
    layers |= {f"attn1.{name}": (width, width) for name in ("to_k", "to_v")}
    layers |= {f"attn2.{name}": (text_width, width) for name in ("to_k", "to_v")}
    return layers | {"ff.net.0.proj": (width, 8 * width), "ff.net.2": (4 * width, width)}


# ---- time


def time_terms(facts: Facts, objective: ObjectiveConfig, training: TrainConfig, workers: int, gpu: Gpu) -> Iterator[Term]:
    """From one sample's passes to the hours of the run."""
    parts = passes(objective, training)
    flops = sides_of(objective) * sum(parts.values()) * facts.forward_flops
    share = published_share(facts)
    pairs = training.steps * training.batch_size
    hours = pairs * flops / (share * gpu.peak) / 3600
    yield Term("passes", " + ".join(f"{count} {name}" for name, count in parts.items()), sum(parts.values()), "forwards")
    arithmetic = f"passes x {spelled(sides_of(objective))} x {facts.forward_flops / 1e12:.3f} TFLOP of one forward"
    yield Term("arithmetic", arithmetic, flops / 1e12, "TFLOP a pair")
    speed = f"{100 * share:.1f}% of peak {gpu.peak / 1e12:.0f}, Diffusion-DPO's share"
    yield Term("speed", speed, share * gpu.peak / 1e12, "TFLOP/s")
    yield Term("pace", "speed / arithmetic", share * gpu.peak / flops, "pairs/s a GPU")
    yield Term("GPU-hours", f"{training.steps} steps x {training.batch_size} pairs / pace", hours, "h")
    yield Term("time", f"GPU-hours / {workers} GPUs", hours / workers, "h")
    if objective.method != "sft" and training.reference == "ledger" and not training.draws:
        once = "a forward of every visit, once for all runs with its key: GPU-hours / passes"
        yield Term("ledger", once, hours / sum(parts.values()), "h")


def passes(objective: ObjectiveConfig, training: TrainConfig) -> dict[str, int]:
    """The U-Net passes of one sample, counted in forwards."""
    parts = {"forward": 1, "backward": 1 if training.lora else 2}
    parts |= {"recomputed": 1} if training.gradient_checkpointing else {}
    return parts | ({"reference": 1} if runs_reference(objective, training) else {})


def runs_reference(objective: ObjectiveConfig, training: TrainConfig) -> bool:
    """Whether the frozen model runs in every step. Not for `sft`, nor on a ledger."""
    return objective.method != "sft" and training.reference != "ledger"


def published_share(facts: Facts) -> float:
    """What part of an A100's peak the published run's U-Net passes made use of."""
    run = facts.published
    flops = run.steps * run.batch_size * 2 * run.passes * facts.forward_flops
    return flops / (run.gpu_hours * 3600 * GPUS["a100"].peak)
