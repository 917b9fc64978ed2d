"""What a pair takes on disk: latents of Stable Diffusion 1.5's size and 77 token ids in a shard, and its errors in a ledger."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from dde_core.latents.ledger import ledger_file
from dde_core.latents.schema import shard_schema
from dde_core.latents.writer import shard_table, write_shard
from dde_core.train_step import PairErrors
from tests.bench.measure import Result, result

PAIRS, SHAPE, TOKENS, DRAWS = 1000, (4, 64, 64), 77, 5
LATENT_BYTES = 2 * 2 * int(np.prod(SHAPE))
PICKAPIC_PAIRS = 851_293


def bytes_on_disk(scratch: Path) -> dict[str, Result]:
    """``bytes_a_pair`` of a shard and of a ledger; ratios are against what the numbers alone would take."""
    rng = np.random.default_rng(0)
    words = rng.integers(4, 20, PAIRS)  # captions are short: most of the 77 ids are padding
    token_ids = np.where(np.arange(TOKENS) < words[:, None], rng.integers(0, 49_408, (PAIRS, TOKENS)), 49_407)
    columns = {
        "pair_id": [rng.bytes(16).hex() for _ in range(PAIRS)],
        "label": np.ones(PAIRS),
        "token_ids": token_ids,
    }
    for side in "wl":
        columns[f"uid_{side}"] = [rng.bytes(16).hex() for _ in range(PAIRS)]
        columns[f"latents_{side}"] = rng.standard_normal((PAIRS, int(np.prod(SHAPE)))).astype(np.float16)
        columns |= {f"{name}_{side}": np.full((PAIRS, 2), 512) for name in ("size", "crop")}
    sizes: list[int] = []
    write_shard(
        0, shard_table(columns, shard_schema(SHAPE, 1, TOKENS)), lambda name, data: sizes.append(len(data))
    )
    shard = sizes[0] / PAIRS
    errors = PairErrors(*(torch.from_numpy(rng.random(PAIRS, np.float32)) for _ in "wl"))
    draw = len(ledger_file(0, 0, errors)[1]) / PAIRS
    whole = f"{DRAWS} draws of Pick-a-Pic v2's {PICKAPIC_PAIRS} pairs: {draw * DRAWS * PICKAPIC_PAIRS / 1e6:.1f} MB"
    return {
        "bytes_a_pair, shard": result(
            shard / (LATENT_BYTES + 2 * TOKENS),
            shard,
            "bytes",
            f"{LATENT_BYTES} of two float16 latents {list(SHAPE)} and {2 * TOKENS} of {TOKENS} ids of two bytes",
        ),
        "bytes_a_pair, ledger, one draw": result(
            draw / 8, draw, "bytes", f"8 of two float32 errors; {whole}"
        ),
    }
