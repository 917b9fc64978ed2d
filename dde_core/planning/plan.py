"""A run on a cluster: step time, GPU memory, data, checkpoints, hours and price. Imports no torch.

Every number is a sum, product or quotient of terms with their formulas. Arithmetic is `estimate.py`'s at a
model FLOPs utilization (`mfu.py`); communication and memory are `cluster.py`'s.

- A fraction (``Cluster.overlap``) of the arithmetic beside communication hides it: under DDP the backward
  pass of the last micro-batch, under FSDP2 the whole step. The rest is exposed.
- The optimizer is bound by the GPU's memory: the bytes it moves over the memory's bandwidth.
- Training stalls while a checkpoint is copied to pageable host memory (under FSDP2 each tensor is gathered
  first). Storing it runs beside training.
- Every node fetches whole shards of the data, once an epoch where its cache is smaller than the dataset;
  every GPU reads its rows of them.
- Encoding images, and the ledger's pass where the job asks for one, are arithmetic at the same MFU.

An MFU that is measured, or fitted to published hours, already includes the optimizer of those steps. The
optimizer is counted once more because its share grows when a GPU has few pairs. The plan leaves out start-up,
validation, evaluation, stragglers, failures and network latency.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from dde_core.config import LoraConfig, ObjectiveConfig, TrainConfig
from dde_core.errors import ConfigError
from dde_core.methods import METHODS
from dde_core.parallelism import (
    FLOAT32,
    Parallelism,
    micro_batch_counts,
    optimizer_state,
    pairs_of_a_worker,
    runs_reference,
)
from dde_core.planning.cluster import Cluster, communication_terms, memory_of, parallelism_on
from dde_core.planning.estimate import (
    Term,
    draws_evaluation_points,
    fit_in_memory,
    ledger_pair_flops,
    pair_flops,
    parameters_of,
    passes,
    reads_ledger,
    sides_of,
)
from dde_core.planning.facts import (
    AVERAGE_BYTES,
    CLIPPING_BYTES,
    FACTS,
    FLOAT16,
    OPTIMIZER_BYTES,
    PAGEABLE_GB_S,
    PROCESS_GB,
    STORAGE_GB_S,
    Facts,
)
from dde_core.planning.mfu import Mfu
from dde_core.planning.rounds import Rounds, actor_memory, prompt_terms, round_terms, store_terms

PICK_A_PIC_PAIRS = 851_293
TOKEN_BYTES = 2


@dataclass(frozen=True, kw_only=True)
class Run:
    """The run to plan: a job on ``num_pairs`` pairs, or on those that it draws in ``rounds``.

    Each worker has one of the cluster's GPUs; the actors of rounds have GPUs beside them. Raises ConfigError
    with field and value.
    """

    family: str
    objective: ObjectiveConfig
    training: TrainConfig
    cluster: Cluster
    mfu: Mfu
    num_pairs: int = PICK_A_PIC_PAIRS
    rounds: Rounds | None = None

    def __post_init__(self) -> None:
        if self.family not in FACTS:
            raise ConfigError("family", self.family, f"must be one of {', '.join(FACTS)}")
        if self.cluster.gpus > self.training.batch_size:
            reason = f"must be at most training.batch_size = {self.training.batch_size}"
            raise ConfigError("gpus", self.cluster.gpus, reason)
        if self.training.precision != "bf16":
            reason = "must be 'bf16': the MFU is a fraction of bf16's peak"
            raise ConfigError("training.precision", self.training.precision, reason)
        if METHODS[self.objective.method].on_policy != (self.rounds is not None):
            needs = "are needed by" if self.rounds is None else "must be left out for"
            raise ConfigError("rollouts", self.rounds, f"{needs} method {self.objective.method!r}")
        if self.num_pairs < 1:
            raise ConfigError("num_pairs", self.num_pairs, "must be greater than 0")

    @property
    def facts(self) -> Facts:
        return FACTS[self.family]

    @property
    def flops_per_s(self) -> float:
        """Of one GPU."""
        return self.mfu.value * self.cluster.kind.peak

    @property
    def num_micro_batches(self) -> int:
        return micro_batch_counts(self.training, self.cluster.gpus)[0]

    @property
    def reads_ledger(self) -> bool:
        return reads_ledger(self.objective, self.training)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """``memory`` of a worker's GPU under each parallelism; ``parallelism`` is the run's. The last term of
    ``step`` is the pace in pairs/s, that of ``hours`` the price; the terms before lead to it.

    With rounds, ``prompt`` is the arithmetic of a trajectory by part, ``round`` the seconds of a round, and
    ``actors`` the memory of each kind of actor.
    """

    run: Run
    parallelism: Parallelism
    memory: dict[Parallelism, tuple[Term, ...]]
    step: tuple[Term, ...]
    checkpoint: tuple[Term, ...]
    data: tuple[Term, ...]
    hours: tuple[Term, ...]
    prompt: tuple[Term, ...] = ()
    round: tuple[Term, ...] = ()
    actors: Mapping[str, tuple[Term, ...]] = field(default_factory=dict)

    def memory_gb(self, parallelism: Parallelism) -> float:
        """Of one GPU, in 10^9 bytes."""
        return sum(term.value for term in self.memory[parallelism])

    def fit(self, parallelism: Parallelism) -> str:
        """Whether the run fits in a GPU's memory, for people."""
        return fit_in_memory(self.memory_gb(parallelism), self.run.cluster.kind)


