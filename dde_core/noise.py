"""Counter-based random draws: every number is a function of its key, never of rank, batch or call order.

A key (seed, purpose, pair id, ...) is hashed by blake2b to the 128-bit key of its own Philox generator. So a
pair's timestep, noise and caption dropout are the same on one worker or forty, in any order of visits, and
after a resume. The errors of the frozen reference can therefore be computed once for each draw and stored.
"""

from __future__ import annotations

import json
from hashlib import blake2b
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64
from torch import Tensor

Side = Literal["w", "l", "shared"]
"""Whose noise it is: the winner's, the loser's, or shared by both."""


def draw_timestep(seed: int, pair_id: str, draw: int, cumulative: Float64[np.ndarray, " times"]) -> int:
    """The timestep of a pair's n-th draw, shared by winner and loser. ``cumulative`` covers t = 0..T."""
    uniform = (_uniform_word(seed, "timestep", pair_id, draw) >> 11) * 2.0**-53
    return int(np.searchsorted(cumulative, uniform, side="right"))


def draw_noise(
    seed: int, pair_id: str, side: Side, draw: int, shape: tuple[int, ...]
) -> Float32[Tensor, "*shape"]:
    """Standard normal noise for one side of a pair's n-th draw."""
    return _normal(shape, seed, f"noise/{side}", pair_id, draw)


def draw_evaluation_point(
    seed: int, pair_id: str, side: Side, draw: int, shape: tuple[int, ...]
) -> Float32[Tensor, "*shape"]:
    """z of the x_{t-1} where `sampled` calibration compares p with q: standard normal, for all models."""
    return _normal(shape, seed, f"evaluation_point/{side}", pair_id, draw)


def draw_caption_dropout(seed: int, pair_id: str, draw: int, probability: float) -> bool:
    """Whether the caption of a pair's n-th draw is empty. Winner and loser share it."""
    return probability > 0 and _uniform_word(seed, "dropout", pair_id, draw) < probability * 2.0**64


def permutation(seed: int, epoch: int, n: int, window: int = 0) -> Int64[np.ndarray, " n"]:
    """The order in which an epoch visits the n pairs of a window."""
    key = (seed, "permutation", epoch, window) if window else (seed, "permutation", epoch)
    return np.random.Generator(_philox(*key)).permutation(n)


def shard_permutation(seed: int, epoch: int, n: int) -> Int64[np.ndarray, " n"]:
    """The order in which an epoch visits n shards."""
    return np.random.Generator(_philox(seed, "shard_permutation", epoch)).permutation(n)


def initial_latents(seed: int, shape: tuple[int, ...]) -> Float32[Tensor, "*shape"]:
    """Standard normal latents from which one image is sampled; ``shape`` is [c h w]."""
    return _normal(shape, seed, "initial_latents")


def draw_posterior(image: str, shape: tuple[int, ...]) -> Float32[Tensor, "*shape"]:
    """Standard normal noise of an image's sample of the posterior.

    It depends on the digest of the image's file alone, so a dataset that is encoded again is the same."""
    return _normal(shape, "posterior", image)


def draw_start(seed: int, round: int, slot: int, shape: tuple[int, ...]) -> Float32[Tensor, "*shape"]:
    """Standard normal latents from which a rollout's trajectory starts."""
    return _normal(shape, seed, "rollout_start", round, slot)


def draw_step(
    seed: int, round: int, slot: int, transition: int, shape: tuple[int, ...]
) -> Float32[Tensor, "*shape"]:
    """z of a rollout's transition that has no candidates."""
    return _normal(shape, seed, "rollout_step", round, slot, transition)


def draw_candidate(
    seed: int, round: int, slot: int, transition: int, candidate: int, shape: tuple[int, ...]
) -> Float32[Tensor, "*shape"]:
    """z of one candidate of a rollout's transition."""
    return _normal(shape, seed, "rollout_candidate", round, slot, transition, candidate)


def draw_choice(seed: int, round: int, slot: int, transition: int, candidates: int) -> int:
    """The candidate from which a rollout goes on, uniform."""
    return (_uniform_word(seed, "rollout_choice", round, slot, transition) * candidates) >> 64


def step_generator(seed: int) -> torch.Generator:
    """The generator of the noise that a sampler adds to one image between its steps.

    It draws on the CPU, so the numbers are the same for every device. Of its 64-bit seed torch's generator
    keeps 32 bits.
    """
    return torch.Generator().manual_seed(_uniform_word(seed, "step_noise"))


def _philox(*key: int | str) -> np.random.Philox:
    """The key's own generator. JSON keeps ("1", 2) and (1, "2") apart."""
    digest = blake2b(json.dumps(key).encode(), digest_size=16).digest()
    return np.random.Philox(key=int.from_bytes(digest, "little"))


def _uniform_word(*key: int | str) -> int:
    """A uniform 64-bit integer."""
    return int(_philox(*key).random_raw())


def _normal(shape: tuple[int, ...], *key: int | str) -> Float32[Tensor, "*shape"]:
    return torch.from_numpy(np.random.Generator(_philox(*key)).standard_normal(shape, dtype=np.float32))
