"""A full-size training step on one device, three ways: ours, the public recipe, and the floor.

Ours reads shards, draws and a ledger in the order of services/training/worker/loop.py. dde_core alone: no
Ray, no journal, no checkpoints.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path

import torch
from pyarrow import fs
from torch import Tensor

from dde_core.batches import BatchMaker, slices
from dde_core.config import ObjectiveConfig, TrainConfig
from dde_core.latents.ledger import Ledger
from dde_core.latents.reader import LatentReader
from dde_core.models.policy import Policy, make_optimizer, use_deterministic_kernels
from dde_core.step_metrics import step_metrics
from dde_core.train_step import PairErrors, check_finite, pair_errors, step_losses
from tests.bench.floor import Floor
from tests.bench.public_recipe import PublicRecipe
from tests.bench.random_folder import RandomFolder, write_ledger, write_shard_of
from tests.support.synthetic_pairs import synthetic_rows

OBJECTIVE = ObjectiveConfig(method="uniform", noise="independent")


class Ours:
    """The steps of the training loop, on the shards at ``data`` and the ledger at ``record``."""

    def __init__(
        self, folder: RandomFolder, training: TrainConfig, device: torch.device, data: Path, record: Path
    ) -> None:
        self._training = training
        self._schedule = folder.schedule().to(device)
        self.reader = LatentReader(fs.LocalFileSystem(), str(data))
        self._maker = BatchMaker(self.reader, folder, folder.schedule(), OBJECTIVE, training, device)
        self._ledger = Ledger(fs.LocalFileSystem(), str(record), device)
        self.policy = Policy(folder, training, device)
        self._optimizer = make_optimizer(self.policy.parameters(), training)
        self._number = 0

    def step(self) -> dict[str, float]:
        """One optimizer step. Returns the metrics that the loop logs."""
        self._optimizer.zero_grad(set_to_none=True)
        rows = self._maker.rows(self._number, 0, 1)
        timesteps: list[Tensor] = []
        thetas: list[PairErrors] = []
        refs: list[PairErrors] = []
        for part in slices(rows, self._training.micro_batch_size):
            batch = self._maker.make(part)
            ref = self._ledger.errors(part)
            with self.policy.autocast():
                theta = pair_errors(self.policy.trained, self._schedule, batch)
            terms = step_losses(theta, ref, batch.t, OBJECTIVE, self._schedule)
            check_finite("loss", terms.loss)
            (terms.loss.sum() / self._training.batch_size).backward()
            timesteps.append(batch.t)
            thetas.append(theta)
            refs.append(ref)
        check_finite("gradient", self.policy.clip_gradients())
        self._optimizer.step()
        self._number += 1
        t = torch.cat(timesteps)
        theta = PairErrors.joined(thetas)
        ref = PairErrors.joined(refs)
        terms = step_losses(theta, ref, t, OBJECTIVE, self._schedule)
        return step_metrics(t, theta, ref, terms, self._schedule.T)


class Sides:
    """Pairs/s of ``ours``, ``public_recipe`` and ``floor`` on the same settings, one at a time in memory."""

    def __init__(
        self,
        model: str,
        device: torch.device,
        training: TrainConfig,
        scratch: Path,
        workers: int,
        timed_steps: int,
    ):
        """``workers`` processes decode images for the public recipe. Data is written below ``scratch``."""
        self._device = device
        self._training = training
        self._workers = workers
        self._timed_steps = timed_steps
        self._folder = RandomFolder(model, device)
        self._data = scratch
        self._rows = list(synthetic_rows(2 * training.batch_size, size=self._folder.size_px, shared=0.0))
        write_shard_of(self._folder, scratch, [row["caption"] for row in self._rows])
        select_kernels(device, deterministic=True)
        self.record = write_ledger(self._folder, scratch, OBJECTIVE, training, device)
        self.peak_gb: dict[str, float] = {}

    def ours(self) -> float:
        """Pairs/s with deterministic kernels, as every run of ours."""
        select_kernels(self._device, deterministic=True)
        ours = Ours(self._folder, self._training, self._device, self._data, self.record)
        with ours.reader:
            return self._measure("ours", ours.step)

    def public_recipe(self) -> float:
        """Pairs/s with torch's default kernels."""
        select_kernels(self._device, deterministic=False)
        folder = self._folder
        recipe = PublicRecipe(
            folder, self._training, self._device, self._rows, folder.size_px, OBJECTIVE.beta, self._workers
        )
        try:
            return self._measure("public recipe", recipe.step)
        finally:
            recipe.close()

    def floor(self) -> float:
        """Pairs/s with torch's default kernels."""
        select_kernels(self._device, deterministic=False)
        with LatentReader(fs.LocalFileSystem(), str(self._data)) as reader:
            maker = BatchMaker(
                reader, self._folder, self._folder.schedule(), OBJECTIVE, self._training, self._device
            )
            rows = maker.rows(0, 0, 1)
            batch = maker.make(rows)
        floor = Floor(self._folder, self._training, self._device, batch, rows.token_ids, OBJECTIVE.beta)
        return self._measure("floor", floor.step)

    def _measure(self, side: str, step: Callable[[], object]) -> float:
        """Pairs/s, after two steps that allocate, select kernels and compile."""
        for _ in range(2):
            step()
        began = self._now()
        for _ in range(self._timed_steps):
            step()
        seconds = self._now() - began
        if self._device.type == "cuda":
            self.peak_gb[side] = torch.cuda.max_memory_allocated(self._device) / 1e9
        return self._timed_steps * self._training.batch_size / seconds

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.monotonic()


def select_kernels(device: torch.device, *, deterministic: bool) -> None:
    """Select deterministic kernels or torch's defaults; free the memory of the previous side."""
    use_deterministic_kernels()
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.allow_tf32 = not deterministic
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
