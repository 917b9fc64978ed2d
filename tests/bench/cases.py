"""Models and encoded pairs that training is measured on, and the seconds of each step of the real loop."""

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
"""Stable Diffusion 1.5's VAE at a quarter of its width.

Encoding a 256 px image takes 1.00 times the FLOPs of a forward of the U-Net above (Stable Diffusion 1.5's
own: 1.39 times) and 1.4 times its seconds: few channels at a high resolution reach fewer FLOP/s. With 36
channels it would take 1.26 times the FLOPs but 2.0 to 2.2 times the seconds, which would make the public
recipe slower than it is. Measured in float32 on 8 images, one thread of an AMD EPYC."""
WARM_UP = 2
"""First steps of a run, which are not counted: they allocate memory and read the first rows."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model and encoded pairs. ``title`` is appended to the name of a result.

    ``model`` and ``root`` are folders, as text: cases are sent to other processes as JSON.
    """

    title: str
    model: str
    root: str
    size_px: int
    shape: tuple[int, int, int]
    batch_size: int

    @classmethod
    def shapes(cls, scratch: Path, batch_size: int = 64) -> Case:
        """The shipped model, 2.2 million parameters, images of 32 px."""
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
        """The mid-size U-Net, 76.0 million parameters, and its VAE, images of 256 px."""
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
        """Settings of a run: two draws of each pair, a checkpoint at the end only."""
        return {"steps": steps, "batch_size": self.batch_size, "draws": 2, "checkpoint_every": steps, **more}

    def config(self, steps: int = 1) -> TrainConfig:
        return TrainConfig(**self.training(steps))

    def spec(self, name: str, training: dict[str, Any]) -> TrainSpec:
        """The train stage's spec, for one worker."""
        spec = train_spec(Path(self.root) / name, self.folder, self.encoded, OBJECTIVE, **training)
        record = spec.model.model_copy(update={"digest": models.folder_digest(spec.model.uri)})
        return spec.model_copy(update={"model": record})

    def write_ledger(self) -> str:
        """Run the ledger stage. Returns the URI of the ledger's record."""
        run = self.spec("ledger", self.training(1))
        frame = {"job": run.job, "attempt": run.attempt, "prefix": run.prefix, "dataset": run.dataset}
        spec = LedgerSpec(**frame, model=run.model, objective=run.objective, training=run.training)
        return ledger(spec, Journal(spec.prefix)).ledger

    def train(self, name: str, steps: int, ledger: str | None, **more: Any) -> list[JournalEvent]:
        """Run the real loop as one worker in this process; return the journal's entry of each step.

        Without a ledger the reference runs in every step.
        """
        folder = Path(self.root) / name
        source = "ledger" if ledger else "online"
        training = self.training(steps, reference=source, **more)
        train_here(folder, self.folder, self.encoded, OBJECTIVE, ledger=ledger, **training)
        return step_entries(folder.as_uri())


def step_entries(prefix: str) -> list[JournalEvent]:
    """The journal's entries with metrics, one a step, in order."""
    return [entry for _, some in read_journal(prefix, 0) for entry in some if entry.metrics]


def step_seconds(steps: Sequence[JournalEvent]) -> list[float]:
    """Seconds between the entries of successive steps, after the warm-up: the whole cost of a step."""
    return [after.at - before.at for before, after in itertools.pairwise(steps[WARM_UP - 1 :])]


def pairs_per_s(batch_size: int, steps: Sequence[JournalEvent]) -> float:
    """From the median step."""
    return batch_size / statistics.median(step_seconds(steps))
