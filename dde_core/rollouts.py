"""Rollouts of on-policy methods: draw candidates along one trajectory and rank them by a reward.

Every draw is keyed by (seed, round, slot, transition, candidate), so a rollout is the same to the bit in any
order and on any number of machines of one kind, as long as a call has the same slots.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from dde_core.conditioning import Conditioning, guided_noise
from dde_core.config import ObjectiveConfig, TrainConfig
from dde_core.errors import DataError
from dde_core.methods import METHODS
from dde_core.models.folder import ModelFolder
from dde_core.models.policy import Policy
from dde_core.models.text import TextEncoders
from dde_core.noise import draw_candidate, draw_choice, draw_start, draw_step
from dde_core.schedule import Schedule
from dde_core.transitions import (
    all_transitions,
    guided,
    projection,
    rank,
    ranked_transitions,
)

Noises = Callable[[Tensor, Tensor, Sequence[int]], Tensor]
"""A model's guided noise of samples [b c h w] at timesteps [b]; the third are the rows' slots, by place."""


@runtime_checkable
class Reward(Protocol):
    """What `dde_core.reward.Reward` is here; a service may keep it in another process."""

    def __call__(
        self, latents: Float[Tensor, "n c h w"], captions: Sequence[str]
    ) -> Float64[np.ndarray, " n"]:
        """Rewards of clean latents; NaN for one that is not finite."""
        ...

    def differentiable(
        self, latents: Float[Tensor, "n c h w"], captions: Sequence[str]
    ) -> Float[Tensor, " n"]:
        """Rewards with their gradient by the latents."""
        ...


@dataclass(frozen=True, eq=False)
class Ranking:
    """Ranked candidates of one transition, one row for each slot.

    ``t`` is where the transition starts, ``dz`` z_w - z_l, ``ref`` the anchor's projection on it. ``rewards``
    are those of all candidates. A row is not ``finite`` if one of its rewards is not: it has no pair.
    """

    transition: int
    t: int
    x_t: Float[Tensor, "b c h w"]
    dz: Float[Tensor, "b c h w"]
    ref: Float[Tensor, " b"]
    rewards: Float64[np.ndarray, "b k"]
    gap: Float64[np.ndarray, " b"]
    finite: Bool[np.ndarray, " b"]


class Roller:
    """A policy on a device that draws and ranks. ``load`` gives it the weights of a round.

    ``transitions`` are all of its sampler, ``ranked`` the numbers of those that are trained.

    Raises ConfigError for an objective without transitions, or LoRA targets that the U-Net does not have.
    """

    def __init__(
        self,
        folder: ModelFolder,
        objective: ObjectiveConfig,
        training: TrainConfig,
        device: torch.device | str = "cpu",
    ) -> None:
        self.objective = objective
        self.device = torch.device(device)
        self.schedule = folder.schedule()
        ranked = ranked_transitions(objective, self.schedule)
        self.transitions = all_transitions(objective, self.schedule)
        self.ranked = [int((self.transitions.t == t).nonzero()) for t in ranked.t]
        self.size_px = folder.image_size()
        side = [length // folder.vae_factor for length in self.size_px]
        self.policy = Policy(folder, replace(training, ema_decay=0.0, compile=False), device)
        self.policy.unet.requires_grad_(False)
        self.shape = (int(self.policy.unet.config.in_channels), *side)
        self.text_encoders = TextEncoders(folder, self.device)

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Copy the trained weights of a policy, by the names of ``Policy.weights``.

        Raises DataError before a change if names or shapes are of another policy.
        """
        own = self.policy.weights()
        expected = {name: tuple(value.shape) for name, value in own.items()}
        if expected != {name: tuple(value.shape) for name, value in weights.items()}:
            raise DataError("the weights of the round belong to another U-Net, or to other adapters")
        for name, value in own.items():
            value.copy_(weights[name])

    @torch.no_grad()
    def __call__(
        self, key: tuple[int, int], slots: Sequence[int], captions: Sequence[str], reward: Reward
    ) -> list[Ranking]:
        """Draw a trajectory of each slot and rank every transition that is trained.

        ``key`` is (seed, round).
        """
        call = Trajectories(self, key, slots, captions, reward)
        x = torch.stack([draw_start(*key, slot, self.shape) for slot in slots]).to(self.device)
        noise = call.noises(x, self.transitions.t[0].expand(len(slots)), call.places)
        found = []
        for number in range(self.ranked[-1] + 1):
            if number in self.ranked:
                ranking, x, noise = call.ranked(number, x, noise)
                found.append(ranking)
            else:
                x, noise = call.moved(number, x, noise)
        return found


