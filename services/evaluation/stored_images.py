"""The images of an evaluation, found by model, prompt and number once they are stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np

from dde_core.errors import DataError
from services.artifacts import image_cache
from services.evaluation import drawing
from services.evaluation.chunks import Chunk, Scored
from services.stages.specs import EvaluateSpec

CHUNKS_KEPT = 16
"""Of the chunks that were read last: at most 16 x 25 images, 600 MB where each has 1024 x 1024 pixels."""


class StoredImages:
    """Reads one chunk at a time and keeps the last ones; those that were deleted or damaged meanwhile are
    drawn again.
    """

    def __init__(self, spec: EvaluateSpec) -> None:
        self._spec = spec
        self._scored: dict[tuple[int, int, int], Scored] = {}
        self._pngs = lru_cache(CHUNKS_KEPT)(self._read_chunk)

    def add(self, scored: Scored) -> None:
        """A chunk whose images are stored."""
        chunk = scored.chunk
        without_scores = replace(scored, scores={})
        for prompt in range(chunk.first, chunk.first + len(chunk.prompts)):
            self._scored[chunk.model, prompt, chunk.image] = without_scores

    def read(self, model: int, prompts: Sequence[int], image: int = 0) -> list[np.ndarray]:
        """The image with this number of each prompt by a model, counted from 0 and the base first: uint8
        [h, w, 3]. Raises DataError for images that are deleted or damaged time and again."""
        found: dict[int, np.ndarray] = {}
        for prompt in prompts:
            if prompt not in found:
                scored = self._scored[model, prompt, image]
                pixels = image_cache.decode_png(self._pngs(scored.uri, scored.chunk))
                found |= {scored.chunk.first + i: pixels[i] for i in range(len(pixels))}
        return [found[prompt] for prompt in prompts]

    def png(self, model: int, prompt: int, image: int) -> bytes:
        """One image as PNG. Raises DataError like ``read``."""
        scored = self._scored[model, prompt, image]
        return self._pngs(scored.uri, scored.chunk)[prompt - scored.chunk.first]

    def _read_chunk(self, uri: str, chunk: Chunk) -> list[bytes]:
        found = _read(uri)
        if found is None:
            for again in drawing.score_chunks(self._spec, [chunk]):
                found = _read(again.uri)
        if found is None:
            raise DataError(f"the images at {uri} were deleted or damaged twice within this evaluation")
        return found


def _read(uri: str) -> list[bytes] | None:
    try:
        return image_cache.read_images(uri)
    except image_cache.Damaged:
        return None
