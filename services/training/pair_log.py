"""The log of every pair of every step, as Parquet under ``{run}/pairs/``, and the credit record made from it.

A file holds the steps between two flushes and is named by the first and the last of them: a resumed run
overwrites the files that it writes again. A killed run may leave files that overlap; ``read`` counts every
step once.
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
from dde_core.schedule import Schedule
from dde_core.step_metrics import bucket_of, bucket_span
from services.api.records import CreditBucket, CreditRecord
from services.stages import layout
from services.storage import files

SCHEMA = pa.schema(
    [
        pa.field("step", pa.int32(), nullable=False),
        pa.field("t", pa.int32(), nullable=False),
        pa.field("margin", pa.float32()),
        pa.field("gradient_weight", pa.float32(), nullable=False),
        pa.field("share", pa.float32()),
    ]
)


@dataclass(frozen=True, eq=False)
class LoggedPairs:
    """Columns over all pairs of all steps, in step order.

    ``step`` (from 1) and ``t`` are int64, the others float32. ``margin`` is None for a method without losers,
    ``share`` unless the loss reads soft labels.
    """

    step: Tensor
    t: Tensor
    margin: Tensor | None
    gradient_weight: Tensor
    share: Tensor | None


class PairLog:
    """The writer, on rank 0. Holds 20 bytes a pair in memory until the next flush."""

    def __init__(self, run: str) -> None:
        self._folder = layout.pair_log_folder(run)
        self._pending: list[pa.Table] = []

    def add(
        self,
        step: int,
        t: Tensor,
        margin: Tensor | None,
        gradient_weight: Tensor,
        share: Tensor | None = None,
    ) -> None:
        """Add one step's pairs of the GLOBAL batch, one value each. Steps count from 1."""
        columns = [
            pa.array(np.full(len(t), step), pa.int32()),
            pa.array(t.cpu().numpy(), pa.int32()),
            _floats_or_nulls(margin, len(t)),
            _floats(gradient_weight),
            _floats_or_nulls(share, len(t)),
        ]
        self._pending.append(pa.Table.from_arrays(columns, schema=SCHEMA))

    def flush(self) -> None:
        """Write everything added since the last flush as one file, atomically."""
        if not self._pending:
            return
        table = pa.concat_tables(self._pending).combine_chunks()
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        first = table["step"][0].as_py()
        last = table["step"][-1].as_py()
        name = f"{first:08d}-{last:08d}.parquet"
        files.write_bytes(files.join(self._folder, name), sink.getvalue().to_pybytes())
        self._pending = []


def _floats(values: Tensor) -> pa.Array:
    return pa.array(values.detach().float().cpu().numpy())


def _floats_or_nulls(values: Tensor | None, length: int) -> pa.Array:
    return pa.nulls(length, pa.float32()) if values is None else _floats(values)


def read(run: str) -> LoggedPairs:
    """A run's pairs, every step once. Raises DataError if there are none."""
    folder = layout.pair_log_folder(run)
    tables = []
    last = 0
    for name in sorted(files.list_files(folder), key=_span):
        table = pq.read_table(pa.BufferReader(files.read_bytes(files.join(folder, name))), schema=SCHEMA)
        tables.append(
            table.filter(pc.field("step") > last)
        )  # files have no gaps: earlier steps were read before
        last = max(last, pc.max(table["step"]).as_py())
    if not tables:
        raise DataError(f"run {run!r} has no pair log")
    table = pa.concat_tables(tables)
    columns = {name: torch.tensor(table[name].to_numpy()) for name in SCHEMA.names}
    has_margin = table["margin"].null_count == 0
    has_share = table["share"].null_count == 0  # files of earlier versions lack the column
    return LoggedPairs(
        step=columns["step"].long(),
        t=columns["t"].long(),
        margin=columns["margin"] if has_margin else None,
        gradient_weight=columns["gradient_weight"],
        share=columns["share"] if has_share else None,
    )


def _span(name: str) -> tuple[int, int]:
    """Sort key of a run's files: by first step, and of those with the same one the longest first."""
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
    """A finished run's logged gradient weights beside those that `replay` predicts, by tenths of t.

    ``calibration`` is the state dict after the last step. Raises DataError unless the log holds all of steps
    1, 2, ... with ``batch_size`` pairs each: a replay starts with coefficients of zero.
    """
    steps = int(pairs.step[-1])
    if not torch.equal(pairs.step, torch.arange(1, steps + 1).repeat_interleave(batch_size)):
        raise DataError(f"the pair log lacks pairs: {len(pairs.step)} in steps 1..{steps} of {batch_size}")
    predicted = replay(objective, schedule, pairs.step, pairs.t, pairs.margin, pairs.share)
    resolved = dataclasses.replace(objective, noise=objective.noise_mode, t_max=objective.t_max or schedule.T)
    return CreditRecord(
        objective=resolved,
        scheduler=dict(scheduler_config),
        steps=steps,
        batch_size=batch_size,
        calibration={name: array.tolist() for name, array in calibration.items()},
        buckets=_buckets(pairs, predicted, schedule.T),
    )


def _buckets(pairs: LoggedPairs, predicted: Tensor, timesteps: int) -> list[CreditBucket]:
    """Means over each tenth of the timesteps that holds pairs."""
    bucket = bucket_of(pairs.t, timesteps)
    rows = []
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
