"""Images/s of a scorer of PickScore's and HPS's size (CLIP ViT-H/14, random weights) against its model alone.

    python -m tests.bench.gpu_scorer --out results.json

Both start from uint8 images of 512 px on the host. ``--model tiny`` takes a small CLIP.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import CLIPConfig, CLIPModel

from dde_core.scorers.load import load
from tests.bench.gpu_step import gpu_parser, machine_of, record_results
from tests.bench.measure import in_turn, ratio
from tests.support.scorers import POSITIONS, VOCABULARY, change_json, write_clip

SIDE = 224
H14_VISION = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "patch_size": 14,
}
H14_TEXT = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
}


def write_folder(folder: Path, *, small: bool) -> Path:
    """A random CLIP with a small vocabulary."""
    write_clip(folder)
    ids = {"bos_token_id": VOCABULARY - 2, "eos_token_id": VOCABULARY - 1, "pad_token_id": VOCABULARY - 1}
    text = {"vocab_size": VOCABULARY, "max_position_embeddings": POSITIONS, **ids}
    vision = {"patch_size": 32, "num_hidden_layers": 2}
    config = CLIPConfig(text_config=text, vision_config=vision)
    if not small:
        config = CLIPConfig(text_config=H14_TEXT | text, vision_config=H14_VISION, projection_dim=1024)
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    side = {"height": SIDE, "width": SIDE}
    change_json(folder / "preprocessor_config.json", size={"shortest_edge": SIDE}, crop_size=side)
    return folder


def main(arguments: list[str] | None = None) -> None:
    """Parse, measure, record."""
    parser = gpu_parser(__doc__)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (options.images, 512, 512, 3), dtype=np.uint8)
    prompts = ["the big red star on a blue star"] * options.images
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_folder(Path(scratch) / "clip", small=options.model == "tiny")
        for dtype in (torch.float32, torch.bfloat16):
            scorer = load("pickscore", folder, device=device.type, dtype=dtype, batch_size=options.batch)
            batch = scorer.prepare(images[: options.batch], prompts[: options.batch])

            def whole(scorer: object = scorer) -> float:
                began = time.monotonic()
                scorer(images, prompts)  # type: ignore[operator]
                return len(images) / (time.monotonic() - began)

            @torch.inference_mode()
            def bare(scorer: object = scorer, batch: object = batch) -> float:
                began = time.monotonic()
                for _ in range(len(images) // options.batch):
                    scores = scorer.model(*batch)  # type: ignore[attr-defined, misc]
                scores.cpu()
                return len(images) / (time.monotonic() - began)

            whole()
            found = in_turn(options.rounds, {"scorer": whole, "bare": bare})
            what = f"the model alone, batches of {options.batch}, images of 512 px on the host"
            row = ratio(found, "scorer", "bare", "images/s", what) | {"machine": machine_of(device)}
            name = str(dtype).removeprefix("torch.")
            record_results({f"ViT-H/14 scorer, {name}": row}, options.out)
            del scorer


if __name__ == "__main__":
    main()
