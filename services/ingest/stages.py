"""The Ray Data pipeline: read and decode on CPU, VAE-encode in an actor pool. Every image uid goes through once.

A unit is what is wanted of one row group, and the encoder works through its pictures in fixed slices, so what a picture is
encoded beside does not depend on scheduling.

    {uri, file, row_group, wanted}  --decode_unit-->  {uid, pixels, sha256, size, crop, error}
                                    --Encoder------>  {uid, latents, sha256, size, crop, error}
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import ray.data
import torch

from dde_core.models.folder import ModelFolder, encode_images
from services.contracts import ModelRecord
from services.ingest.decoding import decode_unit
from services.registry import fetch

DECODERS_PER_ENCODER = 2

Unit = dict[str, Any]
"""``wanted`` lists what to read from a row group: (row, column of the picture, uid)."""


def encode_dataset(
    units: list[Unit], model: ModelRecord, size: int, actors: int, use_gpu: bool
) -> Iterator[dict[str, np.ndarray]]:
    """Stream the encoded images of all units, a block at a time."""
    blocks = ray.data.from_items(units, override_num_blocks=len(units))
    decoded = blocks.map_batches(
        decode_unit,
        fn_kwargs={"size": size},
        batch_size=None,
        compute=ray.data.TaskPoolStrategy(size=DECODERS_PER_ENCODER * actors),
        num_cpus=1,
    )
    encoded = decoded.map_batches(
        Encoder,
        fn_constructor_args=(model, "cuda" if use_gpu else "cpu"),
        batch_size=None,
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=0.5,
        num_gpus=1 if use_gpu else 0,
    )
    yield from encoded.iter_batches(batch_size=None, prefetch_batches=1)


class Encoder:
    """One VAE in each actor."""

    def __init__(self, model: ModelRecord, device: str) -> None:
        torch.set_num_threads(1)
        self._vae = ModelFolder(*fetch(model)).vae().to(device)

    def __call__(self, images: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {**images, "latents": encode_images(self._vae, images.pop("pixels"))}
