"""Make the shipped pairs and held-out prompts: sample images from the shapes model, let the annotator label
them.

    python -m dde_core.shapes.pairs --out FOLDER

The model draws a few images for each caption. The two that differ most in the annotator's utility become a
pair, because labels of equal images teach nothing. The choice between them is Bradley-Terry, and near-equal
images are ties. This takes about 5 minutes on one core. The same seed and weights give the same pairs.
"""

from __future__ import annotations

import argparse
import hashlib
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import UInt8
from PIL import Image

from dde_core.config import SampleConfig
from dde_core.generation import TextToImage
from dde_core.models.folder import ModelFolder
from dde_core.shapes import MODEL_DIR
from dde_core.shapes.scenes import all_scenes, caption, omit_attributes
from dde_core.shapes.scorers import score

IMAGES_EACH = 4
FEW = 64
OMIT_PROBABILITY = 0.6
BRADLEY_TERRY_SCALE = 20.0
TIE_BELOW = 0.02
SAMPLE = SampleConfig(steps=20, guidance_scale=3.0)


def draw_captions(
    count: int, rng: np.random.Generator, *, distinct: bool = False, without: frozenset[str] = frozenset()
) -> list[str]:
    """Captions of random scenes, with size, place and background each omitted with ``OMIT_PROBABILITY``.

    ``without`` is excluded. ``distinct`` captions do not repeat.
    """
    found: list[str] = []
    while len(found) < count:
        text = caption(omit_attributes(all_scenes()[rng.integers(len(all_scenes()))], rng, OMIT_PROBABILITY))
        if text not in without and not (distinct and text in found):
            found.append(text)
    return found


def sample(
    model: TextToImage, captions: list[str], seeds: list[int], config: SampleConfig
) -> UInt8[np.ndarray, "n 32 32 3"]:
    """One image for each caption and seed, 64 at a time."""
    images = []
    for start in range(0, len(captions), 64):
        images.append(model(captions[start : start + 64], seeds[start : start + 64], config))
        print(f"{start + len(images[-1])}/{len(captions)} images", flush=True)
    return np.concatenate(images)


def jpeg(image: UInt8[np.ndarray, "32 32 3"]) -> bytes:
    """An image as JPEG with full color resolution."""
    out = io.BytesIO()
    Image.fromarray(image).save(out, "JPEG", quality=95, subsampling=0, optimize=True)
    return out.getvalue()


def label_pairs(
    captions: list[str], images: UInt8[np.ndarray, "n 32 32 3"], rng: np.random.Generator
) -> pa.Table:
    """Pick-a-Pic's columns, one row for each caption, from ``IMAGES_EACH`` consecutive images of each
    caption."""
    repeated = [text for text in captions for _ in range(IMAGES_EACH)]
    utility = score(images, repeated)["taste"].reshape(-1, IMAGES_EACH)
    images_of_caption = images.reshape(-1, IMAGES_EACH, *images.shape[1:])
    rows = []
    for text, candidates, values in zip(captions, images_of_caption, utility, strict=True):
        pair = rng.permutation([int(values.argmax()), int(values.argmin())])
        jpg_0, jpg_1 = (jpeg(candidates[i]) for i in pair)
        difference = values[pair[0]] - values[pair[1]]
        first_wins = float(rng.random() < 1 / (1 + np.exp(-BRADLEY_TERRY_SCALE * difference)))
        label_0 = 0.5 if abs(difference) < TIE_BELOW else first_wins
        uid_0, uid_1 = (hashlib.sha256(data).hexdigest()[:32] for data in (jpg_0, jpg_1))
        rows.append(
            {
                "jpg_0": jpg_0,
                "jpg_1": jpg_1,
                "label_0": label_0,
                "label_1": 1 - label_0,
                "caption": text,
                "image_0_uid": uid_0,
                "image_1_uid": uid_1,
            }
        )
    return pa.Table.from_pylist(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()

    torch.set_num_threads(1)
    rng = np.random.default_rng(options.seed)
    held_out = draw_captions(options.prompts, rng, distinct=True)
    captions = draw_captions(options.pairs, rng, without=frozenset(held_out))
    seeds = [int(seed) for seed in rng.integers(2**62, size=len(captions) * IMAGES_EACH)]
    repeated = [text for text in captions for _ in range(IMAGES_EACH)]
    images = sample(TextToImage(ModelFolder(options.model)), repeated, seeds, SAMPLE)
    options.out.mkdir(parents=True, exist_ok=True)
    pairs = label_pairs(captions, images, rng)
    for name, rows in (("pairs.parquet", pairs), ("few_pairs.parquet", pairs.slice(0, FEW))):
        pq.write_table(rows, options.out / name, compression="zstd", row_group_size=250)
    (options.out / "prompts.txt").write_text("\n".join(held_out) + "\n")


if __name__ == "__main__":
    main()
