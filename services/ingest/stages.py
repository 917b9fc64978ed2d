"""The two pipelines of ingest on Ray Data. Each row is a piece of the plan, so a piece is written whole or not at all.

encode: a picture goes through once, whatever number of pairs hold it
    {unit, blocks, wanted}       --read_pictures (CPU tasks)-->  {block, pixels, about, bad}
    {block, pixels, about, bad}  --Encoder (an actor each GPU)->  {block, latents, about, bad}
    {block, latents, about, bad} --commit (CPU tasks)--------->  {block, images, bad}

join: pairs take their latents from the blocks that encoded them
    {number, blocks, homes}      --join_shard (CPU tasks)----->  {number, name, rows, sha256, pairs}
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import ray.data

from dde_core.models.folder import ModelFolder, encode_images
from dde_core.models.policy import use_repeatable_kernels
from services.contracts import ModelRecord
from services.ingest.committed import commit
from services.ingest.joining import ShardWork, join_shard
from services.ingest.plan import Plan, images_per_block
from services.ingest.reading import read_pictures
from services.registry import fetch
from services.sources import Source

READERS_PER_ENCODER = 2
BLOCKS_IN_FLIGHT = 8
"""Decoded blocks that may wait in the object store for each actor."""
SEGMENTS = 8
"""A unit with many blocks is read by several tasks, each of which passes over the rows before its own."""
BLOCKS_PER_SEGMENT = 8


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
    work = list(segments(plan, done))
    if not work:
        return
    size, flip = settings["resolution"], settings["flip"] == "all"
    readers = ray.data.TaskPoolStrategy(size=READERS_PER_ENCODER * actors)
    units = ray.data.from_items(work, override_num_blocks=len(work))
    window = BLOCKS_IN_FLIGHT * actors * images_per_block(size) * 3 * size**2
    units.context.execution_options.resource_limits = ray.data.ExecutionResources.for_limits(object_store_memory=window)
    pixels = units.flat_map(partial(read_pictures, source=source, size=size, flip=flip), compute=readers, num_cpus=1)
    encoded = pixels.map_batches(
        Encoder,
        fn_constructor_args=(model, size, "cuda" if use_gpu else "cpu"),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=0.5,
        num_gpus=1 if use_gpu else 0,
    )
    yield from encoded.map(partial(commit, folder=folder), num_cpus=0.5).iter_rows()


def segments(plan: Plan, done: set[int]) -> Iterator[dict[str, Any]]:
    """What is left, in stretches that are read apart from each other: {unit, blocks, wanted}."""
    for unit, blocks in plan.pending(done):
        length = max(BLOCKS_PER_SEGMENT, -(-len(blocks) // SEGMENTS))
        for start in range(0, len(blocks), length):
            part = blocks[start : start + length]
            yield {"unit": unit, "blocks": part, "wanted": [plan.first[block.slots].tobytes() for block in part]}


class Encoder:
    """One VAE in each actor. A block's pictures go through it in fixed slices, so scheduling changes nothing."""

    def __init__(self, model: ModelRecord, size: int, device: str) -> None:
        use_repeatable_kernels()
        self._vae, self._size = ModelFolder(*fetch(model)).vae().to(device), size

    def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, Any]:
        pixels = [np.frombuffer(each, np.uint8).reshape(-1, self._size, self._size, 3) for each in rows.pop("pixels")]
        return {**rows, "latents": [encode_images(self._vae, each).tobytes() if len(each) else b"" for each in pixels]}


def join_shards(work: Iterable[ShardWork], actors: int, **shared: Any) -> Iterator[dict[str, Any]]:
    """Write every shard. Yields {number, name, rows, sha256, pairs} in any order."""
    items = [{"work": each} for each in work]
    joined = ray.data.from_items(items, override_num_blocks=len(items)).map(
        partial(join_shard, **shared), compute=ray.data.TaskPoolStrategy(size=READERS_PER_ENCODER * actors), num_cpus=1
    )
    yield from joined.iter_rows()