class Trajectories:
    """The trajectories of one call, one for each slot: what a transition does with them.

    ``places`` are the slots' places in the call.
    """

    def __init__(
        self,
        roller: Roller,
        key: tuple[int, int],
        slots: Sequence[int],
        captions: Sequence[str],
        reward: Reward,
    ) -> None:
        self._roller = roller
        self._objective = roller.objective
        self._steps = roller.transitions
        self._key = key
        self._slots = slots
        self._captions = captions
        self._reward = reward
        encoders = roller.text_encoders
        self._conditioning = encoders.of_captions(captions, *roller.size_px)
        self._no_caption = encoders.of_captions([None], *roller.size_px)
        self.places = list(range(len(slots)))

    def noises(self, x: Tensor, t: Tensor, places: Sequence[int]) -> Tensor:
        """The policy's guided noise."""
        return self._noises(self._roller.policy.unet, x, t, places)

    def moved(self, number: int, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The sample after a transition that is not ranked, and the policy's noise there."""
        shape = self._roller.shape
        z = torch.stack([draw_step(*self._key, slot, number, shape) for slot in self._slots])
        rows = torch.full((len(x),), number)
        mean = self._steps.mean(rows, x, noise)
        x = self._steps.candidates(rows, mean, z[:, None].to(x.device))[:, 0]
        return x, self.noises(x, self._steps.t_next[number].expand(len(x)), self.places)

    def ranked(self, number: int, x: Tensor, noise: Tensor) -> tuple[Ranking, Tensor, Tensor]:
        """Candidates of a transition, ranked; then the sample from which the trajectory goes on, and the
        policy's noise there."""
        count = self._objective.candidates
        shape = self._roller.shape
        spread = [place for place in self.places for _ in range(count)]
        captions = [self._captions[place] for place in spread]
        z = torch.stack(
            [
                torch.stack([draw_candidate(*self._key, slot, number, k, shape) for k in range(count)])
                for slot in self._slots
            ]
        ).to(x.device)
        rows = torch.full((len(x),), number)
        drawn = self._steps.candidates(rows, self._steps.mean(rows, x, noise), z).flatten(0, 1)
        t_next = int(self._steps.t_next[number])
        passes = self._objective.lookahead_passes(int(self._steps.t[number]))
        noises = self.noises(drawn, torch.full((len(drawn),), t_next), spread)
        clean = look_ahead(self._roller.schedule, self.noises, drawn, noises, t_next, passes, spread)
        rewards = np.asarray(self._reward(clean, captions)).reshape(len(x), count)
        finite = np.isfinite(rewards).all(axis=1)
        order = rank(torch.from_numpy(np.where(finite[:, None], rewards, 0.0)))
        here = torch.arange(len(x))
        z_w = z[here, order.winner]
        if METHODS[self._objective.method].reward_gradient:
            x_w = drawn.view(len(x), count, *shape)[here, order.winner]
            gradient = self.gradient(x_w, t_next)
            finite &= gradient.isfinite().flatten(1).all(dim=1).cpu().numpy()
            z_w = guided(z_w, gradient.nan_to_num(0.0, 0.0, 0.0), self._objective.guidance_strength)
        dz = z_w - z[here, order.loser]
        ranking = Ranking(
            transition=number,
            t=int(self._steps.t[number]),
            x_t=x,
            dz=dz,
            ref=projection(dz, self._anchor(number, x, noise)),
            rewards=rewards,
            gap=order.gap.numpy(),
            finite=finite,
        )
        chosen = order.winner
        if self._objective.continue_from == "random":
            chosen = torch.tensor([draw_choice(*self._key, slot, number, count) for slot in self._slots])
        on = here * count + chosen
        return ranking, drawn[on], noises[on]

    def _anchor(self, number: int, x: Tensor, noise: Tensor) -> Tensor:
        """The noise at x_t of what the policy is compared with."""
        if self._objective.anchor == "round":
            return noise
        t = self._steps.t[number].expand(len(x))
        return self._noises(self._roller.policy.reference, x, t, self.places)

    def gradient(self, x: Tensor, t: int) -> Tensor:
        """The reward's gradient by samples at t, through the clean samples that one pass estimates."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            noise = self.noises(x, torch.full((len(x),), t), self.places)
            clean = look_ahead(self._roller.schedule, self.noises, x, noise, t, 1, self.places)
            reward = self._reward.differentiable(clean, self._captions).sum()
            return torch.autograd.grad(reward, x)[0]

    def _noises(self, unet: Callable[..., Any], x: Tensor, t: Tensor, places: Sequence[int]) -> Tensor:
        conditioning = {name: rows[list(places)] for name, rows in self._conditioning.items()}
        no_caption: Conditioning = {
            name: row.expand(len(places), *row.shape[1:]) for name, row in self._no_caption.items()
        }
        scale = self._objective.guidance_scale
        with self._roller.policy.autocast():
            return guided_noise(
                unet, self._roller.schedule, x, t.to(x.device), conditioning, no_caption, scale
            )


def look_ahead(
    schedule: Schedule,
    noises: Noises,
    x: Float[Tensor, "b c h w"],
    noise: Float[Tensor, "b c h w"],
    t: int,
    passes: int,
    places: Sequence[int],
) -> Float[Tensor, "b c h w"]:
    """The clean sample after ``passes`` deterministic DDIM passes at timesteps that fall evenly from t to 0.

    ``noise`` is that of (x, t): the first pass.
    """
    times = [t - t * done // passes for done in range(passes)] + [0]
    for now, then in pairwise(times):
        if now == then:
            continue
        if now != t:
            noise = noises(x, torch.full((len(x),), now), places)
        before, after = (float(schedule.alpha_bar[each]) for each in (now, then))
        x0 = (x - (1 - before) ** 0.5 * noise) / before**0.5
        x = after**0.5 * x0 + (1 - after) ** 0.5 * noise
    return x
