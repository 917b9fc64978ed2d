"""Preferences between two samples of one denoising step: TailorPO's transition, ranking and loss.

A transition goes from x_t to x_t' by ancestral DDIM with noise eta (Song et al. 2021, Eq. 12). With alpha_bar
(ab) at t, ab' at t' and a model's noise e (guided, where the run is),

    sigma^2 = eta^2 (1 - ab') / (1 - ab) (1 - ab / ab')
    mu      = sqrt(ab') (x_t - sqrt(1 - ab) e) / sqrt(ab) + sqrt(1 - ab' - sigma^2) e
    x_t'    = mu + sigma z

TailorPO (arXiv 2502.01667) draws several x_t' from ONE x_t, ranks them by a reward and prefers the best to
the worst with a loss of DPO's kind. Its text and code could not be had; what follows is our derivation. The
means of policy and reference differ by -sigma a (e_theta - e_ref), with

    a = (sqrt(ab' (1 - ab) / ab) - sqrt(1 - ab' - sigma^2)) / sigma

so in the difference of the two Gaussian log-ratios all squares cancel:

    dz    = (x_w - x_l) / sigma = z_w - z_l
    logit = -beta a (mean(dz e_theta) - mean(dz e_ref))

Means are over latent elements, as everywhere here. A pair needs one forward pass of the policy, and of the
reference one number. The mean mu of the weights that drew the candidates cancels too: the loss stays exact
when the policy has moved on since. At eta = 1, a = sqrt(2 kappa) with kappa = 1/2 (SNR(t') / SNR(t) - 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from dde_core.config import ObjectiveConfig
from dde_core.errors import ConfigError
from dde_core.schedule import Schedule


@dataclass(frozen=True, eq=False)
class Transitions:
    """n transitions of one sampler, by number; tables in float64.

    ``t`` and ``t_next`` are the paper's timesteps (1..T; the U-Net is called with t - 1), ``keep`` is
    sqrt(ab' / ab), the coefficient of x_t in mu, and ``a`` and ``sigma`` are those of the module's formulas.
    """

    t: Int[Tensor, " n"]
    t_next: Int[Tensor, " n"]
    keep: Float64[Tensor, " n"]
    sigma: Float64[Tensor, " n"]
    a: Float64[Tensor, " n"]

    @classmethod
    def of(cls, schedule: Schedule, timesteps: Sequence[int], eta: float = 1.0) -> Transitions:
        """The transitions between consecutive ``timesteps`` (the paper's, falling, at least two).

        Raises ConfigError, naming the field, for timesteps that do not fall within 1..T and for a transition
        without noise: all of its candidates would be one.
        """
        falls = all(a > b for a, b in pairwise(timesteps))
        if len(timesteps) < 2 or not falls or timesteps[0] > schedule.T or timesteps[-1] < 0:
            raise ConfigError("timesteps", list(timesteps), f"must fall, and lie within 0..{schedule.T}")
        t = torch.tensor(timesteps[:-1])
        t_next = torch.tensor(timesteps[1:])
        before = schedule.alpha_bar.cpu()[t]
        after = schedule.alpha_bar.cpu()[t_next]
        variance = eta**2 * (1 - after) / (1 - before) * (1 - before / after)
        for number, value in enumerate(variance.tolist()):
            if not value > 0:
                step = f"{t[number]} -> {t_next[number]}"
                field, given = ("eta", eta) if not eta > 0 else ("transitions", step)
                raise ConfigError(field, given, f"leaves no noise in the transition {step}")
        if bool((before == 0).any()):
            raise ConfigError("transitions", int(t[0]), "starts at zero signal: x0 cannot be estimated there")
        sigma = variance.sqrt()
        drift = (after * (1 - before) / before).sqrt() - (1 - after - variance).clamp(min=0).sqrt()
        return cls(t=t, t_next=t_next, keep=(after / before).sqrt(), sigma=sigma, a=drift / sigma)

    def __len__(self) -> int:
        return len(self.t)

    def of_range(self, first_t: int, last_t: int) -> Transitions:
        """Those that start at t in ``first_t`` .. ``last_t``."""
        inside = (self.t >= first_t) & (self.t <= last_t)
        return Transitions(*(getattr(self, field.name)[inside] for field in fields(self)))

    def mean(
        self, number: Int[Tensor, " b"], x_t: Float[Tensor, "b c h w"], noise: Float[Tensor, "b c h w"]
    ) -> Float[Tensor, "b c h w"]:
        """mu of x_t' for a model's ``noise``; row i makes transition ``number[i]``."""
        keep = self._of_rows(self.keep, number, x_t)
        slope = self._of_rows(self.sigma * self.a, number, x_t)
        return keep * x_t - slope * noise

    def candidates(
        self,
        number: Int[Tensor, " b"],
        mean: Float[Tensor, "b c h w"],
        z: Float[Tensor, "b k c h w"],
    ) -> Float[Tensor, "b k c h w"]:
        """k samples of x_t' for each row: mu + sigma z."""
        return mean[:, None] + self._of_rows(self.sigma, number, mean)[:, None] * z

    def _of_rows(self, table: Float64[Tensor, " n"], number: Int[Tensor, " b"], like: Tensor) -> Tensor:
        return table.to(like.device)[number].view(-1, 1, 1, 1).to(like.dtype)


def all_transitions(config: ObjectiveConfig, schedule: Schedule) -> Transitions:
    """The transitions of a rollout (``ObjectiveConfig.starts``). The last one ends at timestep 2."""
    return Transitions.of(schedule, [*config.starts(schedule.T), 2], config.eta)


def ranked_transitions(config: ObjectiveConfig, schedule: Schedule) -> Transitions:
    """The transitions that are ranked and trained. Raises ConfigError as ``ranked_starts`` does."""
    starts = config.ranked_starts(schedule.T)
    return all_transitions(config, schedule).of_range(starts[-1], starts[0])


@dataclass(frozen=True, eq=False)
class Ranked:
    """The best and the worst candidate of each row, and how far apart their rewards are."""

    winner: Int[Tensor, " b"]
    loser: Int[Tensor, " b"]
    gap: Float64[Tensor, " b"]


def rank(rewards: Float64[Tensor, "b k"]) -> Ranked:
    """Winner and loser by reward. Of equal ones the first wins and the last loses, so the two differ.

    Raises ConfigError for fewer than two candidates.
    """
    count = rewards.shape[1]
    if count < 2:
        raise ConfigError("candidates", count, "must be at least 2: one cannot be preferred to itself")
    winner = rewards.argmax(1)
    loser = count - 1 - rewards.flip(1).argmin(1)
    rows = torch.arange(len(rewards), device=rewards.device)
    return Ranked(winner, loser, rewards[rows, winner] - rewards[rows, loser])


def projection(dz: Float[Tensor, "b c h w"], noise: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """mean(dz e) of each row, in float32 or wider: all that the loss needs of a model's noise."""
    wide = torch.promote_types(noise.dtype, torch.float32)
    return (dz.to(wide) * noise.to(wide)).mean(dim=(1, 2, 3))


def soft_share(gap: Float64[Tensor, " b"], temperature: float) -> Float64[Tensor, " b"]:
    """The winner's share of the preference by Bradley and Terry: sigmoid(gap / temperature)."""
    return torch.sigmoid(gap / temperature)


def guided(
    noise: Float[Tensor, "b c h w"], gradient: Float[Tensor, "b c h w"], strength: float
) -> Float[Tensor, "b c h w"]:
    """TailorPO-G's winner: z + strength sqrt(D) g, g the reward's unit gradient by x_t' (our reading).

    D is the number of latent elements, so a strength of 1 moves z as far as it is long. Rows whose gradient
    is zero stay.
    """
    norm = gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    unit = torch.where(norm > 0, gradient / norm.clamp(min=torch.finfo(norm.dtype).tiny), 0.0)
    moved: Tensor = noise + strength * noise[0].numel() ** 0.5 * unit
    return moved
