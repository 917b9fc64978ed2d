"""Score tables with known differences, and images for them."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from dde_core.score_table import Prompt, ScoreTable
from services.api.reports import Provenance

PROVENANCE = Provenance(
    settings={"prompts_uri": "prompts.txt", "seed": 7, "sample": {"steps": 50, "guidance": 7.5}},
    digests={"base": "sha256:" + "0123456789abcdef" * 4, "prompts.txt": "sha256:" + "fedcba98" * 8},
    command="dde evaluate tuned base --prompts prompts.txt --images-per-prompt 4 --seed 7",
)


def score_table(
    num_prompts: int = 120,
    num_images: int = 4,
    gains: dict[str, dict[str, float]] | None = None,
    prompts: list[Prompt] | None = None,
    drift: tuple[float, ...] | None = None,
) -> ScoreTable:
    """Scores of ``base`` and each model of ``gains`` [model][kind of scorer]: a mean gain in deviations.

    A scorer is called like its kind. Half of the variance of scores is the prompt's, the models share it.
    """
    gains = gains or {"tuned": {"pickscore": 0.4, "clip": 0.0, "hps": -0.4, "diversity": 0.0}}
    rng = np.random.default_rng(11)
    models = ["base", *gains]
    kinds = {kind: kind for kind in next(iter(gains.values()))}
    prompts = prompts or [Prompt(f"prompt {i}", "animals" if i % 3 else "people") for i in range(num_prompts)]
    scores: dict[str, np.ndarray] = {}
    for kind in kinds:
        shape = (len(prompts), 1 if kind == "diversity" else num_images)
        shared = rng.standard_normal((len(prompts), 1))
        each = [
            (0 if model == "base" else gains[model][kind]) + (shared + rng.standard_normal(shape)) / 2**0.5
            for model in models
        ]
        scores[kind] = 0.2 + 0.02 * np.stack(each)
    if "diversity" in kinds:
        scores["diversity"] = scores["diversity"][:, :, 0]
    if drift:
        scores["drift"] = np.array(drift)
        kinds["drift"] = "drift"
    return ScoreTable(
        models=models, prompts=prompts, images_per_prompt=num_images, kinds=kinds, scores=scores
    )


def png(model: int, prompt: int, image: int, side: int = 64) -> bytes:
    """A plain square with a stripe, different for every model, prompt and image."""
    pixels = np.full((side, side, 3), (60 * model + 60, (37 * prompt) % 256, (61 * image) % 256), np.uint8)
    pixels[side // 3 : side // 2] = 255
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()
