"""What training said about every pair of every step, as Parquet under ``{run}/pairs/``, and the record that is made of it.

A file holds the steps from one flush to the next and is named by the first and the last of them, so a run that goes on from
a checkpoint writes the same names again. A run that was killed may have left files that overlap; ``read`` counts a step once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from dde_core.config import ObjectiveConfig
from dde_core.credit import replay
from dde_core.errors import DataError
from dde_core.metrics import bucket_of, bucket_span
from dde_core.schedule import Schedule
from services.api.records import CreditBucket, CreditRecord
from services.storage import files

FOLDER = "pairs"
SCHEMA = pa.schema(
    [
        pa.field("step", pa.int32(), nullable=False),
        pa.field("t", pa.int32(), nullable=False),
        pa.field("margin", pa.float32()),
        pa.field("gradient_weight", pa.float32(), nullable=False),
    ]
)


@dataclass(frozen=True, eq=False)
class LoggedPairs:
    """Columns over all pairs of all steps, in step order: int64 ``step`` (from 1) and ``t``, float32 margin and weight."""

    step: Tensor
    t: Tensor
    margin: Tensor | None
    gradient_weight: Tensor


class PairLog:
    """The writer, on rank 0. What was added since the last flush is in memory: 16 bytes for a pair."""

    def __init__(self, run: str) -> None:
        self._folder = files.join(run, FOLDER)
        self._pending: list[pa.Table] = []

    def add(self, step: int, t: Tensor, margin: Tensor | None, gradient_weight: Tensor) -> None:
        """One step's pairs of the GLOBAL batch, one-dimensional. Steps count from 1; `sft` has no margin."""
        columns = [
            pa.array(np.full(len(t), step), pa.int32()),
            pa.array(t.cpu().numpy(), pa.int32()),
            pa.nulls(len(t), pa.float32()) if margin is None else _floats(margin),
            _floats(gradient_weight),
        ]
        self._pending.append(pa.Table.from_arrays(columns, schema=SCHEMA))

    def flush(self) -> None:
        """Write what was added since the last flush, as one file that appears whole or not at all."""
        if not self._pending:
            return
        table = pa.concat_tables(self._pending).combine_chunks()
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        name = f"{table['step'][0].as_py():08d}-{table['step'][-1].as_py():08d}.parquet"
        files.write_bytes(files.join(self._folder, name), sink.getvalue().to_pybytes())
        self._pending = []


def _floats(values: Tensor) -> pa.Array:
    return pa.array(values.detach().float().cpu().numpy())


def read(run: str) -> LoggedPairs:
    """A run's pairs, each step once. Raises DataError where there are none."""
    folder, last = files.join(run, FOLDER), 0
    tables = []
    for name in sorted(files.list_files(folder), key=_span):
        table = pq.read_table(pa.BufferReader(files.read_bytes(files.join(folder, name))), schema=SCHEMA)
        tables.append(
            table.filter(pc.field("step") > last)
        )  # a file has no gaps: what is not beyond was read before
        last = max(last, pc.max(table["step"]).as_py())
    if not tables:
        raise DataError(f"run {run!r} has no pair log")
    table = pa.concat_tables(tables)
    step, t, margin, gradient_weight = (torch.tensor(table[name].to_numpy()) for name in SCHEMA.names)
    return LoggedPairs(step.long(), t.long(), None if table["margin"].null_count else margin, gradient_weight)


def _span(name: str) -> tuple[int, int]:
    """Sorts a run's files by their first step; of those that begin together the longest goes first."""
    first, last = name.removesuffix(".parquet").split("-")
    return int(first), -int(last)


def credit_record(
    pairs: LoggedPairs,
    objective: ObjectiveConfig,
    schedule: Schedule,
    scheduler_config: Mapping[str, Any],
    calibration: Mapping[str, Tensor],
    batch_size: int,
) -> CreditRecord:
    """What a finished run logged beside what `replay` makes of its margins, in tenths of the timesteps.

    ``calibration`` is the state dict after the last step. Raises DataError where the log is not that of whole steps 1, 2, ...
    of ``batch_size`` pairs: a replay starts where the coefficients are zero.
    """
    steps = int(pairs.step[-1])
    if not torch.equal(pairs.step, torch.arange(1, steps + 1).repeat_interleave(batch_size)):
        raise DataError(f"the pair log lacks pairs: {len(pairs.step)} in steps 1..{steps} of {batch_size}")
    resolved = dataclasses.replace(objective, noise=objective.noise_mode, t_max=objective.t_max or schedule.T)
    return CreditRecord(
        objective=resolved,
        scheduler=dict(scheduler_config),
        steps=steps,
        batch_size=batch_size,
        calibration={name: array.tolist() for name, array in calibration.items()},
        buckets=_buckets(pairs, replay(objective, schedule, pairs.step, pairs.t, pairs.margin), schedule.T),
    )


def _buckets(pairs: LoggedPairs, predicted: Tensor, timesteps: int) -> list[CreditBucket]:
    """Means over the tenths that hold pairs."""
    bucket, rows = bucket_of(pairs.t, timesteps), []
    for number in bucket.unique().tolist():
        inside = bucket == number
        first, last = bucket_span(number, timesteps)
        rows.append(
            CreditBucket(
                t_first=first,
                t_last=last,
                pairs=int(inside.sum()),
                margin=None if pairs.margin is None else _mean(pairs.margin[inside]),
                logged=_mean(pairs.gradient_weight[inside]),
                predicted=_mean(predicted[inside]),
            )
        )
    return rows


def _mean(values: Tensor) -> float:
    return values.double().mean().item()
