"""Join committed blocks into a shard: every pair gets the latents of its two images. Without torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import CLIPTokenizer

from dde_core.errors import DataError
from dde_core.family import Family
from dde_core.latents.schema import pair_digest, shard_schema, token_columns
from dde_core.latents.writer import shard_table, write_shard
from dde_core.models.tokens import are_cut, load_tokenizers, tokenize
from services.api.records import ModelRecord
from services.artifacts.models import fetch
from services.ingest.committed import read_block
from services.pairs.columnar import Unit
from services.pairs.pair_counts import pair_key
from services.pairs.row import Preference, Row
from services.pairs.source import Source
from services.storage import files

Pair = tuple[Preference, str, str, str]
"""(preference, winner's uid, loser's uid, caption)."""


@dataclass(frozen=True)
class ShardWork:
    """The rows of a shard: ``row_ranges`` (unit, start, stop).

    For each slot of their decided rows, ``block_of_slot`` (int32 as bytes) is the block that holds its image,
    and ``bad`` (bool as bytes) whether that image is bad.
    """

    number: int
    row_ranges: tuple[tuple[Unit, int, int], ...]
    block_of_slot: bytes
    bad: bytes


def join_shard(
    row: dict[str, ShardWork],
    source: Source,
    folder: str,
    model: ModelRecord,
    latent_shape: tuple[int, int, int],
) -> dict[str, Any]:
    """Write one shard beside the blocks, without pairs that have a bad image; no pairs, no shard.

    In: ``work``. Out: ``number``, ``name``, ``rows``, ``sha256``, ``pairs`` (the digests of its pairs),
    ``keys`` (their ``pair_key``), and how many pairs are ``soft`` and ``transparent`` and have
    ``long_captions``, as in a manifest. Memory holds the shard's images and one block. Raises DataError for
    an image that its block lacks.
    """
    work = row["work"]
    decided = [
        source_row
        for unit, start, stop in work.row_ranges
        for source_row in source.rows(unit, start=start, stop=stop)
        if source_row.kind == "decided"
    ]
    images = _read_images(folder, decided, np.frombuffer(work.block_of_slot, np.int32), work.bad)
    pairs = [pair for pair in _pairs(decided) if pair[1] in images and pair[2] in images]
    if not pairs:
        none = dict.fromkeys(("soft", "transparent", "long_captions"), 0)
        return {"number": work.number, "name": "", "rows": 0, "sha256": "", "pairs": b"", "keys": b"", **none}
    tokenizers = _tokenizers(fetch(model)[0], model.family)
    schema = shard_schema(latent_shape, len(tokenizers), tokenizers[0].model_max_length)
    table = shard_table(_columns(pairs, images, tokenizers), schema)
    shard = write_shard(
        work.number, table, lambda name, data: files.write_bytes(files.join(folder, name), data)
    )
    digests: list[bytes] = []
    keys: list[bytes] = []
    num_transparent = 0
    for preference, winner, loser, caption in pairs:
        sha256_w, sha256_l = images[winner]["sha256"], images[loser]["sha256"]
        digests.append(pair_digest(preference.pair_id, sha256_w, sha256_l, preference.label, caption))
        keys.append(pair_key(sha256_w.hex(), sha256_l.hex(), caption))
        num_transparent += images[winner]["transparent"] or images[loser]["transparent"]
    return {
        "number": work.number,
        "name": shard.name,
        "rows": shard.rows,
        "sha256": shard.sha256,
        "pairs": b"".join(digests),
        "keys": b"".join(keys),
        "soft": sum(preference.label < 1 for preference, *_ in pairs),
        "transparent": num_transparent,
        "long_captions": int(are_cut(tokenizers, [caption for *_, caption in pairs]).sum()),
    }


def _read_images(
    folder: str, decided: list[Row], block_of_slot: NDArray[np.int32], bad: bytes
) -> dict[str, dict[str, Any]]:
    """The rows' good images by uid, read block by block."""
    uids = (uid for row in decided for uid in row.uids)
    uids_of_block: dict[int, set[str]] = {}
    for uid, block, is_bad in zip(uids, block_of_slot.tolist(), bad, strict=True):
        if not is_bad:
            uids_of_block.setdefault(block, set()).add(uid)
    images: dict[str, dict[str, Any]] = {}
    for block in sorted(uids_of_block):
        images |= read_block(folder, block, uids_of_block[block])
        missing = uids_of_block[block] - images.keys()
        if missing:
            raise DataError(
                f"block {block} of {folder!r} lacks {len(missing)} images that were encoded, such as "
                f"{min(missing)!r}; delete this folder and encode again"
            )
    return images


def _pairs(decided: list[Row]) -> Iterator[Pair]:
    for row in decided:
        for preference in row.preferences:
            yield preference, row.uids[preference.winner], row.uids[preference.loser], row.caption


def _columns(
    pairs: list[Pair], images: dict[str, dict[str, Any]], tokenizers: list[CLIPTokenizer]
) -> dict[str, Any]:
    """The shard's columns; ``_w`` is the winner, ``_l`` the loser."""
    token_ids = tokenize(tokenizers, [caption for *_, caption in pairs])
    columns: dict[str, Any] = {
        "pair_id": [preference.pair_id for preference, *_ in pairs],
        "label": [preference.label for preference, *_ in pairs],
    }
    columns |= {name: token_ids[:, k] for k, name in enumerate(token_columns(len(tokenizers)))}
    uids_of_side = {"w": [winner for _, winner, _, _ in pairs], "l": [loser for _, _, loser, _ in pairs]}
    for side, uids in uids_of_side.items():
        columns[f"uid_{side}"] = uids
        for name in ("latents", "size", "crop"):
            columns[f"{name}_{side}"] = np.stack([images[uid][name] for uid in uids])
    return columns


@lru_cache(maxsize=4)
def _tokenizers(path: Path, family: Family) -> list[CLIPTokenizer]:
    return load_tokenizers(path, family)
