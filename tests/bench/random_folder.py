"""A model of real size without files, and shards and a ledger for it: all that dde_core needs to train."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from pyarrow import fs
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from dde_core.batches import BatchMaker, slices
from dde_core.config import ObjectiveConfig, TrainConfig
from dde_core.latents.ledger import LedgerKey, LedgerRecord, ledger_file
from dde_core.latents.reader import LatentReader
from dde_core.latents.schema import MANIFEST, Manifest, shard_schema, token_columns
from dde_core.latents.writer import shard_table, write_shard
from dde_core.models.folder import ModelFolder
from dde_core.models.policy import Policy
from dde_core.models.tokens import tokenize
from dde_core.schedule import Schedule
from dde_core.shapes import MODEL_DIR
from dde_core.train_step import PairErrors, pair_errors
from tests.support.unet_configs import (
    LATENT_CHANNELS,
    POOLED_WIDTH,
    SCHEDULER,
    SD15_VAE,
    TOKENS,
    UNETS,
    schedule,
    unet,
)

CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_BIG_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": POOLED_WIDTH,
}
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
VAES = {
    "tiny": {**SD15_VAE, "block_out_channels": (32,) * 4, "layers_per_block": 1},
    "sd15": SD15_VAE,
    "sdxl": SD15_VAE,
}


class RandomFolder(ModelFolder):
    """A ModelFolder without files: makes every part on ``device``, always with the same weights."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.name = name
        self._device = device
        self.family = "sdxl" if name == "sdxl" else "sd15"
        self.index = {}
        self.size_px = UNETS[name]["sample_size"] * 8

    def unet(self) -> UNet2DConditionModel:
        return unet(self.name, self._device, seed=0)

    def schedule(self) -> Schedule:
        return schedule()

    def scheduler_config(self) -> dict[str, Any]:
        return dict(SCHEDULER)

    def image_size(self) -> tuple[int, int]:
        return self.size_px, self.size_px

    @property
    def vae_factor(self) -> int:
        return 8

    def vae(self) -> AutoencoderKL:
        with self._seeded():
            return AutoencoderKL(**VAES[self.name]).eval().requires_grad_(False)

    def text_encoders(self) -> list[Any]:
        with self._seeded():
            config = SMALL if self.name == "tiny" else CLIP_L
            encoders: list[Any] = [CLIPTextModel(CLIPTextConfig(**config))]
            if self.family == "sdxl":
                encoders.append(CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_BIG_G)))
        return [encoder.eval().requires_grad_(False) for encoder in encoders]

    @contextmanager
    def _seeded(self) -> Iterator[None]:
        gpus = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(gpus), self._device:
            torch.manual_seed(0)
            yield

    def tokenizers(self) -> list[CLIPTokenizer]:
        """The shapes model's tokenizers, which here pad to 77 tokens as the real ones do."""
        path = MODEL_DIR / "tokenizer"
        one = CLIPTokenizer.from_pretrained(str(path), local_files_only=True, model_max_length=TOKENS)
        return [one] * (2 if self.family == "sdxl" else 1)


def write_shard_of(folder: RandomFolder, target: Path, captions: list[str]) -> None:
    """Write one shard of random latents with these captions, and its manifest."""
    pairs = len(captions)
    latent_size = UNETS[folder.name]["sample_size"]
    shape = (LATENT_CHANNELS, latent_size, latent_size)
    rng = np.random.default_rng(0)
    token_ids = tokenize(folder.tokenizers(), captions)
    num_tokenizers, num_tokens = token_ids.shape[1:]
    columns = {"pair_id": [f"pair-{i}" for i in range(pairs)], "label": [1.0] * pairs}
    columns |= {name: list(token_ids[:, k]) for k, name in enumerate(token_columns(num_tokenizers))}
    for side in "wl":
        columns[f"uid_{side}"] = [f"{i}{side}" for i in range(pairs)]
        latents = rng.standard_normal((pairs, int(np.prod(shape))))
        columns[f"latents_{side}"] = list(latents.astype(np.float16))
        columns[f"size_{side}"] = [[folder.size_px] * 2] * pairs
        columns[f"crop_{side}"] = [[0, 0]] * pairs
    table = shard_table(columns, shard_schema(shape, num_tokenizers, num_tokens))
    manifest = Manifest(
        digest="random",
        encoder_digest="random",
        settings={"resolution": folder.size_px, "crop": "centre", "flip": "none"},
        latent_shape=shape,
        num_tokenizers=num_tokenizers,
        num_tokens=num_tokens,
        counts={"pairs": pairs},
        shards=(write_shard(0, table, lambda name, data: (target / name).write_bytes(data)),),
    )
    (target / MANIFEST).write_bytes(manifest.to_json())


@torch.no_grad()
def write_ledger(
    folder: RandomFolder,
    target: Path,
    objective: ObjectiveConfig,
    training: TrainConfig,
    device: torch.device,
) -> Path:
    """Write the model's own ledger of one draw of the pairs at ``target``; return its record's path."""
    with LatentReader(fs.LocalFileSystem(), str(target)) as reader:
        maker = BatchMaker(reader, folder, folder.schedule(), objective, training, device)
        policy = Policy(folder, training, device)
        rows = reader.shard(0)
        errors: list[PairErrors] = []
        for part in slices(rows, training.micro_batch_size):
            batch = maker.make(part)
            with policy.autocast():
                errors.append(pair_errors(policy.unet, schedule(device), batch))
        name, data = ledger_file(0, 0, PairErrors.joined(errors))
        key = LedgerKey.of_run("random", reader.manifest, folder, objective, training)
    record = LedgerRecord(key=key, rows=(len(rows),), files=((name,),), noise={}, seconds=0.0)
    for file, content in ((name, data), (record.name, record.to_json())):
        (target / file).write_bytes(content)
    return target / record.name
