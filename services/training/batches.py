"""From shard rows to a batch for the U-Net, and from workers' values to the global batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed
from torch import Tensor

from dde_core.config import ObjectiveConfig, TrainConfig
from dde_core.latents.reader import LatentReader, LatentRows
from dde_core.models import ModelFolder, encode_text, tokenize
from dde_core.noise import draw_dropped, draw_noise, draw_timestep
from dde_core.schedule import Schedule
from dde_core.train_step import PairBatch


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
        self._t_max = objective.t_max or schedule.T
        self._text_encoder = folder.text_encoder().to(device)
        self._empty_ids = tokenize(folder.tokenizer(), [""])[0]

    def make(self, step: int, rank: int, world_size: int) -> tuple[PairBatch, np.ndarray]:
        """A worker's part of global batch ``step``, and the places of its rows in the global batch."""
        rows = self._reader.batch(self._training.seed, step, self._training.batch_size, rank, world_size)
        visits = list(zip(rows.pair_ids, rows.draws.tolist(), strict=True))
        seed, objective = self._training.seed, self._objective
        t = [draw_timestep(seed, pair, draw, objective.t_min, self._t_max) for pair, draw in visits]
        shape = self._reader.manifest.latent_shape
        shared = objective.noise_mode == "shared"
        noise_w = [draw_noise(seed, pair, "shared" if shared else "w", draw, shape) for pair, draw in visits]
        noise_l = noise_w if shared else [draw_noise(seed, pair, "l", draw, shape) for pair, draw in visits]
        batch = PairBatch(
            pair_ids=rows.pair_ids,
            latents_w=torch.tensor(rows.latents_w, dtype=torch.float32, device=self._device),
            latents_l=torch.tensor(rows.latents_l, dtype=torch.float32, device=self._device),
            conditioning=encode_text(self._text_encoder, self._captions(rows, visits)),
            t=torch.tensor(t, device=self._device),
            noise_w=torch.stack(noise_w).to(self._device),
            noise_l=torch.stack(noise_l).to(self._device),
        )
        return batch, rows.positions

    def _captions(self, rows: LatentRows, visits: list[tuple[str, int]]) -> np.ndarray:
        """Token ids, empty where the caption is dropped (for winner and loser together)."""
        seed, probability = self._training.seed, self._training.caption_dropout
        dropped = [draw_dropped(seed, pair, draw, probability) for pair, draw in visits]
        return np.where(np.array(dropped)[:, None], self._empty_ids, rows.token_ids)


def gather(columns: Sequence[Tensor], positions: np.ndarray, batch_size: int) -> Tensor:
    """Per-pair values of all workers in the order of the global batch: float64 [len(columns), batch_size], on the CPU.

    Each worker fills its own places of a table of zeros and the tables are added, so the result is exact.
    """
    stacked = torch.stack([column.detach().double() for column in columns])
    table = torch.zeros(len(columns), batch_size, dtype=torch.float64, device=stacked.device)
    table[:, torch.from_numpy(positions).to(stacked.device)] = stacked
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(table)
    return table.cpu()
