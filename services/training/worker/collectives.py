"""Communication between the workers of a run. All of them call each function at the same place of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import numpy as np
import torch
import torch.distributed
from jaxtyping import Float
from torch import Tensor

from dde_core.train_step import PairErrors


def any_worker(flags: Sequence[bool], device: torch.device) -> list[bool]:
    """For each flag, whether any worker has set it: the same answer on every worker."""
    raised = torch.tensor(flags, dtype=torch.float64, device=device)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(raised, op=torch.distributed.ReduceOp.MAX)
    return [bool(flag) for flag in raised.tolist()]


def broadcast_from_rank_zero(number: int, device: torch.device) -> int:
    """Rank 0's number, on every worker."""
    value = torch.tensor(number, dtype=torch.int64, device=device)
    if torch.distributed.is_initialized():
        torch.distributed.broadcast(value, src=0)
    return int(value)


def gather(columns: list[Tensor], positions: np.ndarray, num_rows: int) -> Float[Tensor, "columns rows"]:
    """Per-pair values of all workers in the order of the global batch, in float64 on the CPU.

    ``positions`` are the rows of this worker's values. Each worker fills its own rows of a table of zeros and
    the tables are added, so the result is exact. Raises torch's error if other workers hold rows and have
    died.
    """
    stacked = torch.stack([column.detach().double() for column in columns])
    table = torch.zeros(len(columns), num_rows, dtype=torch.float64, device=stacked.device)
    table[:, torch.from_numpy(positions).to(stacked.device)] = stacked
    if len(positions) < num_rows:
        torch.distributed.all_reduce(table)
    return table.cpu()


def gather_errors(
    parts: Sequence[tuple[Tensor, Tensor, PairErrors, PairErrors | None]],
    positions: np.ndarray,
    num_rows: int,
) -> tuple[Tensor, Tensor, PairErrors, PairErrors | None]:
    """(t, share, policy errors, reference errors) of the global batch, on every worker. All but t stay in
    float32.

    ``parts`` are the same four of this worker's micro-batches, ``positions`` their rows in the global batch.
    """
    t, share, *columns = zip(*parts, strict=True)
    models = [PairErrors.joined(column) for column in columns if column[0] is not None]
    names = [field.name for field in fields(PairErrors) if getattr(models[0], field.name) is not None]
    errors = [getattr(model, name) for model in models for name in names]
    table = gather([torch.cat(t), torch.cat(share), *errors], positions, num_rows)
    values = iter(table[1:].float())
    share_of_all = next(values)
    theta, *ref = [PairErrors(**{name: next(values) for name in names}) for _ in models]
    return table[0].long(), share_of_all, theta, ref[0] if ref else None
