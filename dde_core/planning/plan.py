"""A run on a cluster: seconds of a step, memory of a GPU, bytes of data, checkpoints, hours and price. Imports no torch.

Every number is a sum, product or quotient of terms with their formulas. The arithmetic is `estimate.py`'s at a share of the
GPU's peak (`speed.py`), exchange and memory are `cluster.py`'s. Exchange is hidden behind a part (``Cluster.overlap``) of the
arithmetic beside it: DDP's the backward pass of the last micro-batch, FSDP2's the whole step. What is longer is exposed. The
optimizer waits for the GPU's memory: its bytes over what the memory gives. Training stands while a checkpoint is copied to
pageable memory of the host (with FSDP2 each tensor is gathered before); storing it goes on beside. Of the data every node
fetches whole shards, once an epoch where its cache is smaller than the dataset, and every GPU takes its rows. Encoding
pictures, and the ledger's pass where the job asks for one, are arithmetic at the same share.

A share of the peak that was measured, or is of published hours, holds the optimizer of those steps already: here it is counted
once more, as what grows beside the arithmetic when a GPU has few pairs. Not in it: start-up, validation, evaluation,
stragglers, failures and the latency of networks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from dde_core.config import LoraConfig, ObjectiveConfig, TrainConfig
from dde_core.errors import ConfigError
from dde_core.methods import METHODS
from dde_core.planning.cluster import Cluster, Parallelism, chosen, exchange_terms, memory_of, micro_batches
from dde_core.planning.estimate import (
    Term,
    draws_evaluation_points,
    forward_flops,
    pair_flops,
    pairs_of_a_worker,
    passes,
    reads_ledger,
    room_of,
    runs_reference,
    sides_of,
    trained_parameters,
)
from dde_core.planning.facts import (
    ADAMW_BYTES,
    AVERAGE_BYTES,
    CLIPPING_BYTES,
    FACTS,
    FLOAT16,
    FLOAT32,
    PAGEABLE_GB_S,
    PROCESS_GB,
    STORAGE_GB_S,
    Facts,
)
from dde_core.planning.mfu import Speed

PICK_A_PIC_PAIRS = 851_293
TOKEN_BYTES = 2


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is planned: a job on ``num_pairs`` pairs, one GPU a worker. Raises ConfigError with field and value."""

    family: str
    objective: ObjectiveConfig
    training: TrainConfig
    cluster: Cluster
    speed: Speed
    num_pairs: int = PICK_A_PIC_PAIRS

    def __post_init__(self) -> None:
        if self.family not in FACTS:
            raise ConfigError("family", self.family, f"must be one of {', '.join(FACTS)}")
        if self.cluster.gpus > self.training.batch_size:
            raise ConfigError(
                "gpus", self.cluster.gpus, f"must be at most training.batch_size = {self.training.batch_size}"
            )
        if self.training.precision != "bf16":
            raise ConfigError(
                "training.precision", self.training.precision, "must be 'bf16': speeds are shares of its peak"
            )
        if self.num_pairs < 1:
            raise ConfigError("num_pairs", self.num_pairs, "must be greater than 0")

    @property
    def facts(self) -> Facts:
        return FACTS[self.family]

    @property
    def flops_per_s(self) -> float:
        """Of one GPU."""
        return self.speed.share * self.cluster.kind.peak

    @property
    def micro_batches(self) -> int:
        return micro_batches(self.training, self.cluster.gpus)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """``memory`` of a GPU by how the model is held, of which ``parallelism`` is the run's. The other fields lead from their
    terms to a step's seconds, the part of a step that checkpoints take, what storage gives, and the price."""

    run: Run
    parallelism: Parallelism
    memory: dict[Parallelism, tuple[Term, ...]]
    step: tuple[Term, ...]
    checkpoint: tuple[Term, ...]
    data: tuple[Term, ...]
    hours: tuple[Term, ...]

    def memory_gb(self, parallelism: Parallelism) -> float:
        """Of one GPU, in 10^9 bytes."""
        return sum(term.value for term in self.memory[parallelism])

    def room(self, parallelism: Parallelism) -> str:
        """Whether the memory suffices, in words."""
        return room_of(self.memory_gb(parallelism), self.run.cluster.kind)


