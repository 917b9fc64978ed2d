"""``dde rollout-check``: how far ahead a scorer must look at a model's candidates, on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dde_core.config import ObjectiveConfig, TrainConfig
from dde_core.errors import ConfigError
from dde_core.lookahead import PASSES, Lookahead, measure
from dde_core.models.folder import ModelFolder
from dde_core.models.policy import use_deterministic_kernels
from dde_core.reward import Reward
from dde_core.rollouts import Roller
from dde_core.scorers.kinds import KINDS, Scorer
from dde_core.scorers.load import load
from dde_core.shapes.scorers import ShapesScorer

GOOD = 0.5
"""A correlation from which on a pair's label is right about two times in three."""


def make_scorer(named: str, processor: Path | None, device: str) -> Scorer:
    """A scorer from ``KIND`` (built in) or ``KIND=CHECKPOINT``. Raises ConfigError for an unknown kind."""
    kind, _, checkpoint = named.partition("=")
    found = KINDS.get(kind)
    if found is None or found.level != "image":
        allowed = ", ".join(name for name, each in KINDS.items() if each.level == "image")
        raise ConfigError("scorer", kind, f"must be one of {allowed}")
    if found.is_built_in:
        return ShapesScorer(kind)
    if not checkpoint:
        raise ConfigError("scorer", named, f"needs its checkpoint: --scorer {kind}=PATH")
    return load(kind, Path(checkpoint), processor, device=device)


def check(
    folder: Path,
    scorer: Scorer,
    captions: Sequence[str],
    objective: ObjectiveConfig,
    every: int,
    completions: int,
    device: str,
    console: Console,
) -> list[Lookahead]:
    """Measure every ``every``-th transition of the objective, and print a row for each."""
    use_deterministic_kernels()
    model = ModelFolder(folder)
    scorer.check(captions, *model.image_size())
    roller = Roller(model, objective, TrainConfig(), device)
    roller.ranked = roller.ranked[::every]
    reward = Reward(model.vae().to(device), {scorer.kind.name: (scorer, 1.0)})
    rows = []
    for row in measure(roller, reward, captions, completions):
        rows.append(row)
        best = ", ".join(f"{passes}: {row.correlation[passes]:+.2f}" for passes in PASSES)
        console.print(f"t = {row.t}: {best}", highlight=False)
    console.print(table(rows, scorer.kind.name))
    return rows


def table(rows: Sequence[Lookahead], name: str) -> Table:
    """Correlations by t and number of passes, and the fewest passes that suffice."""
    title = f"Correlation of two candidates' gap in {name} with that of their final images"
    drawn = Table("t", *(f"L = {passes}" for passes in PASSES), "spread of the gap", "lookahead", title=title)
    for row in rows:
        enough = next((passes for passes in PASSES if row.correlation[passes] >= GOOD), None)
        cells = [f"{row.correlation[passes]:.2f} ± {row.error_of(passes):.2f}" for passes in PASSES]
        drawn.add_row(str(row.t), *cells, f"{row.spread:.3g}", str(enough or f"none reaches {GOOD:g}"))
    return drawn