def value(terms: Sequence[Term], name: str) -> float:
    """Of the term of this name."""
    return next(term.value for term in terms if term.name == name)


def plan(run: Run) -> Plan:
    """Raises ConfigError for a job that cannot run on this cluster."""
    memory = memory_of(run.facts, run.objective, run.training, run.cluster.gpus)
    parallelism = parallelism_on(run.cluster, run.facts, run.objective, run.training)
    checkpoint = tuple(checkpoint_terms(run, parallelism))
    step = tuple(step_terms(run, parallelism, value(checkpoint, "stall")))
    step_s = value(step, "step")
    if run.rounds:
        return _with_rounds(run, run.rounds, parallelism, memory, step, checkpoint)
    return Plan(
        run=run,
        parallelism=parallelism,
        memory=memory,
        step=step,
        checkpoint=(*checkpoint, *interval_terms(run, checkpoint, step_s)),
        data=tuple(data_terms(run, value(step, "pace"))),
        hours=tuple(hours_terms(run, step_s)),
    )


def _with_rounds(
    run: Run,
    rounds: Rounds,
    parallelism: Parallelism,
    memory: dict[Parallelism, tuple[Term, ...]],
    step: tuple[Term, ...],
    checkpoint: tuple[Term, ...],
) -> Plan:
    settings = (run.facts, run.objective, run.training)
    step_s = value(step, "step")
    one_round = tuple(round_terms(*settings, rounds, run.flops_per_s, step_s))
    an_update_s = value(one_round, "round") / rounds.updates_per_round
    return Plan(
        run=run,
        parallelism=parallelism,
        memory=memory,
        step=step,
        checkpoint=(*checkpoint, *interval_terms(run, checkpoint, an_update_s)),
        data=tuple(store_terms(run.facts, run.objective, rounds)),
        hours=tuple(rollout_hours(run, rounds, value(one_round, "round"))),
        prompt=tuple(prompt_terms(*settings)),
        round=one_round,
        actors=actor_memory(*settings, rounds),
    )


# ---- alternatives


def alternatives(planned: Plan) -> Iterator[tuple[str, Plan]]:
    """Plans with one setting changed, those that matter most, by a name of the change. Skips what cannot
    run."""
    for name, training in _changed_settings(planned):
        with suppress(ConfigError):
            yield name, plan(replace(planned.run, training=training))


