"""A base model, the diffusers pipeline of its parts, and an engine: the sides of serving benchmarks."""

from __future__ import annotations

import queue
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import save_file

from dde_core.config import LoraConfig, SampleConfig
from dde_core.engine.batch_size import BatchSizes
from dde_core.engine.batching import StepEngine
from dde_core.engine.contract import Drawn, Failed, Finished, GenerationRequest, Turn
from dde_core.engine.model import BaseModel, Model
from dde_core.models.folder import ModelFolder
from dde_core.models.lora_file import LORA_WEIGHTS

PROMPT = "a big red circle at the left"


class Serving:
    """The pipeline and the engine share the modules of a folder.

    ``sample``: the settings of equal requests. ``clock`` measures every side: wall time, or CPU time of this
    process.
    """

    def __init__(
        self,
        folder: ModelFolder,
        device: torch.device,
        sample: SampleConfig,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder = folder
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.base = BaseModel(folder, device, self.dtype)
        self.sample = sample
        self.turns: list[Turn] = []
        self.sizes = BatchSizes()
        self.engine = StepEngine(self.sizes, on_turn=self.turns.append)
        self.pipeline = self._pipeline()
        self._clock = clock

    def _pipeline(self) -> Any:
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
        began = self._clock()
        for sample in samples:
            self._call(1, sample)
        return len(samples) / (self._clock() - began)

    def in_batch(self, images: int) -> float:
        """Images/s of the pipeline, all images in one call."""
        return self.in_groups([self.sample] * images)

    def in_groups(self, samples: Sequence[SampleConfig]) -> float:
        """Images/s of the pipeline, one call for all samples of equal settings: what batching by request
        can do at best."""
        began = self._clock()
        for sample, images in Counter(samples).items():
            self._call(images, sample)
        return len(samples) / (self._clock() - began)

    def _call(self, images: int, sample: SampleConfig) -> None:
        self.pipeline(
            [PROMPT] * images,
            num_inference_steps=sample.steps,
            guidance_scale=sample.guidance_scale,
            output_type="np",
        )

    def by_engine(self, samples: Sequence[SampleConfig], adapters: Sequence[str | None] = (None,)) -> float:
        """Images/s of the engine, one request an image, all at once."""
        began = self._clock()
        self.draw(samples, adapters)
        return len(samples) / (self._clock() - began)

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
