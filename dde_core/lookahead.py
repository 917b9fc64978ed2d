"""How far ahead the reward of a candidate must look: a measurement before anything is spent on training.

Two candidates of one transition differ in the reward of the clean sample that is estimated from them, and in
the reward of the images that they end in. The better the first difference predicts the second, the more a
pair teaches. The end is itself random, so it is the mean over completions with noise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dde_core.errors import ConfigError
from dde_core.noise import draw_candidate, draw_start
from dde_core.rollouts import Reward, Roller, Trajectories, look_ahead

PASSES = (1, 2, 4, 8)
PAIR = 2


@dataclass(frozen=True)
class Lookahead:
    """For candidates that start at ``t``: the correlation, over prompts, of their gap at so many passes with
    the gap of their mean final rewards; and the standard deviation of the gap that one pass sees."""

    t: int
    correlation: dict[int, float]
    spread: float
    prompts: int

    def error_of(self, passes: int) -> float:
        """The correlation's standard error, (1 - r^2) / sqrt(n - 1)."""
        return float((1 - self.correlation[passes] ** 2) / max(self.prompts - 1, 1) ** 0.5)


@torch.no_grad()
def measure(
    roller: Roller,
    reward: Reward,
    captions: Sequence[str],
    completions: int = 6,
    seed: int = 0,
    per_call: int = 8,
) -> Iterator[Lookahead]:
    """A row for each ranked transition of the roller, as soon as it is measured.

    Raises ConfigError for fewer than three prompts: no correlation has a meaning.
    """
    if len(captions) < 3:
        raise ConfigError("prompts", len(captions), "must be at least 3")
    for number in roller.ranked:
        near: dict[int, list[float]] = {passes: [] for passes in PASSES}
        far: list[float] = []
        for start in range(0, len(captions), per_call):
            slots = list(range(start, min(start + per_call, len(captions))))
            call = _Call(roller, reward, seed, slots, [captions[slot] for slot in slots])
            drawn, noise = call.candidates(number)
            for passes in PASSES:
                near[passes] += call.gaps_ahead(number, drawn, noise, passes)
            far += call.gaps_at_the_end(number, drawn, noise, completions)
        yield Lookahead(
            t=int(roller.transitions.t[number]),
            correlation={passes: _correlation(values, far) for passes, values in near.items()},
            spread=float(np.std(near[1])),
            prompts=len(captions),
        )


class _Call:
    """A few prompts: two candidates of each at a transition, and what becomes of them."""

    def __init__(
        self, roller: Roller, reward: Reward, seed: int, slots: list[int], captions: list[str]
    ) -> None:
        self._roller = roller
        self._reward = reward
        self._seed = seed
        self._slots = slots
        self._trunk = Trajectories(roller, (seed, 0), slots, captions, reward)
        self._captions = [caption for caption in captions for _ in range(PAIR)]
        self._spread = [PAIR * slot + k for slot in slots for k in range(PAIR)]

    def candidates(self, number: int) -> tuple[Tensor, Tensor]:
        """The two candidates of every slot, one after the other, and the policy's noise there."""
        roller = self._roller
        steps = roller.transitions
        shape = roller.shape
        key = (self._seed, 0)
        x = torch.stack([draw_start(*key, slot, shape) for slot in self._slots]).to(roller.device)
        noise = self._trunk.noises(x, steps.t[0].expand(len(x)), self._trunk.places)
        for before in range(number):
            x, noise = self._trunk.moved(before, x, noise)
        z = torch.stack(
            [
                torch.stack([draw_candidate(*key, slot, number, k, shape) for k in range(PAIR)])
                for slot in self._slots
            ]
        ).to(x.device)
        rows = torch.full((len(x),), number)
        drawn = steps.candidates(rows, steps.mean(rows, x, noise), z).flatten(0, 1)
        both = self._completion(0)
        return drawn, both.noises(drawn, steps.t_next[number].expand(len(drawn)), both.places)

    def gaps_ahead(self, number: int, drawn: Tensor, noise: Tensor, passes: int) -> list[float]:
        """First minus second reward of each slot's candidates, by so many passes of DDIM."""
        t = int(self._roller.transitions.t_next[number])
        both = self._completion(0)
        clean = look_ahead(self._roller.schedule, both.noises, drawn, noise, t, passes, both.places)
        return self._gaps(self._rewards(clean))

    def gaps_at_the_end(self, number: int, drawn: Tensor, noise: Tensor, completions: int) -> list[float]:
        """The same of the mean reward of images to which the sampler completes the candidates."""
        totals = np.zeros(len(drawn))
        for completion in range(1, completions + 1):
            both = self._completion(completion)
            x, e = drawn, noise
            for after in range(number + 1, len(self._roller.transitions)):
                x, e = both.moved(after, x, e)
            t = int(self._roller.transitions.t_next[-1])
            totals += self._rewards(look_ahead(self._roller.schedule, both.noises, x, e, t, 1, both.places))
        return self._gaps(totals / completions)

    def _completion(self, number: int) -> Trajectories:
        return Trajectories(self._roller, (self._seed, number), self._spread, self._captions, self._reward)

    def _rewards(self, clean: Tensor) -> np.ndarray:
        return np.asarray(self._reward(clean, self._captions))

    @staticmethod
    def _gaps(rewards: np.ndarray) -> list[float]:
        first, second = rewards.reshape(-1, PAIR).T
        gaps: list[float] = (first - second).tolist()
        return gaps


def _correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Pearson's; 0 where one of them does not vary, NaN left out."""
    pairs = np.array([pair for pair in zip(a, b, strict=True) if np.isfinite(pair).all()]).reshape(-1, 2)
    if len(pairs) < 3 or (pairs.std(axis=0) == 0).any():
        return 0.0
    return float(np.corrcoef(pairs.T)[0, 1])
