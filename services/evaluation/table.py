"""What an evaluation measured, as arrays: the input of every statistic and report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from dde_core.scorers.kinds import KINDS
from services.api.records import ScorerRecord
from services.artifacts.prompts import Prompt
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
