"""Generate images for the same prompts and seeds with two models and score both, in a pool of Ray actors.

A chunk of prompts is a block. Chunks have a fixed size, so an image does not depend on the number of actors.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import ray.data
import torch

from dde_core.errors import NonFiniteError
from dde_core.generation import TextToImage
from dde_core.models.folder import ModelFolder
from dde_core.shapes.scorers import score
from services.artifacts.models import fetch
from services.stages.specs import EvaluateSpec

PROMPTS_PER_CHUNK = 25
SIDES = ("base", "candidate")


def compare(spec: EvaluateSpec, prompts: list[str]) -> Iterator[dict[str, np.ndarray]]:
    """Yield chunks in any order: {"index", "prompt", "base", "candidate" (images), "base_match", ...}.

    Raises NonFiniteError, naming the model, if one gives infinite or NaN values.
    """
    seed = spec.evaluation.seed
    rows = [{"index": i, "prompt": prompt, "seed": seed + i} for i, prompt in enumerate(prompts)]
    chunks = [{"rows": rows[i : i + PROMPTS_PER_CHUNK]} for i in range(0, len(rows), PROMPTS_PER_CHUNK)]
    compared = ray.data.from_items(chunks, override_num_blocks=len(chunks)).map_batches(
        Comparer,
        fn_constructor_args=(spec,),
        batch_size=None,
        compute=ray.data.ActorPoolStrategy(size=min(spec.actors, len(chunks))),
        num_cpus=1,
        num_gpus=1 if spec.use_gpu else 0,
    )
    yield from compared.iter_batches(batch_size=None)


class Comparer:
    """Both models, loaded once in each actor."""

    def __init__(self, spec: EvaluateSpec) -> None:
        torch.set_num_threads(1)
        device = "cuda" if spec.use_gpu else "cpu"
        self._evaluation = spec.evaluation
        self._names = {"base": spec.base.name, "candidate": spec.candidate.name}
        self._models = {
            side: TextToImage(ModelFolder(*fetch(record)), device)
            for side, record in zip(SIDES, (spec.base, spec.candidate), strict=True)
        }

    def __call__(self, chunk: dict[str, np.ndarray]) -> dict[str, Any]:
        rows = [row for rows in chunk["rows"] for row in rows]
        prompts = [row["prompt"] for row in rows]
        seeds = [int(row["seed"]) for row in rows]
        scorers = self._evaluation.scorers
        result: dict[str, Any] = {
            "index": np.array([row["index"] for row in rows]),
            "prompt": np.array(prompts),
        }
        for side, model in self._models.items():
            try:
                images = model(prompts, seeds, self._evaluation.sample)
            except NonFiniteError as error:
                raise NonFiniteError(f"{side} {self._names[side]}: {error}") from error
            result[side] = images
            if scorers:
                scores = score(images, prompts)
                result |= {f"{side}_{name}": scores[name] for name in scorers}
        return result
