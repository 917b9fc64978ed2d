"""From shard rows to batches for the U-Net. Every draw of a visit is made here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float

from dde_core.conditioning import Conditioning
from dde_core.config import ObjectiveConfig, TrainConfig
from dde_core.latents.reader import LatentReader
from dde_core.latents.rows import LatentRows
from dde_core.methods import METHODS
from dde_core.models.folder import ModelFolder
from dde_core.models.text import TextEncoders
from dde_core.noise import Side, draw_caption_dropout, draw_evaluation_point, draw_noise, draw_timestep
from dde_core.objectives import sampling_distribution
from dde_core.schedule import Schedule
from dde_core.train_step import PairBatch

Visits = list[tuple[str, int]]
"""(pair id, number of the draw). Together with a seed they are the key of every draw."""

HELD_OUT_SEED = 0


@dataclass(frozen=True, eq=False)
class Draws:
    """What is drawn for a visit, and how it is encoded.

    ``cumulative`` is the cumulative distribution of t = 0..T. ``drops_to_empty`` and ``fixed_sizes`` are
    "empty" and "fixed" of ``ObjectiveConfig.dropped_caption`` and ``time_ids``.
    """

    seed: int
    cumulative: Float[np.ndarray, " times"]
    caption_dropout: float = 0.0
    shared_noise: bool = False
    losers: bool = True
    evaluation_points: bool = False
    drops_to_empty: bool = False
    fixed_sizes: bool = False


class BatchMaker:
    """Makes batches from the reader's rows and the draws of their visits.

    Every draw is keyed by (draw_seed, pair, n), never by worker. A pair's n-th visit uses draw n, or n mod
    ``training.draws`` if that is set.
    """

    def __init__(
        self,
        reader: LatentReader,
        folder: ModelFolder,
        schedule: Schedule,
        objective: ObjectiveConfig,
        training: TrainConfig,
        device: torch.device,
    ) -> None:
        self._reader = reader
        self._training = training
        self._device = device
        self._text_encoders = TextEncoders(folder, device)
        method = METHODS[objective.method]
        cumulative = sampling_distribution(objective, schedule).cumsum(0).numpy()
        self._draws = Draws(
            seed=training.draw_seed,
            cumulative=cumulative / cumulative[-1],
            caption_dropout=training.caption_dropout,
            shared_noise=objective.noise_mode == "shared",
            losers=method.has_loser,
            evaluation_points=method.corrected and objective.calibration_point == "sampled",
            drops_to_empty=objective.dropped_caption == "empty",
            fixed_sizes=objective.time_ids == "fixed",
        )

    def rows(self, step: int, rank: int, world_size: int) -> LatentRows:
        """A worker's rows of global batch ``step``."""
        rows = self._reader.batch(self._training.seed, step, self._training.batch_size, rank, world_size)
        if self._training.draws:
            return replace(rows, draws=rows.draws % self._training.draws)
        return rows

    def make(self, rows: LatentRows) -> PairBatch:
        """The batch of a worker's rows, or of a micro-batch of them."""
        return self._batch(rows, self._draws)

    def held_out(self, rows: LatentRows, draw: int, num_draws: int) -> PairBatch:
        """Both sides of held-out pairs, t uniform in the draw-th of ``num_draws`` equal parts of 1..T.

        Captions are not dropped, noise is independent and the seed is fixed, so all methods and runs compare.
        """
        timesteps = len(self._draws.cumulative) - 1
        cumulative = (np.arange(timesteps + 1) * num_draws / timesteps - draw).clip(0, 1)
        return self._batch(rows.visit(draw), Draws(seed=HELD_OUT_SEED, cumulative=cumulative))

    def _batch(self, rows: LatentRows, draws: Draws) -> PairBatch:
        visits = list(zip(rows.pair_ids, rows.draws.tolist(), strict=True))
        dropped = np.array(
            [draw_caption_dropout(draws.seed, pair, n, draws.caption_dropout) for pair, n in visits],
            dtype=bool,
        )
        token_ids = np.where(dropped[:, None, None], self._text_encoders.empty_ids, rows.token_ids)
        no_caption = np.zeros_like(dropped) if draws.drops_to_empty else None
        text = self._text_encoders(token_ids, no_caption)
        columns = self._side(rows, text, visits, draws, "w")
        if draws.losers:
            columns |= self._side(rows, text, visits, draws, "l")
        t = [draw_timestep(draws.seed, pair, n, draws.cumulative) for pair, n in visits]
        return PairBatch(
            pair_ids=rows.pair_ids,
            t=torch.tensor(t, device=self._device),
            share=torch.tensor(rows.labels, device=self._device),
            **columns,
        )

    def _side(
        self, rows: LatentRows, text: Conditioning, visits: Visits, draws: Draws, side: Literal["w", "l"]
    ) -> dict[str, Any]:
        """The batch's fields of winners or of losers."""
        manifest = self._reader.manifest
        shape = manifest.latent_shape
        latents, sizes, crops = (getattr(rows, f"{name}_{side}") for name in ("latents", "sizes", "crops"))
        target_px = (manifest.settings["resolution"], manifest.settings["resolution"])
        if draws.fixed_sizes:
            sizes = np.full_like(sizes, manifest.settings["resolution"])
            crops = np.zeros_like(crops)
        noise_of: Side = "shared" if draws.shared_noise else side
        noise = [draw_noise(draws.seed, pair, noise_of, n, shape) for pair, n in visits]
        columns = {
            f"latents_{side}": torch.tensor(latents, dtype=torch.float32, device=self._device),
            f"conditioning_{side}": self._text_encoders.with_sizes(text, sizes, crops, target_px),
            f"noise_{side}": torch.stack(noise).to(self._device),
        }
        if draws.evaluation_points:
            z = [draw_evaluation_point(draws.seed, pair, side, n, shape) for pair, n in visits]
            columns[f"z_{side}"] = torch.stack(z).to(self._device)
        return columns


AnyRows = TypeVar("AnyRows", bound="Rows")


@runtime_checkable
class Rows(Protocol):
    """Anything with one row for each pair: LatentRows, PairBatch."""

    def __len__(self) -> int: ...

    def rows(self: AnyRows, keep: slice) -> AnyRows:
        """Some of the rows."""


def slices(rows: AnyRows, size: int) -> Iterator[AnyRows]:
    """Parts of ``size`` pairs; the last may be shorter. Size 0 yields one part."""
    size = size or len(rows)
    for start in range(0, len(rows), size):
        yield rows.rows(slice(start, start + size))


def micro_batches(rows: AnyRows, num_parts: int) -> Iterator[tuple[AnyRows, bool]]:
    """Parts of nearly equal length, each with whether it is the last."""
    ends = [len(rows) * number // num_parts for number in range(num_parts + 1)]
    for start, end in pairwise(ends):
        yield rows.rows(slice(start, end)), end == len(rows)
