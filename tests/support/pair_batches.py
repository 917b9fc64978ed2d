"""Pairs of random latents without conditioning."""

from __future__ import annotations

import torch

from dde_core.train_step import PairBatch


def random_pairs(t: list[int], dtype: torch.dtype = torch.float32) -> PairBatch:
    """A pair for each timestep: latents and noise [n 4 8 8], different on both sides."""
    generator = torch.Generator().manual_seed(0)
    sides = [torch.randn(len(t), 4, 8, 8, generator=generator, dtype=dtype) for _ in range(4)]
    return PairBatch(
        pair_ids=tuple(map(str, t)),
        t=torch.tensor(t),
        share=torch.ones(len(t)),
        latents_w=sides[0],
        noise_w=sides[1],
        conditioning_w={},
        latents_l=sides[2],
        noise_l=sides[3],
        conditioning_l={},
    )