def value(terms: Sequence[Term], name: str) -> float:
    """Of the term of this name."""
    return next(term.value for term in terms if term.name == name)


def plan(run: Run) -> Plan:
    """Raises ConfigError where the job cannot be run so."""
    memory = memory_of(run.facts, run.objective, run.training, run.cluster.gpus)
    parallelism = chosen(run.training, memory, run.cluster.kind)
    checkpoint = tuple(checkpoint_terms(run, parallelism))
    step = tuple(step_terms(run, parallelism, value(checkpoint, "stall")))
    return Plan(
        run=run,
        parallelism=parallelism,
        memory=memory,
        step=step,
        checkpoint=(*checkpoint, *interval_terms(run, checkpoint, value(step, "step"))),
        data=tuple(data_terms(run, value(step, "pace"))),
        hours=tuple(hours_terms(run, value(step, "step"))),
    )


def changed(planned: Plan) -> Iterator[tuple[str, Plan]]:
    """What changes the numbers most, one setting at a time; what cannot be run is left out."""
    run, training = planned.run, planned.run.training
    checkpointing = not training.gradient_checkpointing
    changes = {
        f"checkpointing {'on' if checkpointing else 'off'}": replace(
            training, gradient_checkpointing=checkpointing
        )
    }
    if run.cluster.gpus > 1:
        whole = planned.parallelism == "ddp"
        changes["fsdp" if whole else "ddp"] = replace(training, parallelism="fsdp" if whole else "ddp")
    if METHODS[run.objective.method].has_reference:
        online = not runs_reference(run.objective, training)
        changes[f"reference {'online' if online else 'ledger'}"] = replace(
            training, reference="online" if online else "ledger"
        )
    lora = None if training.lora else LoraConfig()
    changes[f"LoRA, rank {lora.rank}" if lora else "the whole U-Net"] = replace(training, lora=lora)
    for name, other_training in changes.items():
        with suppress(ConfigError):
            yield name, plan(replace(run, training=other_training))


# ---- a step


def step_terms(run: Run, parallelism: Parallelism, stall_s: float) -> Iterator[Term]:
    """Seconds of a step: arithmetic, what of exchange shows, the optimizer, checkpoints."""
    pairs, flops = (
        pairs_of_a_worker(run.training, run.cluster.gpus),
        pair_flops(run.facts, run.objective, run.training),
    )
    parts = passes(run.objective, run.training)
    compute_s = pairs * flops / run.flops_per_s
    yield Term(
        "pairs a GPU",
        f"{run.training.batch_size} / {run.cluster.gpus}, {run.micro_batches} micro-batches",
        pairs,
        "",
    )
    spelled = " + ".join(f"{count} {name}" for name, count in parts.items())
    arithmetic = f"{sides_of(run.objective)} x ({spelled}) x {run.facts.forward_flops / 1e12:.3f}"
    yield Term(
        "arithmetic", f"{arithmetic} + text {run.facts.text_flops / 1e12:.3f}", flops / 1e12, "TFLOP a pair"
    )
    speed = f"{100 * run.speed.share:.1f}% of peak {run.cluster.kind.peak / 1e12:.0f} ({run.speed.source})"
    yield Term("speed", speed, run.flops_per_s / 1e12, "TFLOP/s a GPU")
    yield Term("compute", "pairs a GPU x arithmetic / speed", compute_s, "s")
    backward = 1.0
    if parallelism == "ddp":
        backward = (parts["backward"] + parts.get("recomputed", 0)) / sum(parts.values()) / run.micro_batches
    yield from (exposed := list(_exchange(run, parallelism, backward * compute_s)))
    yield (optimizer := _optimizer(run, parallelism))
    yield Term("checkpoints", f"{stall_s:.3g} s / every {run.training.checkpoint_every} steps",
               stall_s / run.training.checkpoint_every, "s")  # fmt: skip
    step_s = compute_s + value(exposed, "exposed") + optimizer.value + stall_s / run.training.checkpoint_every
    yield Term("step", "compute + exposed + optimizer + checkpoints", step_s, "s")
    yield Term("pace", f"{run.training.batch_size} pairs / step", run.training.batch_size / step_s, "pairs/s")


