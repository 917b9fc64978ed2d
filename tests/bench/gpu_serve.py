"""Images/s of the engine against diffusers' pipeline: dde_core alone, no Ray, random weights in bf16.

    python -m tests.bench.gpu_serve --model sd15 --out results.json

Sides alternate, on the same modules, prompts and seeds: the pipeline with one image a call, the pipeline with
all images in one call, the engine with one request an image, and with a single one. Then mixed requests:
their steps and guidance differ, so the pipeline draws them one by one. Then requests for three adapters. The
engine measures how large its calls are.
``--device cpu --model tiny`` runs the same in a minute.
"""

from __future__ import annotations

import queue
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import save_file

from dde_core.config import LoraConfig, SampleConfig
from dde_core.engine.batch_size import BatchSizes, measure
from dde_core.engine.batching import StepEngine
from dde_core.engine.contract import Drawn, Failed, Finished, GenerationRequest, Turn
from dde_core.engine.model import BaseModel, Model
from dde_core.models.folder import LORA_WEIGHTS
from tests.bench.gpu_step import gpu_parser, machine_of, record_results
from tests.bench.measure import in_turn, ratio, result
from tests.bench.random_folder import RandomFolder

PROMPT = "a big red circle at the left"
MIXED = [(10, 5.0), (20, 1.0), (30, 5.0), (15, 3.0)]
"""Steps and guidance scale of mixed requests, in turn."""


class Serving:
    """One base model, the pipeline of its parts, and an engine."""

    def __init__(self, name: str, device: torch.device, images: int, steps: int) -> None:
        self.folder = RandomFolder(name, device)
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.base = BaseModel(self.folder, device, self.dtype)
        self.sample = SampleConfig(steps=steps, guidance_scale=5.0)
        self.images = images
        self.turns: list[Turn] = []
        self.sizes = BatchSizes()
        self.engine = StepEngine(self.sizes, on_turn=self.turns.append)
        self.pipeline = self._pipeline(device)

    def _pipeline(self, device: torch.device) -> Any:
        base, tokenizers = self.base, self.folder.tokenizers()
        encoders = base._text_encoders.encoders
        scheduler = DDIMScheduler.from_config({**self.folder.sampling_config(), "clip_sample": False})
        parts = {"vae": base._vae, "unet": base._unet, "scheduler": scheduler, "tokenizer": tokenizers[0]}
        if self.folder.family == "sdxl":
            pipeline: Any = StableDiffusionXLPipeline(
                **parts,
                text_encoder=encoders[0],
                text_encoder_2=encoders[1],
                tokenizer_2=tokenizers[1],
                add_watermarker=False,
            )
        else:
            pipeline = StableDiffusionPipeline(
                **parts,
                text_encoder=encoders[0],
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def one_by_one(self, samples: Sequence[SampleConfig]) -> float:
        """Images/s of the pipeline, one image a call."""
        began = time.monotonic()
        for sample in samples:
            self._call(1, sample)
        return len(samples) / (time.monotonic() - began)

    def in_batch(self) -> float:
        """Images/s of the pipeline, all images in one call."""
        began = time.monotonic()
        self._call(self.images, self.sample)
        return self.images / (time.monotonic() - began)

    def _call(self, images: int, sample: SampleConfig) -> None:
        self.pipeline(
            [PROMPT] * images,
            num_inference_steps=sample.steps,
            guidance_scale=sample.guidance_scale,
            output_type="np",
        )

    def by_engine(self, samples: Sequence[SampleConfig], adapters: Sequence[str | None] = (None,)) -> float:
        """Images/s of the engine, one request an image, all at once."""
        began = time.monotonic()
        self.draw(samples, adapters)
        return len(samples) / (time.monotonic() - began)

    def draw(self, samples: Sequence[SampleConfig], adapters: Sequence[str | None] = (None,)) -> int:
        """Draw one image for each of ``samples``; returns their number. Raises what a request failed with."""
        events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for i, sample in enumerate(samples):
            model = Model(self.base, adapters[i % len(adapters)])
            request = GenerationRequest(prompt=PROMPT, seeds=(i,), sample=sample)
            self.engine.submit(model, request, events.put)
        drawn = left = len(samples)
        while left:
            event = events.get()
            if isinstance(event, Failed):
                raise event.error
            left -= isinstance(event, Finished)
            drawn -= isinstance(event, Drawn)
        assert drawn == 0
        return len(samples)


def load_adapters(base: BaseModel, scratch: Path, keys: Sequence[str], rank: int = 16) -> None:
    """Load random adapters of the attention layers under these keys."""
    for number, key in enumerate(keys):
        generator = torch.Generator().manual_seed(number)
        weights = {}
        for name, module in base._unet.named_modules():
            if LoraConfig().matches(name):
                sides = {"lora_A": (rank, module.in_features), "lora_B": (module.out_features, rank)}
                for side, shape in sides.items():
                    values = torch.randn(shape, generator=generator) * 0.01
                    weights[f"unet.{name}.{side}.weight"] = values
        folder = scratch / key
        folder.mkdir()
        save_file(weights, folder / LORA_WEIGHTS)
        base.load_adapter(key, folder)


def report_calls(serving: Serving, where: str, machine: str) -> dict[str, dict[str, Any]]:
    """U-Net rows/s by rows of a call: what batching can give on this machine."""
    size = (serving.folder.size_px, serving.folder.size_px)
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
    serving = Serving(options.model, device, options.images, options.steps)
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
        "pipeline, batch": serving.in_batch,
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
