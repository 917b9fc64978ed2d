"""A small encoded dataset for the tiny models, with varied sizes and crops; training in this process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import ray.train
import torch
from pyarrow import fs
from ray.train.torch import TorchTrainer

from dde_core.batches import BatchMaker
from dde_core.config import ObjectiveConfig, TrainConfig
from dde_core.latents.reader import LatentReader
from dde_core.latents.schema import MANIFEST, Manifest, shard_schema, token_columns
from dde_core.latents.writer import shard_table, write_shard
from dde_core.models.folder import ModelFolder
from dde_core.models.tokens import tokenize
from dde_core.shapes.scenes import all_scenes, caption
from services.api.records import ModelRecord
from services.stages.journal import read_journal
from services.stages.specs import TrainSpec
from services.storage import files
from services.training.worker.loop import train_loop
from tests.support.open_sources import EVERYWHERE

SHAPE, SIZE_PX = (4, 8, 8), 32


def write_encoded(
    target: Path,
    model: ModelFolder,
    pairs: int = 16,
    pairs_per_shard: int = 0,
    shape: tuple[int, int, int] = SHAPE,
    label: float = 1.0,
) -> Path:
    """Write shards and their manifest as ingest does. ``pairs_per_shard`` 0: one shard holds all pairs.

    ``label`` is the winners' share of every preference.
    """
    target.mkdir(parents=True)

    def write(name: str, data: bytes) -> None:
        (target / name).write_bytes(data)

    rng, tokenizers = np.random.default_rng(0), model.tokenizers()
    captions = [caption(scene) for scene in all_scenes()[:: len(all_scenes()) // pairs][:pairs]]
    token_ids = tokenize(tokenizers, captions)
    columns = {"pair_id": [f"pair-{i}" for i in range(pairs)], "label": [label] * pairs}
    columns |= {name: list(token_ids[:, k]) for k, name in enumerate(token_columns(len(tokenizers)))}
    for side in "wl":
        columns[f"uid_{side}"] = [f"{i}{side}" for i in range(pairs)]
        columns[f"latents_{side}"] = [
            rng.standard_normal(np.prod(shape)).astype(np.float16) for _ in range(pairs)
        ]
        sizes = rng.integers(SIZE_PX, 4 * SIZE_PX, (pairs, 2))
        columns[f"size_{side}"] = sizes.tolist()
        columns[f"crop_{side}"] = ((sizes - sizes.min(axis=1, keepdims=True)) // 2).tolist()
    schema, size = shard_schema(shape, len(tokenizers), token_ids.shape[2]), pairs_per_shard or pairs
    shards = [{name: column[i : i + size] for name, column in columns.items()} for i in range(0, pairs, size)]
    manifest = Manifest(
        digest="d",
        encoder_digest="e",
        settings={"resolution": SIZE_PX, "crop": "centre", "flip": "none"},
        latent_shape=shape,
        num_tokenizers=len(tokenizers),
        num_tokens=token_ids.shape[2],
        counts={"pairs": pairs},
        shards=tuple(write_shard(i, shard_table(shard, schema), write) for i, shard in enumerate(shards)),
    )
    write(MANIFEST, manifest.to_json())
    return target


def batch_maker(model: ModelFolder, encoded: Path, objective: ObjectiveConfig, **training) -> BatchMaker:
    """The batch maker of a worker's loop."""
    reader = LatentReader(fs.LocalFileSystem(), str(encoded))
    return BatchMaker(
        reader, model, model.schedule(), objective, TrainConfig(**training), torch.device("cpu")
    )


def train_spec(
    folder: Path | str, model: ModelFolder, encoded: Path, objective: ObjectiveConfig, **training
) -> TrainSpec:
    """The spec of a train stage that stores its files in a folder or below a URI."""
    root = files.as_uri(folder)
    record = ModelRecord(
        id="m", name="m", uri=model.path.as_uri(), family=model.family, digest="", created_at=0
    )
    return TrainSpec(
        job="job",
        attempt=1,
        prefix=root,
        sources=EVERYWHERE,
        dataset=encoded.as_uri(),
        model=record,
        model_id="aligned",
        name="aligned",
        objective=objective,
        training=TrainConfig(**training),
        workers=1,
        run=files.join(root, "run"),
        output=files.join(root, "model"),
    )


def train_here(
    folder: Path | str,
    model: ModelFolder,
    encoded: Path,
    objective: ObjectiveConfig,
    ledger: str | None = None,
    **training,
) -> list[dict[str, float]]:
    """Run the training loop as one worker in this process, without a cluster; return each step's metrics."""
    spec = train_spec(folder, model, encoded, objective, **training).model_copy(update={"ledger": ledger})
    in_process = ray.train.ScalingConfig(num_workers=0)
    try:
        TorchTrainer(
            train_loop, train_loop_config={"spec": spec.model_dump_json()}, scaling_config=in_process
        ).fit()
    finally:
        torch.use_deterministic_algorithms(False)
    entries = [entry for _, some in read_journal(spec.prefix, 0) for entry in some]
    return [entry.metrics for entry in entries if entry.metrics and "loss" in entry.metrics]