def _exchange(run: Run, parallelism: Parallelism, beside_s: float) -> Iterator[Term]:
    """What is sent in a step, and how much longer that takes than the arithmetic that hides it."""
    cluster, terms = (
        run.cluster,
        list(exchange_terms(run.facts, run.objective, run.training, run.cluster.gpus, parallelism)),
    )
    size = sum(term.value for term in terms)
    seconds, hidden = cluster.seconds(size), cluster.overlap * beside_s
    yield from (Term(f"{term.name} sent", term.formula, term.value) for term in terms)
    inside = f"{size:.4g} GB x ({cluster.in_a_node} - 1) / {cluster.in_a_node}"
    yield Term("by NVLink", f"{inside}, at {cluster.kind.nvlink_gb_s:g} GB/s", cluster.inside(size))
    between = f"{size:.4g} GB / {cluster.in_a_node} x ({cluster.nodes} - 1) / {cluster.nodes}"
    yield Term("between nodes", f"{between}, at {cluster.between_gb_s:g} GB/s", cluster.between(size))
    yield Term("exchange", "by NVLink and between nodes, one after the other", seconds, "s")
    beside = "the last micro-batch's backward" if parallelism == "ddp" else "the step"
    exposed = f"exchange - {cluster.overlap:g} x {beside_s:.4g} s of arithmetic ({beside}), or 0"
    yield Term("exposed", exposed, max(0.0, seconds - hidden), "s")


def _optimizer(run: Run, parallelism: Parallelism) -> Term:
    """All that a GPU does with trained parameters once a step, of its part of them under FSDP2."""
    training, trained = run.training, trained_parameters(run.facts, run.training)
    moved = {"clipping": CLIPPING_BYTES, training.optimizer: ADAMW_BYTES[training.optimizer]}
    moved |= {"average": AVERAGE_BYTES} if training.ema_decay else {}
    gpus, gb_s = run.cluster.gpus if parallelism == "fsdp" else 1, run.cluster.kind.memory_gb_s
    shown = " + ".join(f"{count} {name}" for name, count in moved.items())
    part = f" / {gpus} GPUs" if gpus > 1 else ""
    formula = f"{trained / 1e6:,.1f}M trained parameters x ({shown}) bytes{part}, at {gb_s:,g} GB/s of the GPU's memory"
    return Term("optimizer", formula, trained * sum(moved.values()) / gpus / 1e9 / gb_s, "s")


# ---- checkpoints, data, hours


def checkpoint_terms(run: Run, parallelism: Parallelism) -> Iterator[Term]:
    """Size of the state that is stored, for how long training stands, and what room the host of rank 0 needs."""
    trained, training = trained_parameters(run.facts, run.training), run.training
    moments = 2 * (1 if training.optimizer == "adamw_8bit" else FLOAT32)
    copies = FLOAT32 * (2 if training.ema_decay else 1)
    size, cluster = trained * (copies + moments) / 1e9, run.cluster
    what = "weights, average" if training.ema_decay else "weights"
    yield Term(
        "size",
        f"{trained / 1e6:,.1f}M trained parameters x ({copies} {what} + {moments} moments) bytes",
        size,
    )
    gathered_s = cluster.seconds(size) if parallelism == "fsdp" else 0.0
    stall = f"size / {PAGEABLE_GB_S:g} GB/s" + (f" + {gathered_s:.3g} s to gather it" if gathered_s else "")
    guess = f"a guess for pageable memory, where PCIe carries {cluster.kind.host_gb_s:g}"
    yield Term("stall", f"{stall}; training stands ({guess})", size / PAGEABLE_GB_S + gathered_s, "s")
    yield Term(
        "stored", f"size / {STORAGE_GB_S:g} GB/s to storage, beside training", size / STORAGE_GB_S, "s"
    )
    processes = cluster.in_a_node * PROCESS_GB
    each = f"{cluster.in_a_node} workers x {PROCESS_GB:g} GB"
    yield Term("processes", f"{each} of a node's memory beside checkpoints: ours, for planning", processes)
    yield Term("host memory", "processes + size, until it is stored: rank 0's node", processes + size)
    yield Term("scratch disk", "size, where storage is an object store: written whole, then uploaded", size)


