"""GPUs in nodes: what a model takes on each, and what they send one another. Imports no torch.

Exchange. DDP adds gradients up once a step (all-reduce). FSDP2 gathers the weights for the forward and again for the backward
pass of every micro-batch (for the frozen reference's forward too), but for those outside of blocks, which stay from one to the
other, and scatters the sums of gradients once a step (`models/parallel.py`). All of it is float32, since autocast leaves
weights and gradients so. A buffer of B bytes on n GPUs, g in each of m nodes, costs a GPU one way (gather or scatter; an
all-reduce is both)

    (g - 1) / g x B by NVLink, then (m - 1) / m x B / g by its own network card

which in one node, both ways, is the ring's 2 (n - 1) / n x B. Latency is left out: with hundreds of GPUs and small blocks it
shows.

Memory. FSDP2 cuts what belongs to the weights into n parts. But gradients of several micro-batches add up whole before they are
scattered (torch keeps them so while ``set_requires_gradient_sync(False)``), autocast keeps its bf16 copies whole until the
forward is done, and the blocks in work are whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from dde_core.config import ObjectiveConfig, TrainConfig, check
from dde_core.errors import ConfigError
from dde_core.planning.estimate import (
    Term,
    memory_terms,
    pairs_at_a_time,
    pairs_of_a_worker,
    runs_reference,
    trained_parameters,
)
from dde_core.planning.facts import FLOAT32, GPUS, Facts, Gpu

Parallelism = Literal["none", "ddp", "fsdp"]

AUTO_ROOM = 0.7
"""The part of a GPU's memory that the state may take before `models/parallel.py` shares the model out."""
STATE = ("weights", "gradients", "optimizer", "reference", "average", "casts")
"""Terms of the memory that it counts."""
CUT = ("weights", "adapters", "gradients", "optimizer", "reference", "average")
"""Terms of the memory of which FSDP2 leaves a GPU its part."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """GPUs of one kind in nodes of ``gpus_per_node``. ``interconnect_gb_s`` is what each sends to other nodes in one direction,
    ``price_usd`` that of a GPU-hour; None: as `facts.GPUS` has it. Exchange is hidden behind the part ``overlap`` of the
    arithmetic that goes on beside it: a guess until it is measured.

    Raises ConfigError with field and value.
    """

    gpus: Annotated[int, Gt(0)]
    gpu: str = "a100"
    gpus_per_node: Annotated[int, Gt(0)] = 8
    interconnect_gb_s: Annotated[float | None, Gt(0)] = None
    price_usd: Annotated[float | None, Gt(0)] = None
    overlap: Annotated[float, Ge(0), Le(1)] = 0.5

    def __post_init__(self) -> None:
        if self.gpu not in GPUS:
            raise ConfigError("gpu", self.gpu, f"must be one of {', '.join(GPUS)}")
        check(self)

    @property
    def kind(self) -> Gpu:
        return GPUS[self.gpu]

    @property
    def in_a_node(self) -> int:
        """GPUs of a full node."""
        return min(self.gpus, self.gpus_per_node)

    @property
    def nodes(self) -> int:
        return -(-self.gpus // self.gpus_per_node)

    @property
    def between_gb_s(self) -> float:
        """By one GPU's network card."""
        return self.interconnect_gb_s or self.kind.node_gb_s

    @property
    def usd_per_hour(self) -> float:
        """Of one GPU."""
        return self.price_usd or self.kind.usd_per_hour

    def inside(self, size: float) -> float:
        """What of a buffer that is gathered or scattered a GPU gets from its own node."""
        return size * (self.in_a_node - 1) / self.in_a_node

    def between(self, size: float) -> float:
        """What of it comes through its network card."""
        return size / self.in_a_node * (self.nodes - 1) / self.nodes

    def seconds(self, gigabytes: float) -> float:
        """For a buffer to be gathered or scattered."""
        return self.inside(gigabytes) / self.kind.nvlink_gb_s + self.between(gigabytes) / self.between_gb_s


# ---- exchange


