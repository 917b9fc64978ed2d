"""Sample pictures from the shapes model and let the annotator label them: the shipped pairs and held-out prompts.

    python -m dde_core.shapes.pairs --out FOLDER

For each caption the model draws a few pictures; the two that differ most in the annotator's utility become a pair
(labels that compare equal pictures teach nothing), the choice between them is Bradley-Terry, and near-equal ones are
ties. About 5 minutes on one core. The same seed and weights give the same pairs.
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
from PIL import Image

from dde_core.config import SampleConfig
from dde_core.generation import TextToImage
from dde_core.models.folder import ModelFolder
from dde_core.shapes import MODEL_DIR
from dde_core.shapes.scenes import all_scenes, caption, leave_unsaid
from dde_core.shapes.scorers import score

PICTURES_EACH = 4
UNSAID = 0.6
BRADLEY_TERRY_SCALE = 20.0
TIE_BELOW = 0.02
SAMPLE = SampleConfig(steps=20, guidance_scale=3.0)


def draw_captions(
    count: int, rng: np.random.Generator, *, distinct: bool = False, without: frozenset[str] = frozenset()
) -> list[str]:
    """Captions of random scenes that leave each of size, place and background unsaid with probability ``UNSAID``."""
    found: list[str] = []
    while len(found) < count:
        text = caption(leave_unsaid(all_scenes()[rng.integers(len(all_scenes()))], rng, UNSAID))
        if text not in without and not (distinct and text in found):
            found.append(text)
    return found


def sample(model: TextToImage, captions: list[str], seeds: list[int], config: SampleConfig) -> np.ndarray:
    """One picture for each caption and seed, 64 at a time: uint8 [n, 32, 32, 3]."""
    pictures = []
    for start in range(0, len(captions), 64):
        pictures.append(model(captions[start : start + 64], seeds[start : start + 64], config))
        print(f"{start + len(pictures[-1])}/{len(captions)} pictures", flush=True)
    return np.concatenate(pictures)


def jpeg(picture: np.ndarray) -> bytes:
    """A picture as JPEG with full colour resolution."""
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "JPEG", quality=95, subsampling=0, optimize=True)
    return out.getvalue()


def label_pairs(captions: list[str], pictures: np.ndarray, rng: np.random.Generator) -> pa.Table:
    """Pick-a-Pic's columns from ``PICTURES_EACH`` pictures a caption [captions * PICTURES_EACH, 32, 32, 3]."""
    utility = score(pictures, [text for text in captions for _ in range(PICTURES_EACH)])["taste"].reshape(
        -1, PICTURES_EACH
    )
    grouped, rows = pictures.reshape(-1, PICTURES_EACH, *pictures.shape[1:]), []
    for text, images, values in zip(captions, grouped, utility, strict=True):
        pair = rng.permutation([int(values.argmax()), int(values.argmin())])
        jpg_0, jpg_1 = (jpeg(images[i]) for i in pair)
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
    seeds = [int(seed) for seed in rng.integers(2**62, size=len(captions) * PICTURES_EACH)]
    repeated = [text for text in captions for _ in range(PICTURES_EACH)]
    pictures = sample(TextToImage(ModelFolder(options.model)), repeated, seeds, SAMPLE)
    options.out.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        label_pairs(captions, pictures, rng),
        options.out / "pairs.parquet",
        compression="zstd",
        row_group_size=250,
    )
    (options.out / "prompts.txt").write_text("\n".join(held_out) + "\n")


if __name__ == "__main__":
    main()
