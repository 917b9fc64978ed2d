"""The two Ray Data pipelines of ingest. A row is a piece of the plan and is written whole or not at all.

encode: every image is encoded once, however many pairs hold it
    {unit, blocks, wanted}          --read_images (CPU tasks)----->  {block, pixels, metadata, bad}
    {block, pixels, metadata, bad}  --Encoder (one actor a GPU)--->  {block, latents, metadata, bad}
    {block, latents, metadata, bad} --commit (CPU tasks)---------->  {block, images, bad}

join: pairs get their latents from the blocks that encoded them
    {work: ShardWork}               --join_shard (CPU tasks)------>  {number, name, rows, sha256, pairs, ...}
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import ray.data
from numpy.typing import NDArray

from services.api.records import ModelRecord
from services.artifacts.models import fetch
from services.ingest.committed import commit
from services.ingest.joining import ShardWork, join_shard
from services.ingest.plan import Plan, images_per_block
from services.ingest.reading import read_images
from services.pairs.source import Source

READERS_PER_ENCODER = 2
BLOCKS_IN_FLIGHT = 32
"""Decoded blocks in the object store for each actor; with fewer, readers or encoders idle in turn."""


def encode_blocks(
    plan: Plan,
    done: set[int],
    source: Source,
    folder: str,
    model: ModelRecord,
    settings: dict[str, Any],
    actors: int,
    use_gpu: bool,
) -> Iterator[dict[str, Any]]:
    """Encode and commit every block that is not ``done``. Yields {block, images, bad} in any order."""
    readers = READERS_PER_ENCODER * actors
    work = segments(plan, done, readers)
    if not work:
        return
    size = settings["resolution"]
    units = ray.data.from_items(work, override_num_blocks=len(work))
    block_bytes = images_per_block(size) * 3 * size**2
    units.context.execution_options.resource_limits = ray.data.ExecutionResources.for_limits(
        object_store_memory=BLOCKS_IN_FLIGHT * actors * block_bytes
    )
    units.context.target_max_block_size = block_bytes  # else Ray Data merges several blocks
    pixels = units.flat_map(
        partial(read_images, source=source, settings=settings),
        compute=ray.data.TaskPoolStrategy(size=readers),
        num_cpus=1,
    )
    encoded = pixels.map_batches(
        Encoder,
        fn_constructor_args=(model, settings, "cuda" if use_gpu else "cpu"),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=0.5,
        num_gpus=1 if use_gpu else 0,
    )
    yield from encoded.map(partial(commit, folder=folder), num_cpus=0.5).iter_rows()


def segments(plan: Plan, done: set[int], readers: int) -> list[dict[str, Any]]:
    """The blocks to encode, in pieces that are read independently: {unit, blocks, wanted}.

    A unit is decoded from its beginning, so it is split only where units are too few for the readers.
    """
    pending = list(plan.pending(done))
    parts_per_unit = -(-2 * readers // max(1, len(pending)))
    work: list[dict[str, Any]] = []
    for unit, blocks in pending:
        length = -(-len(blocks) // parts_per_unit)
        for start in range(0, len(blocks), length):
            part = blocks[start : start + length]
            wanted = [plan.is_first[block.slots].tobytes() for block in part]
            work.append({"unit": unit, "blocks": part, "wanted": wanted})
    return work


class Encoder:
    """The VAE of one actor. It encodes a block in fixed slices, so results do not depend on scheduling."""

    def __init__(self, model: ModelRecord, settings: dict[str, Any], device: str) -> None:
        from dde_core.models.folder import ModelFolder, encode_images
        from dde_core.models.policy import use_deterministic_kernels

        use_deterministic_kernels()
        self._encode_images = encode_images
        self._vae = ModelFolder(*fetch(model)).vae().to(device)
        self._size = settings["resolution"]
        self._is_sampled = settings["posterior"] == "sampled"

    def __call__(self, rows: dict[str, NDArray[Any]]) -> dict[str, Any]:
        latents = [
            self._encode(pixels, metadata)
            for pixels, metadata in zip(rows.pop("pixels"), rows["metadata"], strict=True)
        ]
        return {**rows, "latents": latents}

    def _encode(self, pixels: bytes, metadata: str) -> bytes:
        """Latents (float16 [n c h w]) of a block's pixels (uint8 [n size size 3])."""
        images = np.frombuffer(pixels, np.uint8).reshape(-1, self._size, self._size, 3)
        if not len(images):
            return b""
        digests = [sha256 for _, sha256, *_ in json.loads(metadata)]
        return self._encode_images(self._vae, images, digests if self._is_sampled else None).tobytes()


def join_shards(work: Iterable[ShardWork], actors: int, **shared: Any) -> Iterator[dict[str, Any]]:
    """Write every shard. Yields what ``join_shard`` returns, in any order."""
    items = [{"work": shard} for shard in work]
    joined = ray.data.from_items(items, override_num_blocks=len(items)).map(
        partial(join_shard, **shared),
        compute=ray.data.TaskPoolStrategy(size=READERS_PER_ENCODER * actors),
        num_cpus=1,
    )
    yield from joined.iter_rows()
