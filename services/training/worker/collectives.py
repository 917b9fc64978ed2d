"""From workers' values to those of the global batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import numpy as np
import torch
import torch.distributed
from jaxtyping import Float
from torch import Tensor

from dde_core.train_step import PairErrors


def gather(columns: list[Tensor], positions: np.ndarray, num_rows: int) -> Float[Tensor, "columns rows"]:
    """Per-pair values of all workers in the order of the global batch, in float64 on the CPU.

    Each worker fills its own places of a table of zeros and the tables are added, so the result is exact. Raises what torch
    raises where other workers have rows and are gone.
    """
    stacked = torch.stack([column.detach().double() for column in columns])
    table = torch.zeros(len(columns), num_rows, dtype=torch.float64, device=stacked.device)
    table[:, torch.from_numpy(positions).to(stacked.device)] = stacked
    if len(positions) < num_rows:
        torch.distributed.all_reduce(table)
    return table.cpu()


def agreed(flags: Sequence[bool], device: torch.device) -> list[bool]:
    """Which flags any worker has raised: known to all of them at the same step."""
    raised = torch.tensor(flags, dtype=torch.float64, device=device)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(raised, op=torch.distributed.ReduceOp.MAX)
    return [bool(flag) for flag in raised.tolist()]


def from_rank_zero(number: int, device: torch.device) -> int:
    """A whole number that rank 0 has, on every worker."""
    told = torch.tensor(number, dtype=torch.int64, device=device)
    if torch.distributed.is_initialized():
        torch.distributed.broadcast(told, src=0)
    return int(told)


def gather_errors(
    parts: Sequence[tuple[Tensor, PairErrors, PairErrors | None]], positions: np.ndarray, num_rows: int
) -> tuple[Tensor, PairErrors, PairErrors | None]:
    """From (t, policy, reference) of a worker's micro-batches to those of the global batch, on every worker.

    Errors are in float32, as they were.
    """
    t, *columns = zip(*parts, strict=True)
    models = [PairErrors.joined(column) for column in columns if column[0] is not None]
    names = [field.name for field in fields(PairErrors) if getattr(models[0], field.name) is not None]
    table = gather(
        [torch.cat(t), *(getattr(model, name) for model in models for name in names)], positions, num_rows
    )
    values = iter(table[1:].float())
    theta, *ref = [PairErrors(**{name: next(values) for name in names}) for _ in models]
    return table[0].long(), theta, ref[0] if ref else None
