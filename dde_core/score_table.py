"""The scores of one evaluation, in the places where statistics look for them. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dde_core.errors import DataError
from dde_core.scorers.kinds import KINDS, Kind, KindName


@dataclass(frozen=True)
class Prompt:
    """A prompt of an evaluation. ``is_truncated``: a tokenizer that read it cut its end off."""

    text: str
    category: str | None = None
    is_truncated: bool = False


@dataclass(frozen=True)
class ScoreRow:
    """The scores of one image, by scorer. ``model``, ``prompt`` and ``image`` count from 0."""

    model: int
    prompt: int
    image: int
    scores: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class ScoreTable:
    """Scores of several models on the same prompts and seeds.

    ``models`` are names, the base first. ``kinds`` names each scorer's kind; ``scores`` has float64 arrays by
    scorer: [models, prompts, images] where its kind's level is ``image``, [models, prompts] where it is
    ``prompt``, [models] where it is ``model``. For drift, the base's entry is the drift between the base's
    own images of different seeds, NaN if that was not measured.

    Raises DataError, naming the scorer and the place, for shapes that do not fit, scores that are not finite,
    names that repeat, and fewer than 2 models or 1 prompt.
    """

    models: Sequence[str]
    prompts: Sequence[Prompt]
    images_per_prompt: int
    kinds: Mapping[str, KindName]
    scores: Mapping[str, np.ndarray]

    def __post_init__(self) -> None:
        if len(self.models) < 2:
            raise DataError(f"models must be a base and at least one candidate, got {list(self.models)}")
        if len(set(self.models)) < len(self.models):
            raise DataError(f"models must have different names, got {list(self.models)}")
        if not self.prompts or self.images_per_prompt < 1:
            raise DataError(f"got {len(self.prompts)} prompts with {self.images_per_prompt} images each")
        if set(self.kinds) != set(self.scores):
            raise DataError(f"kinds are of scorers {sorted(self.kinds)}, scores of {sorted(self.scores)}")
        for scorer in self.scores:
            self._check(scorer)

    def kind(self, scorer: str) -> Kind:
        """What the scorer's numbers belong to, and whether higher is better."""
        return KINDS[self.kinds[scorer]]

    def scorers(self, *levels: str) -> list[str]:
        """The scorers of these levels, in alphabetical order."""
        return sorted(scorer for scorer in self.scores if self.kind(scorer).level in levels)

    def by_prompt(self, scorer: str) -> np.ndarray:
        """Scores [models, prompts, images] of a scorer; of level ``prompt``, with a single "image"."""
        scores = self.scores[scorer]
        return scores if self.kind(scorer).level == "image" else scores[:, :, None]

    def _check(self, scorer: str) -> None:
        scores = self.scores[scorer]
        whole = (len(self.models), len(self.prompts), self.images_per_prompt)
        expected = {"image": whole, "prompt": whole[:2], "model": whole[:1]}[self.kind(scorer).level]
        if scores.shape != expected or scores.dtype != np.float64:
            found = f"{scores.dtype} {list(scores.shape)}"
            raise DataError(f"scorer {scorer!r}: scores must be float64 {list(expected)}, got {found}")
        missing = ~np.isfinite(scores)
        if self.kind(scorer).level == "model":
            missing[0] = False
        if missing.any():
            place = np.argwhere(missing)[0].tolist()
            raise DataError(
                f"scorer {scorer!r}: scores must be finite, got {scores[tuple(place)]} at {place}"
            )


def place_rows(
    rows: Iterable[ScoreRow], scorers: Sequence[str], num_models: int, num_prompts: int, num_images: int
) -> dict[str, np.ndarray]:
    """Arrays [models, prompts, images] by scorer, from one row for each image, in any order.

    Raises DataError for a row outside of the table, a second row for an image, a row without one of the
    scorers, and an image without a row.
    """
    shape = (num_models, num_prompts, num_images)
    arrays = {scorer: np.full(shape, np.nan) for scorer in scorers}
    is_placed = np.zeros(shape, dtype=bool)
    for row in rows:
        place = (row.model, row.prompt, row.image)
        name = f"image {row.image} of prompt {row.prompt} of model {row.model}"
        if not all(0 <= index < size for index, size in zip(place, shape, strict=True)):
            raise DataError(f"{name} is outside of {num_models} models x {num_prompts} x {num_images}")
        if is_placed[place]:
            raise DataError(f"{name} is scored twice")
        if set(row.scores) != set(scorers):
            raise DataError(f"{name} has scores of {sorted(row.scores)}, expected {sorted(scorers)}")
        is_placed[place] = True
        for scorer, score in row.scores.items():
            arrays[scorer][place] = score
    if not is_placed.all():
        model, prompt, image = np.argwhere(~is_placed)[0].tolist()
        missing = int((~is_placed).sum())
        raise DataError(
            f"{missing} images are not scored, the first is image {image} of prompt {prompt} of model {model}"
        )
    return arrays