def _changed_settings(planned: Plan) -> Iterator[tuple[str, TrainConfig]]:
    run = planned.run
    training = run.training

    checkpointing = not training.gradient_checkpointing
    switch = "on" if checkpointing else "off"
    yield f"checkpointing {switch}", replace(training, gradient_checkpointing=checkpointing)

    if run.cluster.gpus > 1:
        if planned.parallelism == "ddp":
            yield "fsdp", replace(training, parallelism="fsdp")
        else:
            yield "ddp", replace(training, parallelism="ddp")

    if METHODS[run.objective.method].has_reference and not run.rounds:
        if runs_reference(run.objective.method, training):
            yield "reference ledger", replace(training, reference="ledger")
        else:
            yield "reference online", replace(training, reference="online")

    if training.lora:
        yield "the whole U-Net", replace(training, lora=None)
    else:
        lora = LoraConfig()
        yield f"LoRA, rank {lora.rank}", replace(training, lora=lora)


# ---- a step


def step_terms(run: Run, parallelism: Parallelism, stall_s: float) -> Iterator[Term]:
    """Seconds of a step: arithmetic, exposed communication, optimizer, checkpoints."""
    training = run.training
    pairs = pairs_of_a_worker(training, run.cluster.gpus)
    batch = f"{training.batch_size} / {run.cluster.gpus}, {run.num_micro_batches} micro-batches"
    yield Term("pairs a GPU", batch, pairs, "")

    flops = pair_flops(run.facts, run.objective, training)
    passes_text = " + ".join(f"{count} {name}" for name, count in passes(run.objective, training).items())
    unet = f"{sides_of(run.objective)} x ({passes_text}) x {run.facts.forward_flops / 1e12:.3f}"
    text = f"text {run.facts.text_flops / 1e12:.3f}"
    yield Term("arithmetic", f"{unet} + {text}", flops / 1e12, "TFLOP a pair")

    peak = f"peak {run.cluster.kind.peak / 1e12:.0f}"
    speed = f"MFU {100 * run.mfu.value:.1f}% of {peak} ({run.mfu.source})"
    yield Term("speed", speed, run.flops_per_s / 1e12, "TFLOP/s a GPU")

    compute_s = pairs * flops / run.flops_per_s
    yield Term("compute", "pairs a GPU x arithmetic / speed", compute_s, "s")

    communication = list(_communication_terms(run, parallelism, compute_s))
    yield from communication
    optimizer = _optimizer(run, parallelism)
    yield optimizer
    every = training.checkpoint_every
    yield Term("checkpoints", f"{stall_s:.3g} s / every {every} steps", stall_s / every, "s")

    step_s = compute_s + value(communication, "exposed") + optimizer.value + stall_s / every
    yield Term("step", "compute + exposed + optimizer + checkpoints", step_s, "s")
    yield Term("pace", f"{training.batch_size} pairs / step", training.batch_size / step_s, "pairs/s")


def _communication_terms(run: Run, parallelism: Parallelism, compute_s: float) -> Iterator[Term]:
    """What a step sends, and how much longer that takes than the arithmetic that hides it."""
    cluster = run.cluster
    sent = list(communication_terms(run.facts, run.objective, run.training, cluster.gpus, parallelism))
    for term in sent:
        yield Term(f"{term.name} sent", term.formula, term.value)

    size = sum(term.value for term in sent)
    in_node = cluster.gpus_of_a_full_node
    inside = f"{size:.4g} GB x ({in_node} - 1) / {in_node}"
    yield Term("by NVLink", f"{inside}, at {cluster.kind.nvlink_gb_s:g} GB/s", cluster.inside(size))
    between = f"{size:.4g} GB / {in_node} x ({cluster.nodes} - 1) / {cluster.nodes}"
    yield Term("between nodes", f"{between}, at {cluster.between_gb_s:g} GB/s", cluster.between(size))
    seconds = cluster.seconds(size)
    yield Term("communication", "by NVLink and between nodes, one after the other", seconds, "s")

    if parallelism == "ddp":
        beside_s = _last_backward_fraction(run) * compute_s
        beside = "the last micro-batch's backward"
    else:
        beside_s = compute_s
        beside = "the step"
    exposed = f"communication - {cluster.overlap:g} x {beside_s:.4g} s of arithmetic ({beside}), or 0"
    yield Term("exposed", exposed, max(0.0, seconds - cluster.overlap * beside_s), "s")


