"""Scorers on real checkpoints: prove their files, load them, call them.

``prove`` reads configs, tokenizers and the headers of weights, and no weight; ``load`` proves first. Sources,
files and scales of each kind: docs/evaluation.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from dde_core.errors import ConfigError, DataError, NonFiniteError
from dde_core.scorers.clip_folders import plan_cosine, plan_features, plan_rating
from dde_core.scorers.hps import plan_hps
from dde_core.scorers.image_reward import plan_reward
from dde_core.scorers.kinds import KINDS, Kind
from dde_core.scorers.pixels import RESIZES, Device, Resize, check_size
from dde_core.scorers.plans import Plan
from dde_core.scorers.prompts import Text

DTYPES = (torch.float32, torch.bfloat16)

_PLANS = {
    "clip": plan_cosine,
    "pickscore": plan_cosine,
    "aesthetic": plan_rating,
    "imagereward": plan_reward,
    "diversity": plan_features,
    "drift": plan_features,
}


class ModelScorer:
    """A scorer on a checkpoint (``dde_core.scorers.kinds.Scorer``).

    ``model(*scorer.prepare(images, prompts))`` is what a call computes, and is differentiable in the pixels.
    ``description``: what distinguishes its numbers from those of another scorer of its kind, as JSON values.
    """

    def __init__(
        self, kind: Kind, plan: Plan, model: nn.Module, *, device: Device, dtype: torch.dtype, batch_size: int
    ) -> None:
        self.kind = kind
        self.model = model
        self.description = {**describe(kind, plan), "dtype": str(dtype).removeprefix("torch.")}
        self._plan = plan
        self._device = device
        self._batch_size = batch_size

    def __call__(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """Scores float64 [n], or features float64 [n, d], of uint8 images [n, h, w, 3] and n prompts.

        Raises DataError for another type or shape of images, NonFiniteError for a score that is not finite.
        """
        self._check_images(images, len(prompts))
        starts = range(0, len(images), self._batch_size)
        found = [self._score(images, prompts, slice(start, start + self._batch_size)) for start in starts]
        scores = torch.cat(found).double().cpu().numpy()
        finite = np.isfinite(scores).reshape(len(scores), -1).all(axis=1)
        if not finite.all():
            first = int(np.argmin(finite))
            message = f"{self.kind.name} of image {first} ({prompts[first]!r}) is not finite"
            raise NonFiniteError(f"{message}: {scores[first].reshape(-1)[:3]}")
        return scores

    def prepare(
        self, images: np.ndarray, prompts: Sequence[str]
    ) -> tuple[Float[Tensor, "n 3 side side"], Text]:
        """Pixels and token ids of a batch, on the scorer's device."""
        pixels = self._plan.pixels(images, self._device)
        text = self._plan.prompts(prompts) if self._plan.prompts else {}
        return pixels, {name: ids.to(self._device) for name, ids in text.items()}

    def differentiable(
        self, images: Float[Tensor, "n 3 height width"], prompts: Sequence[str]
    ) -> Float[Tensor, " n"]:
        """Scores of images with values in 0..1, with their gradient by the pixels.

        Images are resized as tensors and not rounded to 8 bits, so scores differ slightly from a call's.
        """
        text = self._plan.prompts(prompts) if self._plan.prompts else {}
        on_device = {name: ids.to(self._device) for name, ids in text.items()}
        scores: Tensor = self.model(self._plan.pixels.differentiable(images.to(self._device)), on_device)
        return scores

    def check(self, prompts: Sequence[str], height: int, width: int) -> None:
        """Raises DataError for a size in pixels that it cannot score; 0 is the model's own. Any prompt is
        fine."""
        if height and width:
            check_size(height, width)

    def truncated(self, prompts: Sequence[str]) -> list[int]:
        """Indices of the prompts that have more tokens than its encoder reads: their ends are not scored."""
        return self._plan.prompts.truncated(prompts) if self._plan.prompts else []

    @torch.inference_mode()
    def _score(self, images: np.ndarray, prompts: Sequence[str], part: slice) -> Tensor:
        """Scores on the scorer's device: it computes while the next images are prepared."""
        found: Tensor = self.model(*self.prepare(images[part], prompts[part]))
        return found

    def _check_images(self, images: np.ndarray, num_prompts: int) -> None:
        is_rgb = images.ndim == 4 and images.shape[-1] == 3
        if images.dtype != np.uint8 or not is_rgb or len(images) != num_prompts or not num_prompts:
            expected = f"uint8 [{max(num_prompts, 1)}, height, width, 3], one for each prompt"
            raise DataError(f"images must be {expected}, got {images.dtype} {list(images.shape)}")
        check_size(*images.shape[1:3])


def load(
    kind: str,
    checkpoint: Path,
    processor: Path | None = None,
    *,
    resize: Resize = "antialiased",
    device: Device = "cpu",
    dtype: torch.dtype = torch.float32,
    batch_size: int = 16,
) -> ModelScorer:
    """A scorer in memory. ``dtype``: what its encoders compute in, float32 or bfloat16.

    Raises DataError for files that are not of the kind, ConfigError for a setting.
    """
    if dtype not in DTYPES:
        allowed = " or ".join(str(each).removeprefix("torch.") for each in DTYPES)
        raise ConfigError("dtype", str(dtype).removeprefix("torch."), f"must be {allowed}")
    if batch_size < 1:
        raise ConfigError("batch_size", batch_size, "must be at least 1")
    plan = _plan(kind, checkpoint, processor, resize)
    model = plan.build(dtype).eval().requires_grad_(False).to(device)
    return ModelScorer(KINDS[kind], plan, model, device=device, dtype=dtype, batch_size=batch_size)


def prove(
    kind: str, checkpoint: Path, processor: Path | None = None, *, resize: Resize = "antialiased"
) -> dict[str, Any]:
    """The scorer's description but for its dtype, from files that can be loaded.

    Reads no weight. Raises DataError for the first file, config field, name or shape of a tensor that is not
    of the kind, ConfigError for a setting.
    """
    plan = _plan(kind, checkpoint, processor, resize)
    return describe(KINDS[kind], plan)


def truncated(kind: str, checkpoint: Path, processor: Path | None, prompts: Sequence[str]) -> list[int]:
    """``ModelScorer.truncated`` of the files, without reading a weight. Raises DataError like ``prove``."""
    plan = _plan(kind, checkpoint, processor, "antialiased")
    return plan.prompts.truncated(prompts) if plan.prompts else []


def describe(kind: Kind, plan: Plan) -> dict[str, Any]:
    """Kind, scale, preprocessing, and the most tokens of a prompt (null: it reads none)."""
    return {
        "kind": kind.name,
        "scale": kind.scale,
        "preprocessing": plan.pixels.describe(),
        "token_limit": plan.prompts.limit if plan.prompts else None,
    }


def _plan(kind: str, checkpoint: Path, processor: Path | None, resize: Resize) -> Plan:
    if resize not in RESIZES:
        raise ConfigError("resize", resize, f"must be {' or '.join(RESIZES)}")
    if kind == "hps":
        return plan_hps(checkpoint, processor, resize)
    if kind not in _PLANS:
        raise ConfigError("kind", kind, f"must be one of {', '.join([*_PLANS, 'hps'])}")
    if resize != "antialiased":
        raise ConfigError("resize", resize, f"must be 'antialiased' for {kind}: only hps has the choice")
    return _PLANS[kind](checkpoint, processor)
