"""The columns of a latent shard (one row for each decided pair), and the manifest of a dataset."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa

from dde_core.errors import DataError

SCHEMA_VERSION = 3
MANIFEST = "manifest.json"
LATER = {"posterior": "mean"}
"""Settings that earlier versions did not have, with what they did: such datasets keep keys and digests."""


def token_columns(num_tokenizers: int) -> list[str]:
    """``token_ids``, and ``token_ids_2`` for a model with two tokenizers."""
    return ["token_ids", *(f"token_ids_{k + 1}" for k in range(1, num_tokenizers))]


def shard_schema(latent_shape: tuple[int, int, int], num_tokenizers: int, num_tokens: int) -> pa.Schema:
    """Columns of a shard. Latents [c h w] are float16, of the VAE's posterior (its mean, or one sample of it)
    times scaling_factor, flat in C order.

    ``size_*`` is the original (height, width) of a side's image in pixels, ``crop_*`` the crop's (top, left).
    """
    channels, height, width = latent_shape
    latents = pa.list_(pa.float16(), channels * height * width)
    pair = pa.list_(pa.int32(), 2)
    columns = [("pair_id", pa.string()), ("label", pa.float32())]
    columns += [(name, pa.list_(pa.int32(), num_tokens)) for name in token_columns(num_tokenizers)]
    for side in "wl":
        columns += [
            (f"uid_{side}", pa.string()),
            (f"latents_{side}", latents),
            (f"size_{side}", pair),
            (f"crop_{side}", pair),
        ]
    return pa.schema(columns)


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One file of a dataset."""

    name: str
    rows: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A dataset's description, written last: a folder of shards without it is not a dataset.

    ``digest`` identifies the content (settings, encoder, pairs), however rows are split into shards.
    ``counts`` has rows, pairs, ties, missing (rows without a label), bad (quarantined rows; ``bad`` counts
    them by cause) and images. Of the pairs: soft (the winner's share is below 1), duplicates (the same images
    and caption as an earlier pair), contradicting (another pair has the opposite winner), long_captions (cut
    by a tokenizer) and transparent (the background shows in an image).
    """

    digest: str
    encoder_digest: str
    settings: dict[str, Any]
    latent_shape: tuple[int, int, int]
    num_tokenizers: int
    num_tokens: int
    counts: dict[str, int]
    shards: tuple[Shard, ...]
    bad: dict[str, int] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    @property
    def latents(self) -> str:
        """Which latents the shards hold, for people."""
        if self.settings.get("posterior", LATER["posterior"]) == "sampled":
            return "one sample of the VAE's posterior for each image file, keyed by its digest"
        return "mean of the VAE's posterior"

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1, sort_keys=True).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Manifest:
        """Raises DataError for a manifest of another schema version."""
        values = json.loads(data)
        version = values.get("schema_version")
        if version != SCHEMA_VERSION:
            raise DataError(f"manifest has schema_version {version!r}, this code reads {SCHEMA_VERSION}")
        shards = tuple(Shard(**shard) for shard in values.pop("shards"))
        return cls(shards=shards, latent_shape=tuple(values.pop("latent_shape")), **values)


def pair_digest(pair_id: str, sha256_w: bytes, sha256_l: bytes, label: float, caption: str) -> bytes:
    """32 bytes that identify a pair's content: its id, its image files, the winner's label and the caption.

    The id alone is not enough: if it is mapped from a column, it does not depend on the content.
    """
    content = json.dumps([pair_id, sha256_w.hex(), sha256_l.hex(), label, caption])
    return hashlib.sha256(content.encode()).digest()


def dataset_digest(settings: Mapping[str, Any], encoder_digest: str, pairs: Iterable[bytes]) -> str:
    """sha256 over settings, encoder and the sorted ``pair_digest`` of every pair, so independent of
    shards."""
    digest = hashlib.sha256(json.dumps([identifying(settings), encoder_digest], sort_keys=True).encode())
    for pair in sorted(pairs):
        digest.update(pair)
    return digest.hexdigest()


def identifying(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are part of a dataset's identity: LATER ones only where they differ from what was."""
    return {name: value for name, value in settings.items() if value != LATER.get(name)}


def pair_id(uid_0: str, uid_1: str, caption: str, row_key: str) -> str:
    """The first 16 bytes of sha256 over what identifies a row, in hex."""
    return hashlib.sha256(json.dumps([uid_0, uid_1, caption, row_key]).encode()).hexdigest()[:32]
