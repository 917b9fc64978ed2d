"""GPUs in nodes: memory of each, and what they send one another. Imports no torch.

Communication. DDP sums gradients once a step (all-reduce). FSDP2 gathers the weights for the forward and
again for the backward pass of every micro-batch, and for the forward of the frozen reference too; weights
outside of blocks stay gathered from one to the other. It scatters the summed gradients once a step
(`dde_core/models/parallel.py`). All of it is float32, since autocast leaves weights and gradients in float32.
A buffer of B bytes on n GPUs, g in each of m nodes, costs a GPU one way (gather or scatter; an all-reduce is
both)

    (g - 1) / g x B by NVLink, then (m - 1) / m x B / g by its own network card

which in one node, both ways, is the ring's 2 (n - 1) / n x B. Latency is left out; it shows with hundreds of
GPUs and small blocks.

Memory. FSDP2 splits the state of the model into n shards, with three exceptions: gradients of several
micro-batches accumulate unsharded until they are scattered (torch keeps them while
``set_requires_gradient_sync(False)``), autocast keeps its bf16 copies unsharded until the forward ends, and
blocks are gathered while they compute.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt, Le

from dde_core.config import ObjectiveConfig, TrainConfig, check
from dde_core.errors import ConfigError
from dde_core.parallelism import (
    FLOAT32,
    Parallelism,
    choose_parallelism,
    holds_reference,
    micro_batch_counts,
    runs_reference,
)
from dde_core.planning.estimate import Term, memory_terms, parameters_of
from dde_core.planning.facts import GPUS, Facts, Gpu

SHARDED = ("weights", "adapters", "gradients", "optimizer", "reference", "average")
"""Terms of the memory that FSDP2 shards."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """GPUs of one kind in nodes of ``gpus_per_node``.

    ``interconnect_gb_s`` is what each GPU sends to other nodes in one direction, ``price_usd`` the price of a
    GPU-hour; None takes `facts.GPUS`. The fraction ``overlap`` of the arithmetic that runs beside
    communication hides it: a guess until it is measured. Raises ConfigError with field and value.
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
    def gpus_of_a_full_node(self) -> int:
        return min(self.gpus, self.gpus_per_node)

    @property
    def nodes(self) -> int:
        return -(-self.gpus // self.gpus_per_node)

    @property
    def between_gb_s(self) -> float:
        """Rate of one GPU's network card, in one direction."""
        return self.interconnect_gb_s or self.kind.node_gb_s

    @property
    def usd_per_hour(self) -> float:
        """Price of one GPU."""
        return self.price_usd or self.kind.usd_per_hour

    def inside(self, size: float) -> float:
        """How much of a buffer that is gathered or scattered reaches a GPU from its own node."""
        return size * (self.gpus_of_a_full_node - 1) / self.gpus_of_a_full_node

    def between(self, size: float) -> float:
        """How much of it passes through a GPU's network card."""
        return size / self.gpus_of_a_full_node * (self.nodes - 1) / self.nodes

    def seconds(self, gigabytes: float) -> float:
        """Time to gather or scatter a buffer."""
        return self.inside(gigabytes) / self.kind.nvlink_gb_s + self.between(gigabytes) / self.between_gb_s


# ---- communication


def communication_terms(
    facts: Facts, objective: ObjectiveConfig, training: TrainConfig, gpus: int, parallelism: Parallelism
) -> Iterator[Term]:
    """GB that are gathered or scattered in a step, as sizes of the unsharded buffers."""
    if parallelism == "ddp":
        yield from _ddp_terms(facts, training)
    if parallelism == "fsdp":
        yield from _fsdp_terms(facts, objective, training, gpus)


def _ddp_terms(facts: Facts, training: TrainConfig) -> Iterator[Term]:
    trained = parameters_of(facts, training).trained
    formula = f"2 ways x {trained / 1e6:,.1f}M trained parameters x 4 bytes (all-reduce)"
    yield Term("gradients", formula, 2 * (trained * FLOAT32 / 1e9))


def _fsdp_terms(facts: Facts, objective: ObjectiveConfig, training: TrainConfig, gpus: int) -> Iterator[Term]:
    parameters = parameters_of(facts, training)
    base = parameters.base
    trained = parameters.trained
    numbers = base + trained if training.lora else base
    outside = facts.outside_blocks
    count, _ = micro_batch_counts(training, gpus)
    stay = f"{outside / 1e6:,.1f}M outside of blocks, which stay"
    gathered = f"x {numbers / 1e6:,.1f}M parameters - {stay}) x 4 bytes (all-gather)"

    both_gb = (2 * numbers - outside) * FLOAT32 / 1e9
    yield Term("weights", f"{count} micro-batches x (forward and backward {gathered}", count * both_gb)
    if runs_reference(objective.method, training):
        forward_gb = (numbers - outside) * FLOAT32 / 1e9
        yield Term("reference", f"{count} micro-batches x (forward {gathered}", count * forward_gb)
    scattered = f"{trained / 1e6:,.1f}M trained parameters x 4 bytes (reduce-scatter)"
    yield Term("gradients", scattered, trained * FLOAT32 / 1e9)


# ---- memory


def memory_of(
    facts: Facts, objective: ObjectiveConfig, training: TrainConfig, gpus: int
) -> dict[Parallelism, tuple[Term, ...]]:
    """Memory of one GPU with a whole model ("none" on one GPU, else "ddp"), and with its shard."""
    whole = tuple(memory_terms(facts, objective, training, gpus))
    if gpus == 1:
        return {"none": whole}
    return {"ddp": whole, "fsdp": tuple(_sharded_terms(facts, objective, training, gpus, whole))}


def _sharded_terms(
    facts: Facts, objective: ObjectiveConfig, training: TrainConfig, gpus: int, whole: tuple[Term, ...]
) -> Iterator[Term]:
    """The terms of a whole model as FSDP2 shards them, and what is gathered at one time: the block that
    computes, the next one, and the parameters outside of blocks, of policy and frozen reference."""
    count, _ = micro_batch_counts(training, gpus)
    accumulates = count > 1
    for term in whole:
        if term.name == "gradients" and accumulates:
            yield Term(term.name, f"{term.formula}, unsharded until the last micro-batch", term.value)
        elif term.name in SHARDED:
            yield Term(term.name, f"{term.formula} / {gpus} GPUs", term.value / gpus)
        else:
            yield term
    models = 2 if holds_reference(objective.method, training) else 1
    outside = f"{models} x {facts.outside_blocks / 1e6:,.1f}M outside of blocks"
    block = f"2 blocks x {facts.largest_block / 1e6:,.1f}M"
    numbers = models * facts.outside_blocks + 2 * facts.largest_block
    yield Term("gathered", f"({outside} + {block}) x 4 bytes", numbers * FLOAT32 / 1e9)
    if not accumulates:
        yield Term("scattered", f"{block} gradients x 4 bytes", 2 * facts.largest_block * FLOAT32 / 1e9)


def parallelism_on(
    cluster: Cluster, facts: Facts, objective: ObjectiveConfig, training: TrainConfig
) -> Parallelism:
    """What ``training.parallelism`` resolves to on this cluster. Raises ConfigError for FSDP2 with an
    optimizer that cannot be sharded."""
    parameters = parameters_of(facts, training)
    gpu_bytes = cluster.kind.cuda_gb * 1e9
    return choose_parallelism(objective.method, training, parameters, gpu_bytes, cluster.gpus)
