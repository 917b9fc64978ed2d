"""Draw the same prompts with the same seeds from two models and score both, in a pool of Ray actors.

A chunk of prompts is a block, and chunks are cut by a fixed size, so a picture does not depend on the number of actors.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import ray.data
import torch

from dde_core.generation import TextToImage
from dde_core.models.folder import ModelFolder
from dde_core.shapes.scorers import score
from services.artifacts.models import fetch
from services.stages.specs import EvaluateSpec

PROMPTS_PER_CHUNK = 25
SIDES = ("base", "candidate")


def compare(spec: EvaluateSpec, prompts: list[str]) -> Iterator[dict[str, np.ndarray]]:
    """Stream chunks of {"index", "prompt", "base", "candidate" (pictures), "base_match", ...} in any order."""
    rows = [
        {"index": i, "prompt": prompt, "seed": spec.evaluation.seed + i} for i, prompt in enumerate(prompts)
    ]
    chunks = [{"rows": rows[i : i + PROMPTS_PER_CHUNK]} for i in range(0, len(rows), PROMPTS_PER_CHUNK)]
    drawn = ray.data.from_items(chunks, override_num_blocks=len(chunks)).map_batches(
        Comparer,
        fn_constructor_args=(spec,),
        batch_size=None,
        compute=ray.data.ActorPoolStrategy(size=min(spec.actors, len(chunks))),
        num_cpus=1,
        num_gpus=1 if spec.use_gpu else 0,
    )
    yield from drawn.iter_batches(batch_size=None)


class Comparer:
    """Both models, loaded once in each actor."""

    def __init__(self, spec: EvaluateSpec) -> None:
        torch.set_num_threads(1)
        self._evaluation = spec.evaluation
        self._models = {
            side: TextToImage(ModelFolder(*fetch(record)), "cuda" if spec.use_gpu else "cpu")
            for side, record in zip(SIDES, (spec.base, spec.candidate), strict=True)
        }

    def __call__(self, chunk: dict[str, np.ndarray]) -> dict[str, Any]:
        rows = [row for rows in chunk["rows"] for row in rows]
        prompts, seeds = [row["prompt"] for row in rows], [int(row["seed"]) for row in rows]
        result: dict[str, Any] = {
            "index": np.array([row["index"] for row in rows]),
            "prompt": np.array(prompts),
        }
        for side, model in self._models.items():
            pictures = model(prompts, seeds, self._evaluation.sample)
            scores = score(pictures, prompts) if self._evaluation.scorers else {}
            result[side] = pictures
            result |= {f"{side}_{name}": scores[name] for name in self._evaluation.scorers}
        return result
