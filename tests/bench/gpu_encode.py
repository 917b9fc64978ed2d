"""Images/s of the VAE encoder as ingest runs it, and what other arithmetic would give: dde_core alone.

    python -m tests.bench.gpu_encode --model sd15 --out results.json

Sides alternate on the same images: float32 without TF32 (ingest's own arithmetic), float32 with TF32, bf16
autocast. Each takes uint8 pixels on the host and returns float16 latents on the host. Reported with each: the
largest relative L2 distance of its latents from ingest's own.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any

import numpy as np
import torch

from dde_core.models.folder import encode_images
from dde_core.models.policy import use_deterministic_kernels
from tests.bench.gpu_step import gpu_parser, machine_of, record_results
from tests.bench.measure import in_turn, ratio
from tests.bench.random_folder import RandomFolder

OWN = "float32"


class Encode:
    """Encodes the same random images by one VAE, in each arithmetic."""

    def __init__(self, model: str, device: torch.device, images: int) -> None:
        folder = RandomFolder(model, device)
        self._device = device
        self._vae = folder.vae().to(device)
        shape = (images, folder.size_px, folder.size_px, 3)
        self._images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        self.latents: dict[str, np.ndarray] = {}

    def speed(self, arithmetic: str) -> float:
        """Images/s, after one pass that selects kernels."""
        use_deterministic_kernels()
        torch.backends.cudnn.allow_tf32 = arithmetic == "tf32"
        torch.backends.cuda.matmul.allow_tf32 = arithmetic == "tf32"
        autocast: Any = contextlib.nullcontext()
        if arithmetic == "bf16":
            autocast = torch.autocast(self._device.type, torch.bfloat16)
        with torch.no_grad(), autocast:
            encode_images(self._vae, self._images)
            began = time.monotonic()
            self.latents[arithmetic] = encode_images(self._vae, self._images).astype(np.float32)
        return len(self._images) / (time.monotonic() - began)

    def distance(self, arithmetic: str) -> float:
        """Relative L2 distance of its latents from float32's, of the worst image."""
        own, other = (self.latents[name].reshape(len(self._images), -1) for name in (OWN, arithmetic))
        return float((np.linalg.norm(other - own, axis=1) / np.linalg.norm(own, axis=1)).max())


def main(arguments: list[str] | None = None) -> None:
    """Parse, measure, record."""
    parser = gpu_parser(__doc__)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    encode = Encode(options.model, device, options.images)
    sides = {name: lambda name=name: encode.speed(name) for name in (OWN, "tf32", "bf16")}
    found = in_turn(options.rounds, sides)
    for arithmetic in found:
        what = f"{OWN}, ingest's own; latents differ by {encode.distance(arithmetic):.2g}"
        row = {**ratio(found, arithmetic, OWN, "images/s", what), "machine": machine_of(device)}
        record_results({f"{options.model}, VAE encode, {arithmetic}": row}, options.out)


if __name__ == "__main__":
    main()
