"""The scores of one evaluation, in the places where statistics look for them. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dde_core.errors import DataError
from dde_core.scorers.kinds import KINDS, Kind, KindName


@dataclass(frozen=True)
class Prompt:
    """A prompt of a file or an evaluation. ``category`` is what its file says of it: reports have numbers for
    each. ``is_truncated``: a scorer's tokenizer cut its end off.
    """

    text: str
    category: str | None = None
    is_truncated: bool = False


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
