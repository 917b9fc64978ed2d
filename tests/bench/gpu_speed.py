"""A full-size training step three ways on one device: ours (shards, draws and ledger, in the order of
services/training/worker/loop.py), the public recipe, and the floor. dde_core alone: no Ray, no journal, no checkpoints."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pyarrow import fs

from dde_core.batches import BatchMaker, slices
from dde_core.config import ObjectiveConfig, TrainConfig
from dde_core.latents.ledger import Ledger
from dde_core.latents.reader import LatentReader
from dde_core.metrics import step_metrics
from dde_core.models.policy import Policy, make_optimizer, use_deterministic_kernels
from dde_core.train_step import PairErrors, check_finite, pair_errors, step_losses
from tests.bench.floor import Floor
from tests.bench.public_recipe import PublicRecipe
from tests.bench.random_folder import RandomFolder, write_ledger, write_shard_of
from tests.support.synthetic_pairs import synthetic_rows

OBJECTIVE = ObjectiveConfig(method="uniform", noise="independent")


class Ours:
    """One step of the loop after another, on the shard and the ledger at ``data``."""

    def __init__(
        self, folder: RandomFolder, training: TrainConfig, device: torch.device, data: Path, record: Path
    ) -> None:
        self._training, self._schedule = training, folder.schedule().to(device)
        self.reader = LatentReader(fs.LocalFileSystem(), str(data))
        self._maker = BatchMaker(self.reader, folder, folder.schedule(), OBJECTIVE, training, device)
        self._ledger = Ledger(fs.LocalFileSystem(), str(record), device)
        self._policy = Policy(folder, training, device)
        self._optimizer = make_optimizer(self._policy.parameters(), training)
        self._number = 0

    def step(self) -> dict[str, float]:
        """What the loop tells of it."""
        self._optimizer.zero_grad(set_to_none=True)
        rows, parts = self._maker.rows(self._number, 0, 1), []
        for part in slices(rows, self._training.micro_batch_size):
            batch = self._maker.make(part)
            with self._policy.autocast():
                ref, theta = (
                    self._ledger.errors(part),
                    pair_errors(self._policy.trained, self._schedule, batch),
                )
            terms = step_losses(theta, ref, batch.t, OBJECTIVE, self._schedule)
            check_finite("loss", terms.loss)
            (terms.loss.sum() / self._training.batch_size).backward()
            parts.append((batch.t, theta, ref))
        check_finite("gradient", self._policy.clip_gradients())
        self._optimizer.step()
        self._number += 1
        t, theta, ref = (
            torch.cat([t for t, _, _ in parts]),
            *(PairErrors.joined([part[i] for part in parts]) for i in (1, 2)),
        )
        return step_metrics(
            t, theta, ref, step_losses(theta, ref, t, OBJECTIVE, self._schedule), self._schedule.T
        )


class Sides:
    """What each of ``ours``, ``public_recipe`` and ``floor`` makes of the same settings. Models live one side at a time."""

    def __init__(
        self,
        model: str,
        device: torch.device,
        training: TrainConfig,
        scratch: Path,
        workers: int,
        timed_steps: int,
    ):
        """``workers`` processes decode the public recipe's pictures ahead; data is written below ``scratch``."""
        self._device, self._training, self._workers, self._timed_steps = (
            device,
            training,
            workers,
            timed_steps,
        )
        self._folder, self._data = RandomFolder(model, device), scratch
        self._rows = list(synthetic_rows(2 * training.batch_size, size=self._folder.size_px, shared=0.0))
        write_shard_of(self._folder, scratch, [row["caption"] for row in self._rows])
        kernels(device, repeatable=True)
        self.record = write_ledger(self._folder, scratch, OBJECTIVE, training, device)
        self.peak_gb: dict[str, float] = {}

    def ours(self) -> float:
        """Pairs/s. On repeatable kernels, as every run of ours."""
        kernels(self._device, repeatable=True)
        made = Ours(self._folder, self._training, self._device, self._data, self.record)
        with made.reader:
            return self._measured("ours", made.step)

    def public_recipe(self) -> float:
        kernels(self._device, repeatable=False)
        folder, size_px = self._folder, self._folder.size_px
        made = PublicRecipe(
            folder, self._training, self._device, self._rows, size_px, OBJECTIVE.beta, self._workers
        )
        try:
            return self._measured("public recipe", made.step)
        finally:
            made.close()

    def floor(self) -> float:
        kernels(self._device, repeatable=False)
        with LatentReader(fs.LocalFileSystem(), str(self._data)) as reader:
            maker = BatchMaker(
                reader, self._folder, self._folder.schedule(), OBJECTIVE, self._training, self._device
            )
            rows = maker.rows(0, 0, 1)
            batch = maker.make(rows)
        made = Floor(self._folder, self._training, self._device, batch, rows.token_ids, OBJECTIVE.beta)
        return self._measured("floor", made.step)

    def _measured(self, side: str, step: Callable[[], Any]) -> float:
        """After two steps that allocate, choose kernels and compile."""
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


def kernels(device: torch.device, *, repeatable: bool) -> None:
    """What ``use_deterministic_kernels`` sets, or torch's own defaults; and what the side before left is freed."""
    use_deterministic_kernels()
    torch.use_deterministic_algorithms(repeatable)
    torch.backends.cudnn.allow_tf32 = not repeatable
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
