"""How well a policy separates winners from losers on pairs that it was not trained on."""

from __future__ import annotations

import numpy as np
import torch

from dde_core.batches import BatchMaker, slices
from dde_core.latents.reader import LatentReader
from dde_core.metrics import beat_ratio
from dde_core.models.policy import Policy
from dde_core.schedule import Schedule
from dde_core.train_step import PairBatch, check_finite, pair_errors, preference_margin

DRAWS = 8
PAIRS_AT_ONCE = 32
"""If training has no micro-batch size."""


@torch.no_grad()
def held_out_metrics(
    policy: Policy, batches: BatchMaker, reader: LatentReader, schedule: Schedule, size: int
) -> dict[str, float]:
    """Implicit accuracy on the held-out pairs: the fraction with a positive margin, and its 95% interval.

    A pair's margin is the mean over DRAWS timesteps, one from each of DRAWS equal parts of 1..T. Timesteps
    and noise do not depend on method, range or seed of the run, so runs are comparable. A batch has ``size``
    pairs (0: PAIRS_AT_ONCE). The Wilson interval treats pairs as independent, though those of
    one caption are not quite. Raises NonFiniteError for a margin that is not finite.
    """
    margins = []
    with policy.autocast():
        for part in slices(reader.held_out(), size or PAIRS_AT_ONCE):
            visits = (batches.held_out(part, draw, DRAWS) for draw in range(DRAWS))  # one at a time
            margins.append(torch.stack([_margin(policy, schedule, batch) for batch in visits]).mean(0))
    all_margins = torch.cat(margins)
    check_finite("the margin of held-out pairs", all_margins)
    margin = all_margins.cpu().numpy()
    accuracy, low, high = beat_ratio(margin, np.zeros(len(margin)))
    return {
        "held_out_accuracy": accuracy,
        "held_out_accuracy_low": low,
        "held_out_accuracy_high": high,
        "held_out_margin": float(margin.mean()),
        "held_out_pairs": len(margin),
    }


def _margin(policy: Policy, schedule: Schedule, batch: PairBatch) -> torch.Tensor:
    theta = pair_errors(policy.unet, schedule, batch)
    ref = pair_errors(policy.reference, schedule, batch)
    return preference_margin(theta, ref)
