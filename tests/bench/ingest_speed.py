"""What does the pipeline cost beyond the VAE? Images/s of the encode stage, against a bare loop of the VAE.

The stage starts its actors, reads files and writes a manifest. The bare loop encodes images that are already
decoded, on the same cores.
"""

from __future__ import annotations

import json
import multiprocessing
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from diffusers import AutoencoderKL

from dde_core.config import DataConfig
from dde_core.models.folder import ModelFolder, encode_images
from services.api.records import ModelRecord
from services.artifacts import models
from services.ingest.encode import encode
from services.pairs.images import decode
from services.stages.journal import Journal
from services.stages.specs import EncodeSpec
from tests.bench.measure import Result, Stopwatch, in_turn, ratio
from tests.support.stage_runs import StageRuns, shapes_record
from tests.support.synthetic_pairs import synthetic_rows, write_stream
from tests.support.tiny_folders import sd15_folder
from tests.support.unet_configs import SD15_VAE

ACTORS = 2


def ingest_speed(scratch: Path, rounds: int = 2) -> dict[str, Result]:
    """``ingest_vs_bare_vae`` with SD1.5's VAE at 256 px, and the same of the shapes world at 32 px."""
    found: dict[str, Result] = {}
    sd15 = _with_vae(sd15_folder(scratch / "sd15"))
    for name, model, size, pairs in (
        ("ingest_vs_bare_vae", sd15, 256, 64),
        ("ingest_vs_bare_vae, shapes at 32 px", shapes_record(), 32, 8192),
    ):
        bench = Bench(scratch / f"px-{size}", model, size, pairs)
        rates = in_turn(rounds, {"pipeline": bench.pipeline, "bare VAE": bench.bare})
        loop = f"a bare VAE loop over decoded images in {ACTORS} processes of one thread"
        what = f"{loop}, {2 * pairs} images of {size} px"
        found[name] = ratio(rates, "pipeline", "bare VAE", "images/s", what)
    return found


def _with_vae(folder: Path) -> ModelRecord:
    """The tiny model with SD1.5's VAE, whose weights are random."""
    torch.manual_seed(0)
    AutoencoderKL(**SD15_VAE).save_pretrained(folder / "vae")
    uri = folder.as_uri()
    return shapes_record().model_copy(update={"uri": uri, "digest": models.folder_digest(uri)})


class Bench:
    """One model and one file of pairs without a repeated image."""

    def __init__(self, folder: Path, model: ModelRecord, size: int, pairs: int) -> None:
        self._folder = folder
        self._model = model
        self._size = size
        self._rows = list(synthetic_rows(pairs, size=size, shared=0.0))
        self._file = write_stream(folder / "pairs.parquet", self._rows)
        self._runs = 0

    def pipeline(self) -> float:
        """Images/s of the whole stage."""
        self._runs += 1
        data = DataConfig(resolution=self._size)
        spec: EncodeSpec = StageRuns(self._folder / str(self._runs), {}).encode_spec(
            "bench", self._file.as_uri(), self._model, data=data, actors=ACTORS
        )
        journal = Journal(spec.prefix)
        watch = Stopwatch()
        result = encode(spec, journal)
        seconds = watch()
        return result.counts["images"] / seconds

    def bare(self) -> float:
        """Images/s of the VAE alone."""
        pixels = np.stack(
            [decode(row[side], self._size).pixels for row in self._rows for side in ("jpg_0", "jpg_1")]
        )
        context = multiprocessing.get_context("spawn")
        parts = [(str(models.fetch(self._model)[0]), part) for part in np.array_split(pixels, ACTORS)]
        ready = context.Barrier(ACTORS)
        with context.Pool(ACTORS, initializer=_set_ready, initargs=(ready,)) as pool:
            seconds = max(pool.map(_encode_part, parts, chunksize=1))
        return len(pixels) / seconds


def _set_ready(ready: Any) -> None:
    global _READY
    _READY = ready


def _encode_part(part: tuple[str, np.ndarray]) -> float:
    """Seconds of the loop alone. All processes load and warm up the VAE, then begin together."""
    torch.set_num_threads(1)
    vae = ModelFolder(part[0]).vae()
    encode_images(vae, part[1][:2])
    _READY.wait()
    watch = Stopwatch()
    encode_images(vae, part[1])
    return watch()


if __name__ == "__main__":
    ray.init(num_cpus=8, log_to_driver=False, include_dashboard=False)
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(ingest_speed(Path(scratch)), indent=1))
