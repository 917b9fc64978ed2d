"""How well a policy tells winner from loser on pairs that it was not trained on."""

from __future__ import annotations

import numpy as np
import torch

from dde_core.batches import BatchMaker, slices
from dde_core.latents.reader import LatentReader
from dde_core.metrics import beat_ratio
from dde_core.models.policy import Policy
from dde_core.schedule import Schedule
from dde_core.train_step import PairBatch, PairErrors, pair_errors

DRAWS = 8
PAIRS_AT_ONCE = 32
"""Where training runs its whole share at once."""


@torch.no_grad()
def held_out_metrics(
    policy: Policy, batches: BatchMaker, reader: LatentReader, schedule: Schedule, size: int
) -> dict[str, float]:
    """Implicit accuracy on the held-out pairs, with its 95% Wilson interval: the share with a positive margin.

    A pair's margin is the mean over DRAWS timesteps, one from each of as many equal parts of 1..T, with the same noise
    whatever the method, range and seed of the run are: so runs compare. ``size`` pairs go at once. The interval takes pairs
    as independent; those of one caption are not quite.
    """
    margins = []
    with policy.autocast():
        for part in slices(reader.held_out(), size or PAIRS_AT_ONCE):
            visits = (batches.held_out(part, draw, DRAWS) for draw in range(DRAWS))  # one at a time
            margins.append(torch.stack([_margin(policy, schedule, batch) for batch in visits]).mean(0))
    everywhere = torch.cat(margins).cpu().numpy()
    accuracy, low, high = beat_ratio(everywhere, np.zeros(len(everywhere)))
    return {
        "held_out_accuracy": accuracy,
        "held_out_accuracy_low": low,
        "held_out_accuracy_high": high,
        "held_out_margin": float(everywhere.mean()),
        "held_out_pairs": len(everywhere),
    }


def _margin(policy: Policy, schedule: Schedule, batch: PairBatch) -> torch.Tensor:
    return _gap(pair_errors(policy.unet, schedule, batch)) - _gap(
        pair_errors(policy.reference, schedule, batch)
    )


def _gap(errors: PairErrors) -> torch.Tensor:
    """By how much the winner is denoised better than the loser."""
    assert errors.l is not None
    return errors.l.double() - errors.w.double()
