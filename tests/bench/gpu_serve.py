"""Images/s of the engine against diffusers' pipeline: dde_core alone, no Ray, random weights in bf16.

    python -m tests.bench.gpu_serve --model sd15 --out results.json

Sides alternate, on the same modules, prompts and seeds: the pipeline with one image a call, the pipeline with
all images in one call, the engine with one request an image, and with a single one. Then mixed requests:
their steps and guidance differ, so the pipeline draws them one by one. Then requests for three adapters. The
engine measures how large its calls are.
``--device cpu --model tiny`` runs the same in a minute.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from dde_core.config import SampleConfig
from dde_core.engine.batch_size import measure
from tests.bench.gpu_step import gpu_parser, machine_of, record_results
from tests.bench.measure import in_turn, ratio, result
from tests.bench.random_folder import RandomFolder
from tests.bench.serving import Serving, load_adapters

MIXED = [(10, 5.0), (20, 1.0), (30, 5.0), (15, 3.0)]
"""Steps and guidance scale of mixed requests, in turn."""


def report_calls(serving: Serving, where: str, machine: str) -> dict[str, dict[str, Any]]:
    """U-Net rows/s by rows of a call: what batching can give on this machine."""
    size = serving.folder.image_size()
    seconds = measure(serving.base, size, [1, 2, 4, 8, 16, 32, 64])
    text = ", ".join(f"{rows}: {1e3 * taken:.1f} ms" for rows, taken in seconds.items())
    best = max(rows / taken for rows, taken in seconds.items())
    chosen = serving.sizes.max_rows(serving.base, size)
    row = result(best / (2 / seconds[2]), best, "U-Net rows/s", f"2 rows a call; {text}; chosen {chosen}")
    return {f"{where}, U-Net call": row | {"machine": machine}}


def main(arguments: list[str] | None = None) -> None:
    """Parse, measure, record."""
    parser = gpu_parser(__doc__)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--alone", type=int, default=3, help="images of a round that are drawn one by one")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    machine = machine_of(device)
    began = time.monotonic()
    sample = SampleConfig(steps=options.steps, guidance_scale=5.0)
    serving = Serving(RandomFolder(options.model, device), device, sample)
    where = f"{options.model}, serving, {options.steps} steps"
    print(f"loaded after {time.monotonic() - began:.0f} s", flush=True)
    record_results(report_calls(serving, where, machine), options.out)

    equal = [serving.sample] * options.images
    mixed = [SampleConfig(steps=steps, guidance_scale=guidance) for steps, guidance in MIXED]
    one, many = equal[: options.alone], mixed * max(1, options.images // len(mixed))
    keys = ("a", "b", "c")
    with tempfile.TemporaryDirectory() as scratch:
        load_adapters(serving.base, Path(scratch), keys)
    serving.by_engine(equal)
    serving.by_engine(equal, keys)
    serving.by_engine(one[:1])
    serving.one_by_one(one[:1])
    sides = {
        "pipeline, one by one": lambda: serving.one_by_one(one),
        "pipeline, batch": lambda: serving.in_batch(options.images),
        "engine": lambda: serving.by_engine(equal),
        "engine, lonely": lambda: serving.by_engine(one[:1]),
        "pipeline, mixed": lambda: serving.one_by_one(mixed),
        "engine, mixed": lambda: serving.by_engine(many),
        "engine, 3 adapters": lambda: serving.by_engine(equal, keys),
    }
    found = in_turn(options.rounds, sides)
    pairs = [
        ("engine", "pipeline, one by one"),
        ("engine", "pipeline, batch"),
        ("engine, lonely", "pipeline, one by one"),
        ("engine, mixed", "pipeline, mixed"),
        ("engine, 3 adapters", "engine"),
    ]
    rows = {
        f"{where}, {side} vs {other}": ratio(
            found, side, other, "images/s", f"{other}, {options.images} images"
        )
        | {"machine": machine}
        for side, other in pairs
    }
    serving.turns.clear()
    began = time.monotonic()
    serving.by_engine(equal)
    calls = statistics.median(turn.seconds for turn in serving.turns)
    in_calls = sum(turn.seconds for turn in serving.turns)
    what = f"median call with its steps {1e3 * calls:.1f} ms, {len(serving.turns)} calls"
    share = result(None, in_calls / (time.monotonic() - began), "of wall time is in calls", what)
    record_results(rows | {f"{where}, share of calls": share | {"machine": machine}}, options.out)
    serving.engine.close()


if __name__ == "__main__":
    main()
