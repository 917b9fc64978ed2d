"""The Ray actors of a round: they draw trajectories, and decode and score what was drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from ray.actor import ActorHandle
from torch import Tensor

from dde_core.models.folder import ModelFolder
from dde_core.models.policy import use_deterministic_kernels
from dde_core.reward import Reward
from dde_core.rollouts import Reward as AnyReward
from dde_core.rollouts import Roller
from dde_core.rounds import kept_pairs
from services.artifacts import models, scorers
from services.rollout import store
from services.rollout.store import RoundFile
from services.stages.specs import TrainSpec


@dataclass(frozen=True)
class Chunk:
    """Trajectories that are drawn in one call of the U-Net: their slots in the round, and their captions."""

    round: int
    name: str
    slots: list[int]
    captions: list[str]


class RewardActor:
    """Decodes latents and scores the images."""

    def __init__(self, spec_json: str) -> None:
        self._reward = local_reward(TrainSpec.model_validate_json(spec_json))

    def score(self, latents: np.ndarray, captions: list[str]) -> np.ndarray:
        """Rewards float64 [n] of clean latents float32 [n c h w]."""
        return self._reward(torch.from_numpy(latents.copy()), captions)

    def ready(self) -> None:
        """Return once the actor has loaded everything."""


class RolloutActor:
    """Draws chunks with the weights of a round, and writes their pairs to storage.

    It keeps one version of the weights. Rewards come from ``reward_actor``, or without one from this process.
    """

    def __init__(self, spec_json: str, reward_actor: ActorHandle | None = None) -> None:
        self._spec = TrainSpec.model_validate_json(spec_json)
        use_deterministic_kernels()
        folder = ModelFolder(*models.fetch(self._spec.model))
        self._roller = Roller(folder, self._spec.objective, self._spec.training, _device(self._spec))
        self._reward: AnyReward = RemoteReward(reward_actor) if reward_actor else local_reward(self._spec)
        self._weights = ""

    def ready(self) -> None:
        """Return once the actor has loaded everything."""

    def draw(self, weights: list[ray.ObjectRef], digest: str, chunk: Chunk) -> RoundFile:
        """Draw a chunk and write its pairs. ``weights`` holds a reference, read if the digest is new."""
        if digest != self._weights:
            self._weights = ""
            arrays = ray.get(weights[0])
            self._roller.load({name: torch.tensor(array) for name, array in arrays.items()})
            self._weights = digest
        key = (self._spec.training.draw_seed, chunk.round)
        rankings = self._roller(key, chunk.slots, chunk.captions, self._reward)
        pairs, tally = kept_pairs(rankings, chunk.slots, chunk.captions, self._spec.objective)
        return RoundFile(
            name=chunk.name,
            sha256=store.write_pairs(self._spec.run, chunk.round, chunk.name, pairs.to_parquet()),
            pairs=len(pairs),
            tally=tally.by_name(),
        )


class RemoteReward:
    """The reward of an actor. Ray starts an actor that has died again, and repeats what was asked of it."""

    def __init__(self, actor: ActorHandle) -> None:
        self._actor = actor

    def __call__(self, latents: Tensor, captions: Sequence[str]) -> np.ndarray:
        found: np.ndarray = ray.get(self._actor.score.remote(latents.float().cpu().numpy(), list(captions)))
        return found

    def differentiable(self, latents: Tensor, captions: Sequence[str]) -> Tensor:
        """Not offered: a gradient needs decoder and scorer in the process of the U-Net."""
        raise NotImplementedError("rollouts.reward_actors must be 0 for a method that needs gradients")


def local_reward(spec: TrainSpec) -> Reward:
    """The reward of a spec, loaded into this process."""
    assert spec.rollouts
    use_deterministic_kernels()
    device = _device(spec)
    vae: Any = ModelFolder(*models.fetch(spec.model)).vae().to(device)
    weights = spec.rollouts.scorers
    loaded = {each.name: (scorers.load(each, device), weights[each.name]) for each in spec.rewards}
    return Reward(vae, loaded)


def _device(spec: TrainSpec) -> str:
    return "cuda" if spec.use_gpu else "cpu"
