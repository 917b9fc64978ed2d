"""Images and scores in storage, kept for later evaluations.

A chunk of images is a Parquet file of PNGs, which keep every value of a pixel; its scores by one scorer are
another one. Their names say all that their contents depend on, they appear whole or not at all, and each
holds a sha256 of its contents, so a reader uses nothing that is damaged.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from dde_core.errors import DataError
from services.pairs.images import to_png
from services.storage import files

DIGEST = b"sha256"
SHAPE = b"shape"
PNG_LEVEL = 1
"""zlib's; higher levels take several times as long and make photos 2% smaller."""


class Damaged(DataError):
    """A file whose contents are not those that were written."""


def encode_png(images: np.ndarray) -> list[bytes]:
    """Each of the images, uint8 [n, h, w, 3], as PNG."""
    return [to_png(image, PNG_LEVEL) for image in images]


def decode_png(encoded: Sequence[bytes]) -> np.ndarray:
    """Images of one size from PNG: uint8 [n, h, w, 3]."""
    return np.stack([np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in encoded])


def write_images(uri: str, prompts: Sequence[str], seeds: Sequence[int], pngs: Sequence[bytes]) -> None:
    """Write a chunk of images, one for each prompt and seed."""
    columns = {
        "prompt": pa.array(prompts, pa.string()),
        "seed": pa.array(seeds, pa.int64()),
        "png": pa.array(pngs, pa.binary()),
    }
    digest = _digest_of_images(prompts, seeds, pngs)
    _write(uri, pa.table(columns).replace_schema_metadata({DIGEST: digest}))


def read_images(uri: str) -> list[bytes] | None:
    """The PNGs of a chunk; None if there is none. Raises Damaged."""
    table = _read(uri)
    if table is None:
        return None
    try:
        prompts, seeds, pngs = (table[name].to_pylist() for name in ("prompt", "seed", "png"))
        found = _digest_of_images(prompts, seeds, pngs)
    except (KeyError, TypeError, UnicodeDecodeError, pa.ArrowException) as error:
        raise Damaged(f"{uri} is damaged: {type(error).__name__}") from error
    _check(uri, table, found)
    return [bytes(png) for png in pngs]


def write_scores(uri: str, scores: np.ndarray) -> None:
    """Write float64 scores [n] or features [n, d]."""
    column = pa.array(scores.ravel(), pa.float64())
    shape = json.dumps(scores.shape).encode()
    metadata = {SHAPE: shape, DIGEST: _digest_of_scores(scores.ravel(), shape)}
    _write(uri, pa.table({"value": column}).replace_schema_metadata(metadata))


def read_scores(uri: str) -> np.ndarray | None:
    """Scores as they were written; None if there are none. Raises Damaged."""
    table = _read(uri)
    if table is None:
        return None
    try:
        values = np.array(table["value"].to_numpy(), dtype=np.float64)
        shape = (table.schema.metadata or {}).get(SHAPE, b"")
        found = _digest_of_scores(values, shape)
    except (KeyError, TypeError, ValueError) as error:
        raise Damaged(f"{uri} is damaged: {type(error).__name__}") from error
    _check(uri, table, found)
    return values.reshape(json.loads(shape))


def _write(uri: str, table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="none", use_dictionary=False, write_statistics=False)
    files.write_bytes(uri, sink.getvalue().to_pybytes())


def _read(uri: str) -> pa.Table | None:
    try:
        data = files.read_bytes(uri)
    except FileNotFoundError:
        return None
    try:
        return pq.read_table(pa.BufferReader(data))
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise Damaged(f"{uri} is damaged: {type(error).__name__}") from error


def _check(uri: str, table: pa.Table, found: bytes) -> None:
    if (table.schema.metadata or {}).get(DIGEST) != found:
        raise Damaged(f"{uri} is damaged: its contents have another sha256")


def _digest_of_images(prompts: Sequence[str], seeds: Sequence[int], pngs: Sequence[bytes]) -> bytes:
    digest = hashlib.sha256(json.dumps([list(prompts), list(seeds)]).encode())
    for png in pngs:
        digest.update(f"{len(png)}:".encode())
        digest.update(png)
    return digest.hexdigest().encode()


def _digest_of_scores(values: np.ndarray, shape: bytes) -> bytes:
    return hashlib.sha256(shape + b"\0" + values.astype(np.float64).tobytes()).hexdigest().encode()