def _last_backward_fraction(run: Run) -> float:
    """The fraction of a step's arithmetic in the backward pass of its last micro-batch."""
    parts = passes(run.objective, run.training)
    backward = parts["backward"] + parts.get("recomputed", 0)
    return backward / sum(parts.values()) / run.num_micro_batches


def _optimizer(run: Run, parallelism: Parallelism) -> Term:
    """Once a step: clipping, the optimizer and the running average, of a GPU's shard under FSDP2."""
    training = run.training
    trained = parameters_of(run.facts, training).trained
    moved = {"clipping": CLIPPING_BYTES, training.optimizer: OPTIMIZER_BYTES[training.optimizer]}
    if training.ema_decay:
        moved["average"] = AVERAGE_BYTES
    shards = run.cluster.gpus if parallelism == "fsdp" else 1
    gb_s = run.cluster.kind.memory_gb_s

    bytes_text = " + ".join(f"{count} {name}" for name, count in moved.items())
    split = f" / {shards} GPUs" if shards > 1 else ""
    rate = f"at {gb_s:,g} GB/s of the GPU's memory"
    formula = f"{trained / 1e6:,.1f}M trained parameters x ({bytes_text}) bytes{split}, {rate}"
    return Term("optimizer", formula, trained * sum(moved.values()) / shards / 1e9 / gb_s, "s")


# ---- checkpoints, data, hours


def checkpoint_terms(run: Run, parallelism: Parallelism) -> Iterator[Term]:
    """Size of the stored state, for how long training stalls, and what the host of rank 0 needs."""
    training = run.training
    cluster = run.cluster
    parameters = parameters_of(run.facts, training)
    moments = optimizer_state(training, parameters)
    copies = FLOAT32 * (2 if training.ema_decay else 1)
    size = (parameters.trained * copies + moments.bytes) / 1e9
    what = "weights, average" if training.ema_decay else "weights"
    held = f"{parameters.trained / 1e6:,.1f}M trained parameters x {copies} bytes ({what})"
    state = f"{moments.numbers / 1e6:,.1f}M x {moments.bytes_each} bytes ({training.optimizer})"
    yield Term("size", f"{held} + {state}", size)

    gather_s = cluster.seconds(size) if parallelism == "fsdp" else 0.0
    gather = f" + {gather_s:.3g} s to gather it" if gather_s else ""
    guess = f"a guess for pageable memory, where PCIe carries {cluster.kind.host_gb_s:g}"
    stall = f"size / {PAGEABLE_GB_S:g} GB/s{gather}; training waits ({guess})"
    yield Term("stall", stall, size / PAGEABLE_GB_S + gather_s, "s")
    stored = f"size / {STORAGE_GB_S:g} GB/s to storage, beside training"
    yield Term("stored", stored, size / STORAGE_GB_S, "s")

    workers = cluster.gpus_of_a_full_node
    processes = workers * PROCESS_GB
    each = f"{workers} workers x {PROCESS_GB:g} GB"
    yield Term("processes", f"{each} of a node's memory without checkpoints: our figure", processes)
    yield Term("host memory", "processes + size, until it is stored: rank 0's node", processes + size)
    yield Term("scratch disk", "size, where storage is an object store: written whole, then uploaded", size)


def interval_terms(run: Run, checkpoint: Sequence[Term], step_s: float) -> Iterator[Term]:
    """The interval between checkpoints. Where storing takes longer, training skips the next one, which is not
    counted."""
    every = run.training.checkpoint_every
    interval_s = every * step_s
    yield Term("interval", f"{every} steps x {step_s:.4g} s", interval_s, "s")
    yield Term("part of a step", "stall / interval", 100 * value(checkpoint, "stall") / interval_s, "%")


