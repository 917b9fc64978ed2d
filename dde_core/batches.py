"""From shard rows to a batch for the U-Net: every draw of a visit is made here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Protocol, Self, TypeVar

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
"""(pair id, number of the draw): with the seed, what every draw is keyed by."""

HELD_OUT_SEED = 0


@dataclass(frozen=True, eq=False)
class Draws:
    """What is drawn for a visit, and how. ``cumulative`` is the distribution of t = 0..T."""

    seed: int
    cumulative: Float[np.ndarray, " times"]
    caption_dropout: float = 0.0
    shared_noise: bool = False
    losers: bool = True
    evaluation_points: bool = False


class BatchMaker:
    """Rows of the reader with the draws of their visit. Every draw is keyed by (draw_seed, pair, n), never by worker; a pair's
    n-th visit has draw n, or n mod ``training.draws`` where that is set."""

    def __init__(
        self,
        reader: LatentReader,
        folder: ModelFolder,
        schedule: Schedule,
        objective: ObjectiveConfig,
        training: TrainConfig,
        device: torch.device,
    ) -> None:
        self._reader, self._training, self._device = reader, training, device
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
        )

    def rows(self, step: int, rank: int, world_size: int) -> LatentRows:
        """A worker's rows of global batch ``step``."""
        rows = self._reader.batch(self._training.seed, step, self._training.batch_size, rank, world_size)
        return replace(rows, draws=rows.draws % self._training.draws) if self._training.draws else rows

    def make(self, rows: LatentRows) -> PairBatch:
        """The batch of these rows: of a whole share, or of a micro-batch of it."""
        return self._batch(rows, self._draws)

    def held_out(self, rows: LatentRows, draw: int, num_draws: int) -> PairBatch:
        """Both sides of held-out pairs, t from the draw-th of ``num_draws`` equal parts of 1..T.

        Captions are never dropped, noise is independent and the seed is fixed: the same for every method and run.
        """
        timesteps = len(self._draws.cumulative) - 1
        part = (np.arange(timesteps + 1) * num_draws / timesteps - draw).clip(0, 1)
        return self._batch(rows.visit(draw), Draws(seed=HELD_OUT_SEED, cumulative=part))

    def _batch(self, rows: LatentRows, draws: Draws) -> PairBatch:
        visits = list(zip(rows.pair_ids, rows.draws.tolist(), strict=True))
        dropped = np.array(
            [draw_caption_dropout(draws.seed, pair, n, draws.caption_dropout) for pair, n in visits],
            dtype=bool,
        )
        text = self._text_encoders(
            np.where(dropped[:, None, None], self._text_encoders.empty_ids, rows.token_ids)
        )
        sides = "wl" if draws.losers else "w"
        fields_of_sides = {
            f"{name}_{side}": value
            for side in sides
            for name, value in self._side(rows, text, visits, draws, side)
        }
        t = [draw_timestep(draws.seed, pair, n, draws.cumulative) for pair, n in visits]
        return PairBatch(pair_ids=rows.pair_ids, t=torch.tensor(t, device=self._device), **fields_of_sides)

    def _side(
        self, rows: LatentRows, text: Conditioning, visits: Visits, draws: Draws, side: Any
    ) -> Iterator[tuple[str, Any]]:
        """What belongs to winners or to losers: latents, conditioning, noise, and for `sampled` calibration z."""
        shape = self._reader.manifest.latent_shape
        latents, sizes, crops = (getattr(rows, f"{name}_{side}") for name in ("latents", "sizes", "crops"))
        yield "latents", torch.tensor(latents, dtype=torch.float32, device=self._device)
        target_px = (self._reader.manifest.settings["resolution"],) * 2
        yield "conditioning", self._text_encoders.with_sizes(text, sizes, crops, target_px)
        whose: Side = "shared" if draws.shared_noise else side
        yield (
            "noise",
            torch.stack([draw_noise(draws.seed, pair, whose, n, shape) for pair, n in visits]).to(
                self._device
            ),
        )
        if draws.evaluation_points:
            z = [draw_evaluation_point(draws.seed, pair, side, n, shape) for pair, n in visits]
            yield "z", torch.stack(z).to(self._device)


class Rows(Protocol):
    """Anything that is cut by pairs."""

    def __len__(self) -> int: ...

    def rows(self, keep: slice) -> Self:
        """Some of them."""


AnyRows = TypeVar("AnyRows", bound=Rows)


def slices(rows: AnyRows, size: int) -> Iterator[AnyRows]:
    """Parts of ``size`` pairs, the last of what is left (0: one part)."""
    for start in range(0, len(rows), size or len(rows)):
        yield rows.rows(slice(start, start + (size or len(rows))))


def parts_of_a_share(batch_size: int, world_size: int, size: int) -> int:
    """How many micro-batches of at most ``size`` pairs a worker's share of a global batch is cut into.

    The same for all workers, though shares may differ by a pair: a model in shares is gathered by all of them at once, and
    who has a part more would wait for ever. So where ``size`` is 1 and shares differ, a part may have 2.
    """
    return min(-(-batch_size // (world_size * size)), batch_size // world_size)


def micro_batches(rows: AnyRows, num_parts: int) -> Iterator[tuple[AnyRows, bool]]:
    """So many parts of nearly equal length, and whether a part is the last."""
    ends = [len(rows) * number // num_parts for number in range(num_parts + 1)]
    for start, end in pairwise(ends):
        yield rows.rows(slice(start, end)), end == len(rows)
