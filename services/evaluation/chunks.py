"""The work of an evaluation in chunks: the images j of consecutive prompts by one model.

A chunk is drawn, written and scored as a whole. Chunks start at multiples of ``PROMPTS_PER_CHUNK`` and hold
one image of each prompt, so evaluations of more prompts, or with more images of each, find the same chunks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version

import numpy as np

from dde_core.config import SampleConfig
from dde_core.score_table import Prompt
from services.api.records import ModelRecord, ScorerRecord
from services.api.requests import MAX_PROMPTS, ImageFolder
from services.artifacts import models
from services.artifacts.external_images import check_images, find_images, one_size
from services.stages import layout
from services.stages.specs import EvaluateSpec

PROMPTS_PER_CHUNK = 25
FORMAT = 1
"""Part of every key: a new number makes all stored images and scores unknown."""


@dataclass(frozen=True)
class Chunk:
    """Images j = ``image`` of the prompts from number ``first`` on, by the model at place ``model``.

    ``size`` is the height and width in pixels.
    ``folder`` is where the chunk is stored and ``key`` its name there. ``names`` are the files of images that
    were drawn elsewhere, whose key depends on their content; ``key`` is "" for these.
    """

    model: int
    first: int
    image: int
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    size: tuple[int, int]
    folder: str
    key: str = ""
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scored:
    """A chunk whose images are stored at ``uri``: how many of them were drawn now, and their scores.

    ``scores``: float64 [n] of each scorer by name, or [n, d] features. ``seconds`` were spent on the model's
    images ("draw"), on scoring ("score") and in all ("total").
    """

    chunk: Chunk
    uri: str
    drawn: int
    scores: dict[str, np.ndarray]
    seconds: dict[str, float]
    warnings: tuple[str, ...] = ()


def seed_of(seed: int, prompt: int, image: int) -> int:
    """The seed of image ``image`` of prompt ``prompt``, the same for all models. No two have the same."""
    return seed + prompt + MAX_PROMPTS * image


def base_first(spec: EvaluateSpec) -> list[ModelRecord | ImageFolder]:
    """The spec's models, the base before all others."""
    return sorted(spec.models, key=lambda model: model.name != spec.base)


def plan(spec: EvaluateSpec, prompts: Sequence[Prompt]) -> list[Chunk]:
    """All chunks of an evaluation, those of one model together.

    Raises BadRequest, naming the model, for images that were drawn elsewhere and are not all there, and for
    images of several sizes.
    """
    config = spec.evaluation
    texts = tuple(prompt.text for prompt in prompts)
    compared = base_first(spec)
    sizes: dict[str, tuple[int, int]] = {}
    names: dict[int, list[list[str]]] = {}
    for place, model in enumerate(compared):
        if isinstance(model, ImageFolder):
            names[place] = find_images(model, texts, config.images_per_prompt)
            sizes[model.name] = check_images(model, [name for row in names[place] for name in row])
        else:
            sizes[model.name] = models.drawn_size(model, config.sample)
    size = one_size(sizes)
    sample = replace(config.sample, height=size[0], width=size[1])
    chunks: list[Chunk] = []
    for place, model in enumerate(compared):
        for image in range(config.images_per_prompt):
            for first in range(0, len(prompts), PROMPTS_PER_CHUNK):
                rows = range(first, min(first + PROMPTS_PER_CHUNK, len(prompts)))
                chunk = Chunk(
                    model=place,
                    first=first,
                    image=image,
                    prompts=texts[rows.start : rows.stop],
                    seeds=tuple(seed_of(config.seed, i, image) for i in rows),
                    size=size,
                    folder=layout.external_images(spec.images),
                )
                if isinstance(model, ImageFolder):
                    chunk = replace(chunk, names=tuple(names[place][i][image] for i in rows))
                else:
                    folder = layout.images_of(spec.images, models.identity(model))
                    chunk = replace(chunk, folder=folder, key=key_of_drawn(chunk, sample, spec.use_gpu))
                chunks.append(chunk)
    return chunks


def key_of_drawn(chunk: Chunk, sample: SampleConfig, use_gpu: bool) -> str:
    """The name of a model's chunk: everything but the model that determines its pixels.

    Arithmetic differs between processors and between versions of the libraries that draw.
    """
    software = [version("torch"), version("diffusers"), "cuda" if use_gpu else "cpu"]
    return _key(FORMAT, software, asdict(sample), chunk.prompts, chunk.seeds)


def key_of_external(prompts: Sequence[str], contents: Sequence[bytes]) -> str:
    """The name of a chunk of images that were drawn elsewhere: their content."""
    return _key(FORMAT, list(prompts), [hashlib.sha256(content).hexdigest() for content in contents])


def key_of_scorer(scorer: ScorerRecord, use_gpu: bool) -> str:
    """Everything but the images that determines a scorer's numbers."""
    software = [version("torch"), version("transformers"), "cuda" if use_gpu else "cpu"]
    return _key(FORMAT, software, scorer.kind, scorer.digest, scorer.resize)[:16]


def _key(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
