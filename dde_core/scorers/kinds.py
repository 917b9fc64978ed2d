"""The kinds of scorers: what a scorer's numbers belong to, their scale and their source. Imports no torch.

A scorer is one kind with one checkpoint. ``load`` (load.py) makes it ready to call; the kinds of the shapes
world need no checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

KindName = Literal[
    "clip", "pickscore", "hps", "aesthetic", "imagereward", "diversity", "drift", "match", "taste", "fidelity"
]
Level = Literal["image", "prompt", "model"]


@dataclass(frozen=True)
class Kind:
    """What every scorer of a kind has in common.

    ``level`` is what one number belongs to: an image, all images of one prompt (``diversity``), or all images
    of a model, compared with those of the base (``drift``). ``reads_prompt``: the score depends on the
    prompt. ``is_built_in``: there is no checkpoint.
    """

    name: KindName
    level: Level
    reads_prompt: bool
    higher_is_better: bool
    scale: str
    is_built_in: bool = False

    @property
    def differentiable(self) -> bool:
        """Whether a score has a gradient by the pixels of its image: every score of one image has."""
        return self.level == "image"

    def why_no_gradient(self, resize: str) -> str | None:
        """Why `tailorpo_g` cannot move an image along the gradient of a score; None if it can.

        ``resize`` is the scorer's, which only `hps` has a choice of. An aliased shrinking reads a grid of
        pixels, so its gradient says nothing about the others.
        """
        if not self.differentiable:
            return f"is of kind {self.name}, whose number belongs to several images"
        if self.name == "hps" and resize == "aliased":
            return (
                'has resize "aliased", which reads a grid of an image\'s pixels: register it as "antialiased"'
            )
        return None


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("clip", "image", True, True, "cosine, -1 to 1"),
        Kind("pickscore", "image", True, True, "cosine, -1 to 1"),
        Kind("hps", "image", True, True, "cosine, -1 to 1"),
        Kind("aesthetic", "image", False, True, "rating, about 1 to 10"),
        Kind("imagereward", "image", True, True, "standard deviations from the mean of its training data"),
        Kind("diversity", "prompt", False, True, "mean cosine distance of a prompt's images, 0 to 2"),
        Kind("drift", "model", False, False, "CMMD to the base's images, x 1000"),
        Kind("match", "image", True, True, "share of the caption's attributes, 0 to 1", is_built_in=True),
        Kind("taste", "image", True, True, "utility of the shapes' annotator, 0 to 1", is_built_in=True),
        Kind("fidelity", "image", False, True, "nearness to a drawable scene, 0 to 1", is_built_in=True),
    )
}


@runtime_checkable
class Scorer(Protocol):
    """A loaded scorer: called with images and their prompts.

    ``description``: what distinguishes its numbers from those of another scorer of its kind (kind, scale,
    preprocessing, token_limit, dtype), as JSON values.
    """

    kind: Kind
    description: dict[str, Any]

    def __call__(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """Scores of uint8 images [n, h, w, 3] and n prompts, in the order of the images.

        Level ``image``: float64 [n], on the kind's scale. The other levels: features of the images, float64
        [n, d] of length 1, of which metrics.py makes the numbers. Raises DataError for images that it cannot
        score, NonFiniteError for a score that is not finite.
        """
        ...

    def check(self, prompts: Sequence[str], height: int, width: int) -> None:
        """Raises DataError for prompts, or a size in pixels (0: the model's own), that it cannot score."""
        ...

    def truncated(self, prompts: Sequence[str]) -> list[int]:
        """Indices of the prompts that are longer than it reads: it scores with their beginnings."""
        ...
