"""What do preparing images and reading prompts cost? Images/s of a scorer against its model alone."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from transformers import CLIPConfig, CLIPModel

from dde_core.scorers.load import load
from tests.bench.measure import Result, in_turn, ratio
from tests.support.scorers import POSITIONS, VOCABULARY, change_json, write_clip

SIDE = 224
IMAGE_SIDE = 512
BATCH = 4
NUM_IMAGES = 4
"""Of one measurement: short ones in turn meet the same machine."""
PROMPT = "the big red star on a blue star"


def scorer_speed(scratch: Path, rounds: int = 9) -> dict[str, Result]:
    """``scorer_vs_bare``: uint8 images of 512 px and prompts to scores, by a CLIP of ViT-B/16's size in
    batches of 4; and the same pixels and token ids, already made, to scores. Both run on one thread and are
    measured in seconds of it, so other programs do not count.
    """
    torch.set_num_threads(1)
    scorer = load("clip", _folder(scratch / "clip"), batch_size=BATCH)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (NUM_IMAGES, IMAGE_SIDE, IMAGE_SIDE, 3), dtype=np.uint8)
    prompts = [PROMPT] * NUM_IMAGES
    parts = [slice(start, start + BATCH) for start in range(0, NUM_IMAGES, BATCH)]
    batches = [scorer.prepare(images[part], prompts[part]) for part in parts]

    def whole() -> float:
        began = time.process_time()
        scorer(images, prompts)
        return NUM_IMAGES / (time.process_time() - began)

    @torch.inference_mode()
    def bare() -> float:
        began = time.process_time()
        for pixels, text in batches:
            scorer.model(pixels, text)
        return NUM_IMAGES / (time.process_time() - began)

    whole()
    what = f"the model alone, ViT-B/16, float32, batches of {BATCH}, images of {IMAGE_SIDE} px"
    found = in_turn(rounds, {"scorer": whole, "bare": bare})
    return {"scorer_vs_bare": ratio(found, "scorer", "bare", "images/s", what)}


def _folder(folder: Path) -> Path:
    """A random CLIP of ViT-B/16's size with a small vocabulary."""
    write_clip(folder)
    ids = {"bos_token_id": VOCABULARY - 2, "eos_token_id": VOCABULARY - 1, "pad_token_id": VOCABULARY - 1}
    text = {"vocab_size": VOCABULARY, "max_position_embeddings": POSITIONS, **ids}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config={"patch_size": 16})).save_pretrained(folder)
    side = {"height": SIDE, "width": SIDE}
    change_json(folder / "preprocessor_config.json", size={"shortest_edge": SIDE}, crop_size=side)
    return folder
