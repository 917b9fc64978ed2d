"""From shard rows to a batch for the U-Net, and from workers' values to the global batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch
import torch.distributed
from jaxtyping import Float
from torch import Tensor

from dde_core.conditioning import Conditioning
from dde_core.config import CALIBRATED, ObjectiveConfig, TrainConfig
from dde_core.latents.reader import LatentReader, LatentRows
from dde_core.models.folder import ModelFolder
from dde_core.models.text import TextEncoders
from dde_core.noise import Side, draw_dropped, draw_evaluation_point, draw_noise, draw_timestep
from dde_core.objectives import OBJECTIVES, t_drawn
from dde_core.schedule import Schedule
from dde_core.train_step import PairBatch, PairErrors

Visits = list[tuple[str, int]]
"""(pair id, number of the visit): with the run's seed, what every draw is keyed by."""


class BatchMaker:
    """Rows of the reader with the draws of their visit. Every draw is keyed by (seed, pair, visit), never by worker."""

    def __init__(
        self,
        reader: LatentReader,
        folder: ModelFolder,
        schedule: Schedule,
        objective: ObjectiveConfig,
        training: TrainConfig,
        device: torch.device,
    ) -> None:
        self._reader, self._objective, self._training, self._device = reader, objective, training, device
        self._text_encoders = TextEncoders(folder, device)
        self._cumulative = t_drawn(objective, schedule).cumsum(0).numpy()
        self._cumulative /= self._cumulative[-1]

    def make(self, step: int, rank: int, world_size: int) -> tuple[PairBatch, np.ndarray]:
        """A worker's part of global batch ``step``, and the places of its rows in the global batch."""
        training = self._training
        rows = self._reader.batch(training.seed, step, training.batch_size, rank, world_size)
        losers = OBJECTIVES[self._objective.method].preference
        return self._batch(rows, rows.draws, self._cumulative, training.caption_dropout, losers), rows.positions

    def held_out(self, rank: int, world_size: int, draw: int, num_draws: int) -> tuple[PairBatch, np.ndarray]:
        """A worker's part of the held-out pairs, both sides; t is drawn from the draw-th of ``num_draws`` parts of 1..T."""
        rows = self._reader.held_out(rank, world_size)
        timesteps = len(self._cumulative) - 1
        part = (np.arange(timesteps + 1) * num_draws / timesteps - draw).clip(0, 1)
        return self._batch(rows, np.full(len(rows.pair_ids), draw), part, 0.0, losers=True), rows.positions

    def _batch(
        self, rows: LatentRows, draws: np.ndarray, cumulative: Float[np.ndarray, " times"], dropout: float, losers: bool
    ) -> PairBatch:
        seed, visits = self._training.seed, list(zip(rows.pair_ids, draws.tolist(), strict=True))
        dropped = np.array([draw_dropped(seed, pair, draw, dropout) for pair, draw in visits], dtype=bool)
        captions = np.where(dropped[:, None, None], self._text_encoders.empty_ids, rows.token_ids)
        text = self._text_encoders(captions)
        sides = {f"{name}_{side}": value for side in "wl"[: 1 + losers] for name, value in self._side(rows, text, visits, side)}
        t = [draw_timestep(seed, pair, draw, cumulative) for pair, draw in visits]
        return PairBatch(pair_ids=rows.pair_ids, t=torch.tensor(t, device=self._device), **sides)

    def _side(self, rows: LatentRows, text: Conditioning, visits: Visits, side: Any) -> Iterator[tuple[str, Any]]:
        """What belongs to winners or to losers: latents, conditioning, noise, and for `sampled` calibration z."""
        seed, shape, objective = self._training.seed, self._reader.manifest.latent_shape, self._objective
        latents, sizes, crops = (getattr(rows, f"{name}_{side}") for name in ("latents", "sizes", "crops"))
        yield "latents", torch.tensor(latents, dtype=torch.float32, device=self._device)
        target_px = (self._reader.manifest.settings["resolution"],) * 2
        yield "conditioning", self._text_encoders.with_sizes(text, sizes, crops, target_px)
        whose: Side = "shared" if objective.noise_mode == "shared" else side
        yield "noise", torch.stack([draw_noise(seed, pair, whose, n, shape) for pair, n in visits]).to(self._device)
        if objective.method in CALIBRATED and objective.calibration_point == "sampled":
            z = [draw_evaluation_point(seed, pair, side, n, shape) for pair, n in visits]
            yield "z", torch.stack(z).to(self._device)


def gather(columns: list[Tensor], positions: np.ndarray, num_rows: int) -> Float[Tensor, "columns rows"]:
    """Per-pair values of all workers in the order of the global batch, in float64 on the CPU.

    Each worker fills its own places of a table of zeros and the tables are added, so the result is exact.
    """
    stacked = torch.stack([column.detach().double() for column in columns])
    table = torch.zeros(len(columns), num_rows, dtype=torch.float64, device=stacked.device)
    table[:, torch.from_numpy(positions).to(stacked.device)] = stacked
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(table)
    return table.cpu()


def gather_errors(
    t: Tensor, parts: Sequence[tuple[PairErrors, PairErrors | None]], positions: np.ndarray, num_rows: int
) -> tuple[Tensor, PairErrors, PairErrors | None]:
    """From (policy, reference) errors of a worker's micro-batches to those of the global batch, on every worker.

    Errors are in float32, as they were.
    """
    models = [PairErrors.joined([model for model in column if model]) for column in zip(*parts, strict=True) if column[0]]
    names = [field.name for field in fields(PairErrors) if getattr(models[0], field.name) is not None]
    table = gather([t, *(getattr(model, name) for model in models for name in names)], positions, num_rows)
    values = iter(table[1:].float())
    theta, *ref = [PairErrors(**{name: next(values) for name in names}) for _ in models]
    return table[0].long(), theta, ref[0] if ref else None
