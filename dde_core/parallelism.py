"""How several workers hold one model, and in how many micro-batches each runs its pairs. Imports no torch.

The planner (`dde_core/planning/cluster.py`) and the trainer (`dde_core/models/parallel.py`) call the same
rule: "auto" takes DDP where the state of a whole model fits in AUTO_ROOM of a GPU's memory, and FSDP2 where
it does not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from dde_core.config import TrainConfig
from dde_core.errors import ConfigError
from dde_core.methods import METHODS, MethodName

Parallelism = Literal["none", "ddp", "fsdp"]

FLOAT32 = 4
BFLOAT16 = 2
"""Bytes of a number."""

MOMENT_BYTES = {"adamw": 2 * FLOAT32, "adamw_8bit": 2}
"""Bytes of both AdamW moments of one parameter."""

UNSHARDED_OPTIMIZERS = ("adamw_8bit", "adafactor")
"""Optimizers whose state FSDP2 cannot split by rows: quantization tables, and averages of whole columns."""

AUTO_ROOM = 0.7
"""Fraction of a GPU's memory that a whole model's state may take under "auto"; activations need the rest."""


# ---- state


class Parameters(NamedTuple):
    """Counts: ``base`` of the U-Net without adapters; ``trained`` of the whole U-Net, or of its adapters, for
    which Adafactor keeps ``averages`` numbers."""

    base: int
    trained: int
    averages: int


class StateTerm(NamedTuple):
    """One part of a model's state: so many numbers of so many bytes."""

    numbers: int
    bytes_each: int

    @property
    def bytes(self) -> int:
        return self.numbers * self.bytes_each


def runs_reference(method: MethodName, training: TrainConfig) -> bool:
    """Whether the frozen reference runs in every step. Pairs of on-policy methods come with its value."""
    described = METHODS[method]
    return described.has_reference and not described.on_policy and training.reference != "ledger"


def holds_reference(method: MethodName, training: TrainConfig) -> bool:
    """Whether a frozen copy of the U-Net is in memory. A LoRA run has none: it switches its adapters off."""
    return runs_reference(method, training) and training.lora is None


def state_terms(method: MethodName, training: TrainConfig, parameters: Parameters) -> dict[str, StateTerm]:
    """The state of a whole model on one worker, by name. Activations and the batch come on top."""
    base = parameters.base
    trained = parameters.trained
    terms = {"weights": StateTerm(base, FLOAT32)}
    if training.lora:
        terms["adapters"] = StateTerm(trained, FLOAT32)
    terms["gradients"] = StateTerm(trained, FLOAT32)
    terms["optimizer"] = optimizer_state(training, parameters)
    if holds_reference(method, training):
        terms["reference"] = StateTerm(base, FLOAT32)
    if training.ema_decay:
        terms["average"] = StateTerm(trained, FLOAT32)
    if training.precision == "bf16":
        terms["casts"] = StateTerm(base, BFLOAT16)
    return terms


def optimizer_state(training: TrainConfig, parameters: Parameters) -> StateTerm:
    """What the optimizer keeps: AdamW's two moments of each parameter, or Adafactor's averages."""
    if training.optimizer == "adafactor":
        return StateTerm(parameters.averages, FLOAT32)
    return StateTerm(parameters.trained, MOMENT_BYTES[training.optimizer])


def adafactor_averages(shape: Sequence[int]) -> int:
    """Numbers that Adafactor keeps for a parameter: one for each row along the last dimension and one for
    each column along the last but one, or all of a vector's. So a 3x3 convolution has 2/3 of its parameters,
    a 1x1 convolution twice as many."""
    if len(shape) < 2:
        return math.prod(shape)
    size = math.prod(shape)
    return size // shape[-1] + size // shape[-2]


# ---- the rule


def choose_parallelism(
    method: MethodName, training: TrainConfig, parameters: Parameters, gpu_bytes: float, num_workers: int
) -> Parallelism:
    """Resolve ``training.parallelism`` on workers whose smallest GPU has ``gpu_bytes``. One worker: "none".

    Raises ConfigError for FSDP2 with one of UNSHARDED_OPTIMIZERS.
    """
    if num_workers == 1:
        return "none"
    parallelism = training.parallelism
    if parallelism == "auto":
        state = sum(term.bytes for term in state_terms(method, training, parameters).values())
        parallelism = "ddp" if state <= AUTO_ROOM * gpu_bytes else "fsdp"
    if parallelism == "fsdp" and training.optimizer in UNSHARDED_OPTIMIZERS:
        reason = 'does not go with training.parallelism "fsdp"'
        raise ConfigError("training.optimizer", training.optimizer, reason)
    return parallelism


# ---- micro-batches


def pairs_of_a_worker(training: TrainConfig, num_workers: int) -> int:
    """Pairs of a global batch on the worker that has most."""
    return -(-training.batch_size // num_workers)


def max_micro_batch(training: TrainConfig, num_workers: int) -> int:
    """Most pairs that a worker may run at a time."""
    return training.micro_batch_size or pairs_of_a_worker(training, num_workers)


def num_micro_batches(batch_size: int, num_workers: int, max_pairs: int) -> int:
    """Forward and backward passes of a worker in one step, of at most ``max_pairs`` pairs. Their gradients
    are summed.

    Workers may differ by one pair, but not in this number: FSDP2 gathers the model on all workers at once,
    and a worker with one micro-batch more would wait for ever. So for ``max_pairs`` 1 a micro-batch can have
    2 pairs.
    """
    return min(-(-batch_size // (num_workers * max_pairs)), batch_size // num_workers)


def micro_batch_counts(training: TrainConfig, num_workers: int) -> tuple[int, int]:
    """Micro-batches of a step, and the pairs of the largest, on the worker that has most pairs."""
    count = num_micro_batches(training.batch_size, num_workers, max_micro_batch(training, num_workers))
    return count, -(-pairs_of_a_worker(training, num_workers) // count)