def exchange_terms(
    facts: Facts, objective: ObjectiveConfig, training: TrainConfig, gpus: int, parallelism: Parallelism
) -> Iterator[Term]:
    """GB that are gathered or scattered in a step, as buffers before they are cut."""
    trained, count = trained_parameters(facts, training), micro_batches(training, gpus)
    gradients = trained * FLOAT32 / 1e9
    if parallelism == "ddp":
        yield Term(
            "gradients",
            f"2 ways x {trained / 1e6:,.1f}M trained parameters x 4 bytes (all-reduce)",
            2 * gradients,
        )
    if parallelism == "fsdp":
        numbers, outside = facts.parameters + (trained if training.lora else 0), facts.outside_blocks
        shown = f"x {numbers / 1e6:,.1f}M parameters - {outside / 1e6:,.1f}M outside of blocks, which stay) x 4 bytes (all-gather)"
        forward, both = ((times * numbers - outside) * FLOAT32 / 1e9 for times in (1, 2))
        yield Term("weights", f"{count} micro-batches x (forward and backward {shown}", count * both)
        if runs_reference(objective, training):
            yield Term("reference", f"{count} micro-batches x (forward {shown}", count * forward)
        yield Term(
            "gradients", f"{trained / 1e6:,.1f}M trained parameters x 4 bytes (reduce-scatter)", gradients
        )


def micro_batches(training: TrainConfig, gpus: int) -> int:
    """Forwards and backwards of a GPU in one step."""
    return -(-pairs_of_a_worker(training, gpus) // pairs_at_a_time(training, gpus))


# ---- memory


def memory_of(
    facts: Facts, objective: ObjectiveConfig, training: TrainConfig, gpus: int
) -> dict[Parallelism, tuple[Term, ...]]:
    """Of one GPU that holds a whole model ("none" on one GPU, else "ddp"), and of one that holds its part."""
    whole = tuple(memory_terms(facts, objective, training, gpus))
    if gpus == 1:
        return {"none": whole}
    return {"ddp": whole, "fsdp": tuple(_shared_out(facts, objective, training, gpus, whole))}


def _shared_out(
    facts: Facts, objective: ObjectiveConfig, training: TrainConfig, gpus: int, whole: tuple[Term, ...]
) -> Iterator[Term]:
    """The terms of a whole model as FSDP2 leaves them on a GPU, and what is gathered at one time: two blocks, that in work and
    the next, and what lies outside of blocks, the frozen reference's besides."""
    adding_up = micro_batches(training, gpus) > 1
    for term in whole:
        if term.name == "gradients" and adding_up:
            yield Term(term.name, f"{term.formula}, whole until the last micro-batch", term.value)
        elif term.name in CUT:
            yield Term(term.name, f"{term.formula} / {gpus} GPUs", term.value / gpus)
        else:
            yield term
    copies = 2 if runs_reference(objective, training) and not training.lora else 1
    outside, block = (f"{numbers / 1e6:,.1f}M" for numbers in (facts.outside_blocks, facts.largest_block))
    numbers = copies * facts.outside_blocks + 2 * facts.largest_block
    yield Term(
        "gathered",
        f"({copies} x {outside} outside of blocks + 2 blocks x {block}) x 4 bytes",
        numbers * FLOAT32 / 1e9,
    )
    if not adding_up:
        yield Term(
            "scattered", f"2 blocks x {block} gradients x 4 bytes", 2 * facts.largest_block * FLOAT32 / 1e9
        )


def chosen(training: TrainConfig, memory: dict[Parallelism, tuple[Term, ...]], gpu: Gpu) -> Parallelism:
    """What ``training.parallelism`` comes to, as in `models/parallel.py`. Raises ConfigError for 8-bit moments on parts."""
    if "none" in memory:
        return "none"
    asked = training.parallelism
    if asked == "auto":
        state = sum(term.value for term in memory["ddp"] if term.name in STATE)
        asked = "ddp" if state <= AUTO_ROOM * gpu.cuda_gb else "fsdp"
    if asked == "fsdp" and training.optimizer == "adamw_8bit":
        raise ConfigError(
            "training.optimizer", training.optimizer, 'does not go with training.parallelism "fsdp"'
        )
    return asked
