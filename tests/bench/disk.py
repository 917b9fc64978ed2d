"""Bytes of a pair on disk: SD1.5's latents and token ids in a shard, reference errors in a ledger."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from dde_core.latents.ledger import ledger_file
from dde_core.latents.schema import shard_schema
from dde_core.latents.writer import shard_table, write_shard
from dde_core.train_step import PairErrors
from tests.bench.measure import Result, result

PAIRS = 1000
SHAPE = (4, 64, 64)
TOKENS = 77
DRAWS = 5
LATENT_BYTES = 2 * 2 * int(np.prod(SHAPE))
PICKAPIC_PAIRS = 851_293


def bytes_on_disk(scratch: Path) -> dict[str, Result]:
    """``bytes_a_pair`` of a shard and of a ledger, over the bytes of the bare numbers."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(4, 20, PAIRS)  # captions are short: most of the 77 ids are padding
    drawn_ids = rng.integers(0, 49_408, (PAIRS, TOKENS))
    token_ids = np.where(np.arange(TOKENS) < lengths[:, None], drawn_ids, 49_407)
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
    table = shard_table(columns, shard_schema(SHAPE, 1, TOKENS))
    write_shard(0, table, lambda name, data: sizes.append(len(data)))
    shard = sizes[0] / PAIRS
    errors = PairErrors(*(torch.from_numpy(rng.random(PAIRS, np.float32)) for _ in "wl"))
    draw = len(ledger_file(0, 0, errors)[1]) / PAIRS
    bare = LATENT_BYTES + 2 * TOKENS
    of_shard = (
        f"{LATENT_BYTES} of two float16 latents {list(SHAPE)} and {2 * TOKENS} of {TOKENS} ids of two bytes"
    )
    whole_mb = draw * DRAWS * PICKAPIC_PAIRS / 1e6
    of_ledger = f"{DRAWS} draws of Pick-a-Pic v2's {PICKAPIC_PAIRS} pairs: {whole_mb:.1f} MB"
    return {
        "bytes_a_pair, shard": result(shard / bare, shard, "bytes", of_shard),
        "bytes_a_pair, ledger, one draw": result(
            draw / 8, draw, "bytes", f"8 of two float32 errors; {of_ledger}"
        ),
    }
