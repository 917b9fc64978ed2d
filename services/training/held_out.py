"""How well a policy tells winner from loser on pairs that it was not trained on."""

from __future__ import annotations

import numpy as np
import torch

from dde_core.metrics import beat_ratio
from dde_core.models.policy import Policy
from dde_core.schedule import Schedule
from dde_core.train_step import PairErrors, pair_errors
from services.training.batches import BatchMaker, gather

DRAWS = 8
PAIRS_AT_ONCE = 32


@torch.no_grad()
def held_out_metrics(
    policy: Policy, batches: BatchMaker, schedule: Schedule, num_pairs: int, rank: int, world_size: int
) -> dict[str, float]:
    """Implicit accuracy on the held-out pairs, with its 95% Wilson interval: the share with a positive margin.

    A pair's margin is the mean over DRAWS timesteps, one from each of as many equal parts of 1..T, whatever the method's
    own weights and range are: so methods compare. The running average is measured where one is kept. The interval takes
    pairs as independent, and pairs that share a caption are not quite.
    """
    total = torch.zeros(num_pairs, dtype=torch.float64)
    for draw in range(DRAWS):
        batch, positions = batches.held_out(rank, world_size, draw, DRAWS)
        parts = [batch.rows(slice(i, i + PAIRS_AT_ONCE)) for i in range(0, len(batch), PAIRS_AT_ONCE)]
        margins = [torch.zeros(0, dtype=torch.float64, device=batch.t.device)]
        with policy.averaged(), policy.arithmetic():
            for part in parts:
                ref, theta = (pair_errors(model, schedule, part) for model in (policy.reference, policy.unet))
                margins.append(_gap(theta) - _gap(ref))
        total += gather([torch.cat(margins)], positions, num_pairs)[0]
    margin = total.numpy() / DRAWS
    accuracy, low, high = beat_ratio(margin, np.zeros(num_pairs))
    names = ("held_out_accuracy", "held_out_accuracy_low", "held_out_accuracy_high")
    return {
        **dict(zip(names, (accuracy, low, high), strict=True)),
        "held_out_margin": float(margin.mean()),
        "held_out_pairs": num_pairs,
    }


def _gap(errors: PairErrors) -> torch.Tensor:
    """By how much the winner is denoised better than the loser."""
    assert errors.l is not None
    return errors.l.double() - errors.w.double()
