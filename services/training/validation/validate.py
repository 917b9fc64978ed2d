"""Validates one checkpoint, in a process of its own beside the training workers."""

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
from dde_core.scorers.kinds import KINDS
from services.api.records import Validated
from services.artifacts import checkpoints, models, scorers
from services.artifacts.prompts import read_prompts
from services.stages import layout
from services.stages.journal import Journal
from services.stages.specs import TrainSpec
from services.storage import files, sources
from services.training.validation.held_out import held_out_metrics


def validate(spec: TrainSpec, step: int) -> Validated:
    """Measure the model after ``step`` steps (0: the base), and write the outcome and an image grid.

    The model is the running average if the run keeps one. Margins of held-out pairs are against the frozen
    reference.
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
    image_uri = None
    if spec.training.held_out_pairs:
        metrics |= _held_out(spec, policy, folder, device)
    if spec.validation and spec.validation.num_prompts:
        image_uri = layout.outcome_image_uri(spec.run, step)
        prompts = _prompts(spec)
        images = _images(spec, TextToImage(folder, device, policy.unet), prompts)
        files.write_bytes(image_uri, draw_grid(prompts, [("", list(images))]))
        metrics |= _scores(spec, images, prompts, device, step)
    seconds = time.monotonic() - began
    outcome = Validated(step=step, metrics=metrics, picture=image_uri, seconds=seconds)
    files.write_json(layout.outcome_uri(spec.run, step), outcome.model_dump())
    return outcome


def _held_out(spec: TrainSpec, policy: Policy, folder: ModelFolder, device: torch.device) -> dict[str, float]:
    assert spec.dataset
    schedule = folder.schedule()
    with LatentReader(*files.resolve(spec.dataset), spec.training.held_out_pairs) as reader:
        batches = BatchMaker(reader, folder, schedule, spec.objective, spec.training, device)
        return held_out_metrics(policy, batches, reader, schedule, spec.training.micro_batch_size)


def _prompts(spec: TrainSpec) -> list[str]:
    """Without prompts of its own, validation uses those that follow the evaluation's."""
    validation = spec.validation
    evaluation = spec.evaluation
    assert validation
    assert evaluation
    uri = validation.prompts_uri or evaluation.prompts_uri
    skip = 0 if validation.prompts_uri else evaluation.num_prompts
    sources.hold_to(spec.sources)
    read = read_prompts(uri, validation.num_prompts, skip, "validation.num_prompts")
    return [prompt.text for prompt in read]


def _images(spec: TrainSpec, model: TextToImage, prompts: list[str]) -> np.ndarray:
    """An image of each prompt, uint8 [n, h, w, 3]."""
    assert spec.validation
    assert spec.evaluation
    seeds = [spec.validation.seed + i for i in range(len(prompts))]
    return model(prompts, seeds, spec.evaluation.sample)


def _scores(
    spec: TrainSpec, images: np.ndarray, prompts: list[str], device: torch.device, step: int
) -> dict[str, float]:
    """The mean score of each scorer that gives an image a number of its own.

    Others are left out: there is one image a prompt, and of one model.
    """
    means = {}
    for record in spec.scorers:
        if KINDS[record.kind].level != "image":
            continue
        scorer = scorers.load(record, device.type)  # one at a time: a scorer may have gigabytes
        means[record.name] = float(np.mean(scorer(images, prompts)))
        cut = len(scorer.truncated(prompts))
        if cut and step == 0:  # once a run
            limit = scorer.description["token_limit"]
            message = f"{cut} of {len(prompts)} validation prompts have more than the {limit} tokens"
            journal = Journal(spec.prefix)
            journal.event(f"{message} that {record.name} reads: their ends do not count", "warning")
            journal.flush()
    return means
