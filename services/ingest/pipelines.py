"""The two pipelines of ingest on Ray Data. Each row is a piece of the plan, so a piece is written whole or not at all.

encode: an image goes through once, whatever number of pairs hold it
    {unit, blocks, wanted}       --read_images (CPU tasks)-->  {block, pixels, about, bad}
    {block, pixels, about, bad}  --Encoder (an actor each GPU)->  {block, latents, about, bad}
    {block, latents, about, bad} --commit (CPU tasks)--------->  {block, images, bad}

join: pairs take their latents from the blocks that encoded them
    {work: ShardWork}            --join_shard (CPU tasks)----->  {number, name, rows, sha256, pairs}
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import ray.data

from dde_core.models.folder import ModelFolder, encode_images
from dde_core.models.policy import use_deterministic_kernels
from services.api.records import ModelRecord
from services.artifacts.models import fetch
from services.ingest.committed import commit
from services.ingest.joining import ShardWork, join_shard
from services.ingest.plan import Plan, images_per_block
from services.ingest.reading import read_images
from services.pairs.source import Source

READERS_PER_ENCODER = 2
BLOCKS_IN_FLIGHT = 32
"""Decoded blocks that may wait in the object store for each actor: fewer leave readers or encoders idle in turn."""


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
    """Encode and commit every block that is not ``done``. Yields {block, images, bad} as they come, in any order."""
    readers = READERS_PER_ENCODER * actors
    if not (work := segments(plan, done, readers)):
        return
    size, flip = settings["resolution"], settings["flip"] == "all"
    units = ray.data.from_items(work, override_num_blocks=len(work))
    block_bytes = images_per_block(size) * 3 * size**2
    window = ray.data.ExecutionResources.for_limits(
        object_store_memory=BLOCKS_IN_FLIGHT * actors * block_bytes
    )
    units.context.execution_options.resource_limits = window
    units.context.target_max_block_size = block_bytes  # else several go through the pipeline as one
    pixels = units.flat_map(
        partial(read_images, source=source, size=size, flip=flip),
        compute=ray.data.TaskPoolStrategy(size=readers),
        num_cpus=1,
    )
    encoded = pixels.map_batches(
        Encoder,
        fn_constructor_args=(model, size, "cuda" if use_gpu else "cpu"),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=0.5,
        num_gpus=1 if use_gpu else 0,
    )
    yield from encoded.map(partial(commit, folder=folder), num_cpus=0.5).iter_rows()


def segments(plan: Plan, done: set[int], readers: int) -> list[dict[str, Any]]:
    """What is left, in stretches that are read apart from each other: {unit, blocks, wanted}.

    A unit is read from its beginning, so it is cut only where there are too few to keep the readers busy.
    """
    pending, work = list(plan.pending(done)), []
    parts = -(-2 * readers // max(1, len(pending)))
    for unit, blocks in pending:
        length = -(-len(blocks) // parts)
        for start in range(0, len(blocks), length):
            part = blocks[start : start + length]
            work.append(
                {
                    "unit": unit,
                    "blocks": part,
                    "wanted": [plan.first[block.slots].tobytes() for block in part],
                }
            )
    return work


class Encoder:
    """One VAE in each actor. A block's images go through it in fixed slices, so scheduling changes nothing."""

    def __init__(self, model: ModelRecord, size: int, device: str) -> None:
        use_deterministic_kernels()
        self._vae, self._size = ModelFolder(*fetch(model)).vae().to(device), size

    def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, Any]:
        pixels = [
            np.frombuffer(each, np.uint8).reshape(-1, self._size, self._size, 3)
            for each in rows.pop("pixels")
        ]
        return {
            **rows,
            "latents": [encode_images(self._vae, each).tobytes() if len(each) else b"" for each in pixels],
        }


def join_shards(work: Iterable[ShardWork], actors: int, **shared: Any) -> Iterator[dict[str, Any]]:
    """Write every shard. Yields {number, name, rows, sha256, pairs} in any order."""
    items = [{"work": each} for each in work]
    joined = ray.data.from_items(items, override_num_blocks=len(items)).map(
        partial(join_shard, **shared),
        compute=ray.data.TaskPoolStrategy(size=READERS_PER_ENCODER * actors),
        num_cpus=1,
    )
    yield from joined.iter_rows()
