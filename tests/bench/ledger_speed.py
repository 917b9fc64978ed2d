"""What is a ledger worth to training? Pairs/s of the real training loop, with the reference's errors read from a ledger and
computed in every step. Beside it the ceiling: (forward and backward + forward) / (forward and backward) of the U-Net alone."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

import ray
import torch
from diffusers import UNet2DConditionModel

from dde_core.config import ObjectiveConfig
from dde_core.models.folder import ModelFolder
from dde_core.shapes import MODEL_DIR
from dde_core.train_step import PairBatch, pair_errors
from services import registry
from services.contracts import LedgerSpec
from services.ingest.ledger import ledger
from services.observability import Journal
from tests.bench.measure import Result, Stopwatch, in_turn, ratio, result
from tests.encoded_pairs import batch_maker, train_here, train_spec, write_encoded
from tests.tiny_folders import WIDTH, sd15_folder

OBJECTIVE = ObjectiveConfig(method="uniform", noise="independent")
MID_SIZE: dict[str, Any] = {
    "sample_size": 32,
    "block_out_channels": (96, 192, 384, 384),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": WIDTH,
}
"""Stable Diffusion 1.5's blocks at three tenths of their width, at 32 x 32 latents."""


def ledger_speed(scratch: Path, rounds: int = 3) -> dict[str, Result]:
    """``ledger_vs_online`` on the shapes model (64 pairs a step) and on the mid-size U-Net (4 pairs a step)."""
    return _measure("ledger_vs_online", MODEL_DIR, scratch / "shapes", (4, 8, 8), 64, 12, rounds) | _measure(
        "ledger_vs_online, SD1.5-kind mid-size", _mid_size(scratch / "mid"), scratch / "mid-runs", (4, 32, 32), 4, 4, rounds
    )


def _mid_size(folder: Path) -> Path:
    sd15_folder(folder)
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**MID_SIZE)
    print(f"  mid-size U-Net: {sum(p.numel() for p in unet.parameters()) / 1e6:.1f} million parameters", flush=True)
    unet.save_pretrained(folder / "unet")
    return folder


def _measure(
    name: str, path: Path, scratch: Path, shape: tuple[int, int, int], batch_size: int, steps: int, rounds: int
) -> dict[str, Result]:
    model = ModelFolder(path)
    encoded = write_encoded(scratch / "data", model, pairs=2 * batch_size, shape=shape)
    training = {"steps": steps, "batch_size": batch_size, "draws": 2, "checkpoint_every": steps}
    ledger = _write_ledger(scratch / "ledger", model, encoded, **training)
    runs = iter(range(1000))

    def pairs_per_s(**more: Any) -> float:
        told = train_here(scratch / str(next(runs)), model, encoded, OBJECTIVE, **training, **more)
        return statistics.median(step["pairs_per_s"] for step in told[1:])

    sides = {
        "ledger": lambda: pairs_per_s(reference="ledger", ledger=ledger),
        "online": lambda: pairs_per_s(reference="online"),
    }
    found = ratio(in_turn(rounds, sides), "ledger", "online", "pairs/s", f"the reference in every step of {batch_size} pairs")
    maker = batch_maker(model, encoded, OBJECTIVE, batch_size=batch_size)
    with_gradient, forward = _passes(model, maker.make(maker.rows(0, 0, 1)))
    against = f"forward and backward {with_gradient:.3f} s, forward {forward:.3f} s, of {batch_size} pairs"
    ceiling = (with_gradient + forward) / with_gradient
    return {name: found, f"{name}, ceiling": result(ceiling, with_gradient, "s", against)}


def _write_ledger(folder: Path, model: ModelFolder, encoded: Path, **training: Any) -> str:
    """By the stage itself. The URI of its record."""
    run = train_spec(folder, model, encoded, OBJECTIVE, **training)
    record = run.model.model_copy(update={"digest": registry.folder_digest(run.model.uri)})
    frame = {"job": run.job, "attempt": run.attempt, "prefix": run.prefix, "dataset": run.dataset}
    spec = LedgerSpec(**frame, model=record, objective=run.objective, training=run.training)
    return ledger(spec, Journal(spec.prefix)).ledger


def _passes(model: ModelFolder, batch: PairBatch, rounds: int = 3) -> tuple[float, float]:
    """Median seconds of the U-Net's forward and backward, and of its forward alone, on one batch."""
    unet, schedule = model.unet(), model.schedule()
    torch.set_num_threads(1)

    def with_gradient() -> float:
        watch = Stopwatch()
        errors = pair_errors(unet, schedule, batch)
        (errors.w - errors.l).sum().backward()
        return watch()

    def forward() -> float:
        watch = Stopwatch()
        with torch.no_grad():
            pair_errors(unet, schedule, batch)
        return watch()

    found = in_turn(rounds, {"forward and backward": with_gradient, "forward": forward})
    return statistics.median(found["forward and backward"]), statistics.median(found["forward"])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        print(ledger_speed(Path(scratch)))
        ray.shutdown()