def data_terms(run: Run, pairs_per_s: float) -> Iterator[Term]:
    """Bytes of latents and ledger, in total and per second."""
    facts = run.facts
    latents = math.prod(facts.latent_shape) * FLOAT16
    ids = facts.tokenizers * facts.text_shape[0] * TOKEN_BYTES
    pair = 2 * latents + ids
    yield Term("pair", f"2 x {latents:,} latents + {ids} token ids, before compression", pair, "bytes")
    yield Term("dataset", f"{run.num_pairs:,} pairs x pair", run.num_pairs * pair / 1e9)

    pace = f"{pairs_per_s:.4g} pairs/s"
    mb_s = pair * pairs_per_s / 1e6
    gpus = run.cluster.gpus
    nodes = run.cluster.nodes
    yield Term("to a GPU", f"pair x {pace} / {gpus}: its rows, from the node's disk", mb_s / gpus, "MB/s")
    yield Term("to a node", f"pair x {pace}: whole shards", mb_s, "MB/s")
    yield Term("from storage", f"to a node x {nodes} nodes", nodes * mb_s, "MB/s")

    if run.reads_ledger:
        entry = (4 if draws_evaluation_points(run.objective) else 2) * FLOAT32
        draws = run.training.num_draws(run.num_pairs)
        ledger = f"{run.num_pairs:,} pairs x {draws} draws x {entry} bytes"
        yield Term("ledger", ledger, run.num_pairs * draws * entry / 1e9)
        yield Term("ledger read", f"{entry} bytes x {pace}", entry * pairs_per_s / 1e6, "MB/s")


def hours_terms(run: Run, step_s: float) -> Iterator[Term]:
    """Hours of the passes before training, of training, in total, and their price."""
    gpus = run.cluster.gpus
    flops_per_s = run.flops_per_s * gpus
    speed = f"(speed x {gpus} GPUs)"

    images = f"2 x {run.num_pairs:,} images x {run.facts.vae_flops / 1e12:.3f} TFLOP of the VAE / {speed}"
    encode_h = 2 * run.num_pairs * run.facts.vae_flops / flops_per_s / 3600
    yield Term("encode", f"{images}: once for a dataset, less where pairs share images", encode_h, "h")

    draws = run.training.num_draws(run.num_pairs)
    pair_forward = ledger_pair_flops(run.facts)
    ledger = f"{run.num_pairs:,} pairs x {draws} draws x {pair_forward / 1e12:.3f} TFLOP / {speed}"
    ledger_h = draws * run.num_pairs * pair_forward / flops_per_s / 3600
    unused = "" if run.reads_ledger else "; not in this job"
    yield Term("ledger", f"{ledger}: once for all runs with its key{unused}", ledger_h, "h")

    training_h = run.training.steps * step_s / 3600
    yield Term("training", f"{run.training.steps} steps x {step_s:.4g} s", training_h, "h")
    if run.reads_ledger:
        total_h = encode_h + training_h + ledger_h
        yield Term("total", "encode + ledger + training", total_h, "h")
    else:
        total_h = encode_h + training_h
        yield Term("total", "encode + training", total_h, "h")
    yield Term("GPU-hours", f"total x {gpus} GPUs", total_h * gpus, "h")

    usd = run.cluster.usd_per_hour
    source = "" if run.cluster.price_usd else ", a round figure of ours"
    yield Term("price", f"GPU-hours x {usd:g} USD{source}", total_h * gpus * usd, "USD")


def rollout_hours(run: Run, rounds: Rounds, round_s: float) -> Iterator[Term]:
    """Hours and price of a run that draws its pairs: all GPUs are held all the time."""
    number = math.ceil(run.training.steps / rounds.updates_per_round)
    yield Term("rounds", f"{run.training.steps} steps / {rounds.updates_per_round} updates", number, "")
    total_h = number * round_s / 3600
    yield Term("total", f"rounds x {round_s:.4g} s", total_h, "h")
    gpus = run.cluster.gpus + rounds.gpus
    yield Term("GPUs", f"{run.cluster.gpus} training workers + {rounds.gpus_text}", gpus, "")
    yield Term("GPU-hours", "total x GPUs", total_h * gpus, "h")
    usd = run.cluster.usd_per_hour
    source = "" if run.cluster.price_usd else ", a round figure of ours"
    yield Term("price", f"GPU-hours x {usd:g} USD{source}", total_h * gpus * usd, "USD")