def interval_terms(run: Run, checkpoint: Sequence[Term], step_s: float) -> Iterator[Term]:
    """How far apart checkpoints are; where storing takes longer, the next one is left out, which is not counted."""
    interval_s = run.training.checkpoint_every * step_s
    yield Term("interval", f"{run.training.checkpoint_every} steps x {step_s:.4g} s", interval_s, "s")
    yield Term("part of a step", "stall / interval", 100 * value(checkpoint, "stall") / interval_s, "%")


def data_terms(run: Run, pairs_per_s: float) -> Iterator[Term]:
    """Bytes of latents and ledger, at rest and each second."""
    facts = run.facts
    latents, ids = (
        math.prod(facts.latent_shape) * FLOAT16,
        facts.tokenizers * facts.text_shape[0] * TOKEN_BYTES,
    )
    pair = 2 * latents + ids
    yield Term("pair", f"2 x {latents:,} latents + {ids} token ids, before compression", pair, "bytes")
    yield Term("dataset", f"{run.num_pairs:,} pairs x pair", run.num_pairs * pair / 1e9)
    yield Term("to a GPU", f"pair x {pairs_per_s:.4g} pairs/s / {run.cluster.gpus}: its rows, from the node's disk",
               pair * pairs_per_s / run.cluster.gpus / 1e6, "MB/s")  # fmt: skip
    yield Term(
        "to a node", f"pair x {pairs_per_s:.4g} pairs/s: whole shards", pair * pairs_per_s / 1e6, "MB/s"
    )
    yield Term(
        "from storage",
        f"to a node x {run.cluster.nodes} nodes",
        run.cluster.nodes * pair * pairs_per_s / 1e6,
        "MB/s",
    )
    if _reads_ledger(run):
        numbers = 4 if draws_evaluation_points(run.objective) else 2
        entry, draws = numbers * FLOAT32, run.training.num_draws(run.num_pairs)
        yield Term(
            "ledger",
            f"{run.num_pairs:,} pairs x {draws} draws x {entry} bytes",
            run.num_pairs * draws * entry / 1e9,
        )
        yield Term(
            "ledger read", f"{entry} bytes x {pairs_per_s:.4g} pairs/s", entry * pairs_per_s / 1e6, "MB/s"
        )


def _reads_ledger(run: Run) -> bool:
    return reads_ledger(run.objective, run.training)


def hours_terms(run: Run, step_s: float) -> Iterator[Term]:
    """Of the passes before training, of training, together, and their price."""
    gpus, a_second = run.cluster.gpus, run.flops_per_s * run.cluster.gpus
    encode = 2 * run.num_pairs * run.facts.vae_flops / a_second / 3600
    shown = f"2 x {run.num_pairs:,} pictures x {run.facts.vae_flops / 1e12:.3f} TFLOP of the VAE / (speed x {gpus} GPUs)"
    yield Term("encode", f"{shown}: once for a dataset, less where pairs share pictures", encode, "h")
    draws, a_pair = run.training.num_draws(run.num_pairs), forward_flops(run.facts)
    ledger = draws * run.num_pairs * a_pair / a_second / 3600
    asked = _reads_ledger(run)
    shown = f"{run.num_pairs:,} pairs x {draws} draws x {a_pair / 1e12:.3f} TFLOP / (speed x {gpus} GPUs)"
    yield Term(
        "ledger",
        f"{shown}: once for all runs with its key" + ("" if asked else "; not in this job"),
        ledger,
        "h",
    )
    training = run.training.steps * step_s / 3600
    yield Term("training", f"{run.training.steps} steps x {step_s:.4g} s", training, "h")
    together = encode + training + (ledger if asked else 0.0)
    yield Term("together", "encode + ledger + training" if asked else "encode + training", together, "h")
    yield Term("GPU-hours", f"together x {gpus} GPUs", together * gpus, "h")
    usd, whose = run.cluster.usd_per_hour, "" if run.cluster.price_usd else ", a round figure of ours"
    yield Term("price", f"GPU-hours x {usd:g} USD{whose}", together * gpus * usd, "USD")
