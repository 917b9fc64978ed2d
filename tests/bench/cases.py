"""Models and encoded pairs on disk that training is measured on, and the seconds of each step of the real loop on them."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from dde_core.config import ObjectiveConfig, TrainConfig
from dde_core.models.folder import ModelFolder
from dde_core.shapes import MODEL_DIR
from services.artifacts import models
from services.ingest.ledger import ledger
from services.stages.journal import Journal, read_journal
from services.stages.specs import JournalEvent, LedgerSpec, TrainSpec
from tests.support.encoded_pairs import train_here, train_spec, write_encoded
from tests.support.tiny_folders import WIDTH, sd15_folder
from tests.support.unet_configs import SD15, SD15_VAE

OBJECTIVE = ObjectiveConfig(method="uniform", noise="independent")
MID_SIZE: dict[str, Any] = SD15 | {
    "sample_size": 32,
    "block_out_channels": (96, 192, 384, 384),
    "cross_attention_dim": WIDTH,
}
"""Stable Diffusion 1.5's blocks at three tenths of their width, at 32 x 32 latents."""
MID_SIZE_VAE: dict[str, Any] = SD15_VAE | {"sample_size": 256, "block_out_channels": (32, 64, 128, 128)}
"""Stable Diffusion 1.5's VAE at a quarter of its width. To encode a picture of 256 px takes 1.00 times the FLOPs of a forward
of the U-Net above, and 1.4 times its seconds: so large a picture in so few channels runs at fewer FLOP/s (float32, 8 pictures,
one thread of an AMD EPYC). Stable Diffusion 1.5's own takes 1.39 times the FLOPs. 36 channels would take 1.26 times the FLOPs
and 2.0 to 2.2 times the seconds, which would make the public recipe slower than it is."""
WARM_UP = 2
"""Steps of a run that are not counted: memory is allocated, the first rows are read."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """``model`` and ``root`` are folders, as text: cases go to other processes as JSON. ``title`` follows a result's name."""

    title: str
    model: str
    root: str
    size_px: int
    shape: tuple[int, int, int]
    batch_size: int

    @classmethod
    def shapes(cls, scratch: Path, batch_size: int = 64) -> Case:
        """The shipped model, 2.2 million parameters, pictures of 32 px."""
        case = cls(
            title="",
            model=str(MODEL_DIR),
            root=str(scratch),
            size_px=32,
            shape=(4, 8, 8),
            batch_size=batch_size,
        )
        return case._with_pairs()

    @classmethod
    def mid_size(cls, scratch: Path, batch_size: int = 4) -> Case:
        """The mid-size U-Net, 76.0 million parameters, and its VAE, pictures of 256 px."""
        folder = sd15_folder(scratch / "model")
        torch.manual_seed(0)
        UNet2DConditionModel(**MID_SIZE).save_pretrained(folder / "unet")
        AutoencoderKL(**MID_SIZE_VAE).save_pretrained(folder / "vae")
        return cls(
            title=", SD1.5-kind mid-size",
            model=str(folder),
            root=str(scratch),
            size_px=256,
            shape=(4, 32, 32),
            batch_size=batch_size,
        )._with_pairs()

    def _with_pairs(self) -> Case:
        write_encoded(self.encoded, self.folder, pairs=2 * self.batch_size, shape=tuple(self.shape))
        return self

    @property
    def encoded(self) -> Path:
        return Path(self.root) / "data"

    @property
    def folder(self) -> ModelFolder:
        return ModelFolder(self.model)

    def training(self, steps: int, **more: Any) -> dict[str, Any]:
        """Settings of a run: two epochs' draws, a checkpoint at the end alone."""
        return {"steps": steps, "batch_size": self.batch_size, "draws": 2, "checkpoint_every": steps, **more}

    def config(self, steps: int = 1) -> TrainConfig:
        return TrainConfig(**self.training(steps))

    def spec(self, name: str, training: dict[str, Any]) -> TrainSpec:
        """What the train stage is told, for one worker."""
        spec = train_spec(Path(self.root) / name, self.folder, self.encoded, OBJECTIVE, **training)
        record = spec.model.model_copy(update={"digest": models.folder_digest(spec.model.uri)})
        return spec.model_copy(update={"model": record})

    def write_ledger(self) -> str:
        """By the stage itself. The URI of its record."""
        run = self.spec("ledger", self.training(1))
        frame = {"job": run.job, "attempt": run.attempt, "prefix": run.prefix, "dataset": run.dataset}
        spec = LedgerSpec(**frame, model=run.model, objective=run.objective, training=run.training)
        return ledger(spec, Journal(spec.prefix)).ledger

    def train(self, name: str, steps: int, ledger: str | None, **more: Any) -> list[JournalEvent]:
        """The real loop as one worker in this process, on a ledger or with the reference in every step. What each step told."""
        folder, source = Path(self.root) / name, "ledger" if ledger else "online"
        training = self.training(steps, reference=source, **more)
        train_here(folder, self.folder, self.encoded, OBJECTIVE, ledger=ledger, **training)
        return told_steps(folder.as_uri())


def told_steps(prefix: str) -> list[JournalEvent]:
    """The journal's entries that hold metrics, in order."""
    return [entry for _, some in read_journal(prefix, 0) for entry in some if entry.metrics]


def step_seconds(told: Sequence[JournalEvent]) -> list[float]:
    """From one step's telling to the next one's, after the warm-up: all that a step costs, whatever the loop counts as one."""
    return [after.at - before.at for before, after in itertools.pairwise(told[WARM_UP - 1 :])]


def pairs_per_s(batch_size: int, told: Sequence[JournalEvent]) -> float:
    """By the median step."""
    return batch_size / statistics.median(step_seconds(told))
