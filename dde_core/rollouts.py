"""Rollouts of TailorPO: draw candidates along one trajectory, rank them by a reward, keep what can teach.

Every draw is keyed by (seed, round, slot, transition, candidate), so a rollout is the same to the bit in any
order and on any number of actors, as long as a call has the same rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from dde_core.conditioning import Conditioning, concatenated, predict
from dde_core.noise import draw_candidate, draw_choice, draw_start, draw_step
from dde_core.schedule import Schedule, epsilon_from
from dde_core.transitions import Ranked, Transitions, projection, rank

Noise = Callable[[Tensor, Tensor], Tensor]
"""A model's guided noise of samples [b c h w] at timesteps [b]."""

Reward = Callable[[Tensor, Sequence[int]], Tensor]
"""Rewards, float64 [n], of clean latents [n c h w]; the numbers are the slots that they belong to."""


def guided_noise(
    unet: Callable[..., object],
    schedule: Schedule,
    x: Float[Tensor, "b c h w"],
    t: Int[Tensor, " b"],
    cond: Conditioning,
    uncond: Conditioning,
    scale: float,
) -> Float[Tensor, "b c h w"]:
    """e_u + scale (e_c - e_u) (Ho and Salimans 2022, Eq. 6), in one U-Net call; without ``uncond`` rows for
    a scale of at most 1."""
    if scale <= 1:
        return epsilon_from(schedule, predict(unet, x, t, cond), x, t)
    both = predict(unet, torch.cat([x, x]), torch.cat([t, t]), concatenated(cond, uncond))
    with_text, without = both.chunk(2)
    return epsilon_from(schedule, without + scale * (with_text - without), x, t)


@dataclass(frozen=True, eq=False)
class Ranking:
    """Ranked candidates of one transition, one row for each slot.

    ``dz`` is z_w - z_l, ``ref`` the reference's projection on it; ``rewards`` are those of all candidates.
    """

    transition: int
    x_t: Float[Tensor, "b c h w"]
    dz: Float[Tensor, "b c h w"]
    ref: Float[Tensor, " b"]
    rewards: Float64[Tensor, "b k"]
    ranked: Ranked


@dataclass(frozen=True, kw_only=True)
class RolloutPlan:
    """Which transitions are ranked, and how. ``first`` and ``last`` are numbers of transitions, both ranked.

    ``lookahead``: passes of deterministic DDIM from t' to the clean sample that is rewarded; 1 rewards the
    x0 that one pass estimates.
    """

    transitions: Transitions
    first: int
    last: int
    candidates: int = 2
    lookahead: int = 1
    goes_on_from_winner: bool = False


@torch.no_grad()
def roll(
    plan: RolloutPlan,
    schedule: Schedule,
    policy: Callable[[Tensor, Tensor, Sequence[int]], Tensor],
    reference: Callable[[Tensor, Tensor, Sequence[int]], Tensor],
    reward: Reward,
    key: tuple[int, int],
    slots: Sequence[int],
    shape: tuple[int, int, int],
) -> list[Ranking]:
    """Ranked candidates of every transition from ``first`` to ``last``.

    ``policy`` and ``reference`` are called with samples, timesteps and the place in ``slots`` of each row,
    and return the guided noise. ``key`` is (seed, round).
    """
    steps = plan.transitions
    count = plan.candidates
    places = list(range(len(slots)))
    spread = [place for place in places for _ in range(count)]
    x = torch.stack([draw_start(*key, slot, shape) for slot in slots])
    noise = policy(x, steps.t[0].expand(len(slots)), places)
    found = []
    for number in range(plan.last + 1):
        rows = torch.full((len(slots),), number)
        mean = steps.mean(rows, x, noise)
        if number < plan.first:
            z = torch.stack([draw_step(*key, slot, number, shape) for slot in slots])
            x = steps.candidates(rows, mean, z[:, None])[:, 0]
            noise = policy(x, steps.t_next[number].expand(len(slots)), places)
            continue
        z = torch.stack(
            [
                torch.stack([draw_candidate(*key, slot, number, k, shape) for k in range(count)])
                for slot in slots
            ]
        )
        drawn = steps.candidates(rows, mean, z).flatten(0, 1)
        t_next = steps.t_next[number].expand(len(drawn))
        noises = policy(drawn, t_next, spread)
        clean = look_ahead(schedule, policy, drawn, noises, int(steps.t_next[number]), plan.lookahead, spread)
        rewards = reward(clean, [slots[place] for place in spread]).view(len(slots), count)
        ranked = rank(rewards)
        here = torch.arange(len(slots))
        dz = z[here, ranked.winner] - z[here, ranked.loser]
        ref = projection(dz, reference(x, steps.t[number].expand(len(slots)), places))
        found.append(Ranking(number, x, dz, ref, rewards, ranked))
        chosen = ranked.winner
        if not plan.goes_on_from_winner:
            chosen = torch.tensor([draw_choice(*key, slot, number, count) for slot in slots])
        x = drawn.view(len(slots), count, *shape)[here, chosen]
        noise = noises.view(len(slots), count, *shape)[here, chosen]
    return found


def look_ahead(
    schedule: Schedule,
    policy: Callable[[Tensor, Tensor, Sequence[int]], Tensor],
    x: Float[Tensor, "b c h w"],
    noise: Float[Tensor, "b c h w"],
    t: int,
    passes: int,
    places: Sequence[int],
) -> Float[Tensor, "b c h w"]:
    """The clean sample after ``passes`` deterministic DDIM passes at timesteps that fall evenly from t to 0.

    ``noise`` is the policy's at (x, t): the first pass.
    """
    times = [t - t * done // passes for done in range(passes)] + [0]
    for now, then in pairwise(times):
        if now != t:
            noise = policy(x, torch.full((len(x),), now), places)
        before, after = (schedule.alpha_bar[each].item() for each in (now, then))
        x0 = (x - (1 - before) ** 0.5 * noise) / before**0.5
        x = after**0.5 * x0 + (1 - after) ** 0.5 * noise
    return x
