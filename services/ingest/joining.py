"""From committed blocks to a shard: every pair takes the latents of its two images. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from transformers import CLIPTokenizer

from dde_core.errors import DataError
from dde_core.family import Family
from dde_core.latents.schema import pair_digest, shard_schema, token_columns
from dde_core.latents.writer import shard_table, write_shard
from dde_core.models.tokens import load_tokenizers, tokenize
from services.api.records import ModelRecord
from services.artifacts.models import fetch
from services.ingest.committed import read_block
from services.pairs.columnar import Unit
from services.pairs.row import Preference, Row
from services.pairs.source import Source
from services.storage import files


@dataclass(frozen=True)
class ShardWork:
    """Stretches of rows, and for each slot of their decided rows the block that holds its image (int32 as bytes) and whether
    the image is bad (bool as bytes)."""

    number: int
    stretches: tuple[tuple[Unit, int, int], ...]
    homes: bytes
    bad: bytes


def join_shard(
    row: dict[str, ShardWork],
    source: Source,
    folder: str,
    model: ModelRecord,
    latent_shape: tuple[int, int, int],
) -> dict[str, Any]:
    """Write one shard beside the blocks. Makes ``number``, ``name``, ``rows``, ``sha256`` and ``pairs`` (digests of its pairs).

    Pairs with a bad image are left out; a shard of none is not written. In memory are the shard's images and one block.
    Raises DataError for an image that should be in a block and is not.
    """
    work = row["work"]
    rows = [
        each for unit, start, stop in work.stretches for each in source.rows(unit, start=start, stop=stop)
    ]
    decided = [each for each in rows if each.kind == "decided"]
    images = _read_images(folder, decided, np.frombuffer(work.homes, np.int32), work.bad)
    pairs = [pair for pair in _pairs(decided) if pair[1] in images and pair[2] in images]
    if not pairs:
        return {"number": work.number, "name": "", "rows": 0, "sha256": "", "pairs": b""}
    tokenizers = _tokenizers(fetch(model)[0], model.family)
    schema = shard_schema(latent_shape, len(tokenizers), tokenizers[0].model_max_length)
    table = shard_table(_columns(pairs, images, tokenizers), schema)
    shard = write_shard(
        work.number, table, lambda name, data: files.write_bytes(files.join(folder, name), data)
    )
    digests = [
        pair_digest(
            preference.pair_id,
            images[winner]["sha256"],
            images[loser]["sha256"],
            preference.label,
            caption,
        )
        for preference, winner, loser, caption in pairs
    ]
    return {
        "number": work.number,
        "name": shard.name,
        "rows": shard.rows,
        "sha256": shard.sha256,
        "pairs": b"".join(digests),
    }


def _read_images(folder: str, decided: list[Row], homes: np.ndarray, bad: bytes) -> dict[str, dict[str, Any]]:
    """The rows' images by uid, read block by block, without the bad ones."""
    wanted: dict[int, set[str]] = {}
    for uid, home, is_bad in zip(
        (uid for row in decided for uid in row.uids), homes.tolist(), bad, strict=True
    ):
        if not is_bad:
            wanted.setdefault(home, set()).add(uid)
    found: dict[str, dict[str, Any]] = {}
    for home in sorted(wanted):
        found |= read_block(folder, home, wanted[home])
        if missing := wanted[home] - found.keys():
            raise DataError(
                f"block {home} of {folder!r} lacks {len(missing)} images that were encoded, {min(missing)!r} among them"
            )
    return found


Pair = tuple[Preference, str, str, str]
"""What was preferred, the uids of winner and loser, the caption."""


def _pairs(decided: list[Row]) -> Iterator[Pair]:
    for row in decided:
        for each in row.preferences:
            yield each, row.uids[each.winner], row.uids[each.loser], row.caption


def _columns(
    pairs: list[Pair], images: dict[str, dict[str, Any]], tokenizers: list[CLIPTokenizer]
) -> dict[str, Any]:
    token_ids = tokenize(tokenizers, [caption for *_, caption in pairs])
    columns: dict[str, Any] = {
        "pair_id": [preference.pair_id for preference, *_ in pairs],
        "label": [preference.label for preference, *_ in pairs],
    }
    columns |= {name: token_ids[:, k] for k, name in enumerate(token_columns(len(tokenizers)))}
    for side, uids in (("w", [uid for _, uid, _, _ in pairs]), ("l", [uid for _, _, uid, _ in pairs])):
        columns[f"uid_{side}"] = uids
        columns |= {
            f"{name}_{side}": np.stack([images[uid][name] for uid in uids])
            for name in ("latents", "size", "crop")
        }
    return columns


@lru_cache(maxsize=4)
def _tokenizers(path: Path, family: Family) -> list[CLIPTokenizer]:
    return load_tokenizers(path, family)
