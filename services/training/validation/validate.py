"""What validation does with one checkpoint, in a process of its own beside the training workers."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import torch

from dde_core.batches import BatchMaker
from dde_core.checkpoint import model_weights
from dde_core.generation import TextToImage
from dde_core.image_grid import draw_grid
from dde_core.latents.reader import LatentReader
from dde_core.models.folder import ModelFolder
from dde_core.models.policy import Policy, use_deterministic_kernels
from dde_core.shapes.scorers import score
from services.api.records import Validated
from services.artifacts import checkpoints, models
from services.artifacts.prompts import read_prompts
from services.stages.specs import TrainSpec
from services.storage import files
from services.training.validation.held_out import held_out_metrics


def validate(spec: TrainSpec, step: int) -> Validated:
    """Measure the model after ``step`` steps (0: the base), write what is found, and its pictures, and return it.

    It is the running average where one is kept. Held-out pairs are compared with the frozen reference.
    """
    began = time.monotonic()
    use_deterministic_kernels()
    device = torch.device("cuda" if spec.use_gpu else "cpu")
    folder = ModelFolder(*models.fetch(spec.model))
    policy = Policy(folder, replace(spec.training, ema_decay=0.0), device)
    if step:
        with checkpoints.opened(spec.run, checkpoints.read(spec.run, step)) as state:
            policy.read(model_weights(state))
    metrics: dict[str, float] = {}
    picture = None
    if spec.training.held_out_pairs:
        metrics |= _held_out(spec, policy, folder, device)
    if spec.validation and spec.validation.num_prompts:
        picture = checkpoints.outcome_uri(spec.run, step).replace(".json", ".png")
        metrics |= _pictures(spec, TextToImage(folder, device, policy.unet), picture)
    found = Validated(step=step, metrics=metrics, picture=picture, seconds=time.monotonic() - began)
    files.write_json(checkpoints.outcome_uri(spec.run, step), found.model_dump())
    return found


def _held_out(spec: TrainSpec, policy: Policy, folder: ModelFolder, device: torch.device) -> dict[str, float]:
    schedule = folder.schedule()
    with LatentReader(*files.resolve(spec.dataset), spec.training.held_out_pairs) as reader:
        batches = BatchMaker(reader, folder, schedule, spec.objective, spec.training, device)
        return held_out_metrics(policy, batches, reader, schedule, spec.training.micro_batch_size)


def _pictures(spec: TrainSpec, model: TextToImage, target: str) -> dict[str, float]:
    """Draw the validation's prompts and write the sheet. Mean scores."""
    asked, evaluation = spec.validation, spec.evaluation
    assert asked
    assert evaluation
    skip = 0 if asked.prompts_uri else evaluation.num_prompts
    prompts = read_prompts(
        asked.prompts_uri or evaluation.prompts_uri, asked.num_prompts, skip, "validation.num_prompts"
    )
    pictures = model(prompts, [asked.seed + i for i in range(len(prompts))], evaluation.sample)
    files.write_bytes(target, draw_grid(prompts, [("", list(pictures))]))
    scores = score(pictures, prompts) if evaluation.scorers else {}
    return {name: float(np.mean(scores[name])) for name in evaluation.scorers}
