"""Collects what an evaluation measures, chunk by chunk, into the table of scores that is compared."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from dde_core import metrics
from dde_core.score_table import Prompt, ScoreTable
from dde_core.scorers.kinds import KINDS, Kind
from services.api.records import ScorerRecord
from services.evaluation.chunks import Scored


@dataclass
class Table:
    """``models`` by name, the base first, and ``prompts``, each with as many images by each model.

    ``scores``: float64 [models, prompts, images] of each scorer of the level "image", by name. ``features``:
    float64 [models, prompts, images, d] of every other scorer, of which its kind makes its numbers.
    """

    models: tuple[str, ...]
    prompts: tuple[Prompt, ...]
    images_per_prompt: int
    scores: dict[str, np.ndarray] = field(default_factory=dict)
    features: dict[str, np.ndarray] = field(default_factory=dict)

    def add(self, scored: Scored, scorers: Sequence[ScorerRecord]) -> None:
        """Fill in the numbers of one chunk."""
        chunk = scored.chunk
        rows = slice(chunk.first, chunk.first + len(chunk.prompts))
        for scorer in scorers:
            values = scored.scores[scorer.name]
            is_score = KINDS[scorer.kind].level == "image"
            arrays = self.scores if is_score else self.features
            if scorer.name not in arrays:
                shape = (len(self.models), len(self.prompts), self.images_per_prompt, *values.shape[1:])
                arrays[scorer.name] = np.full(shape, np.nan)
            arrays[scorer.name][chunk.model, rows, chunk.image] = values

    def score_table(self, scorers: Sequence[ScorerRecord], truncated: Collection[int]) -> ScoreTable:
        """The table of scores, complete. ``truncated`` are the prompts that a scorer cuts.

        Raises DataError for a scorer of a prompt's images where each prompt has one.
        """
        kinds = {scorer.name: scorer.kind for scorer in scorers}
        numbers = {name: _numbers(KINDS[kinds[name]], features) for name, features in self.features.items()}
        return ScoreTable(
            models=self.models,
            prompts=[replace(prompt, is_truncated=i in truncated) for i, prompt in enumerate(self.prompts)],
            images_per_prompt=self.images_per_prompt,
            kinds=kinds,
            scores=self.scores | numbers,
        )


def _numbers(kind: Kind, features: np.ndarray) -> np.ndarray:
    """Diversity [models, prompts] or drift [models] of features [models, prompts, images, d].

    The base's own drift is that between its images of different seeds, NaN where each prompt has one.
    """
    if kind.level == "prompt":
        return np.stack([metrics.diversity(of_model) for of_model in features])
    base, *candidates = features
    own = metrics.drift_between_seeds(base) if base.shape[1] > 1 else np.nan
    return np.array([own, *(metrics.cmmd(_flat(base), _flat(each)) for each in candidates)])


def _flat(features: np.ndarray) -> np.ndarray:
    """[prompts, images, d] as [n, d]."""
    return features.reshape(-1, features.shape[-1])
