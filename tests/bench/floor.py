"""The least a training step can cost: text encoders, policy forward and backward, clipping, optimizer.

All tensors are in memory. Nothing is read, drawn, checked or logged; the reference's errors are constants.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dde_core.config import TrainConfig
from dde_core.models.policy import Policy, make_optimizer
from dde_core.models.text import TextEncoders
from dde_core.train_step import PairBatch, pair_errors


class Floor:
    """Trains on one ``batch`` with captions ``token_ids`` [b k s], by Diffusion-DPO's loss."""

    def __init__(
        self,
        folder: Any,
        training: TrainConfig,
        device: torch.device,
        batch: PairBatch,
        token_ids: Any,
        beta: float,
    ) -> None:
        self._batch = batch
        self._token_ids = token_ids
        self._training = training
        self._half_beta = beta / 2
        self._schedule = folder.schedule().to(device)
        self._text = TextEncoders(folder, device)
        self._policy = Policy(folder, training, device)
        self._optimizer = make_optimizer(self._policy.parameters(), training)
        self._ref: dict[int, Tensor] = {}

    def step(self) -> None:
        """One optimizer step. The policy's error differences of the first step serve as the reference's."""
        self._optimizer.zero_grad(set_to_none=True)
        size = self._training.micro_batch_size or len(self._batch)
        for start in range(0, len(self._batch), size):
            part = self._with_text(slice(start, start + size))
            with self._policy.autocast():
                errors = pair_errors(self._policy.trained, self._schedule, part)
            difference = errors.l - errors.w
            ref = self._ref.setdefault(start, difference.detach())
            (-F.logsigmoid(self._half_beta * (difference - ref)).sum() / len(self._batch)).backward()
        self._policy.clip_gradients()
        self._optimizer.step()

    def _with_text(self, keep: slice) -> PairBatch:
        """A micro-batch. Encodes its captions."""
        part = self._batch.rows(keep)
        text = self._text(self._token_ids[keep])
        sides = {name: {**getattr(part, name), **text} for name in ("conditioning_w", "conditioning_l")}
        return PairBatch(**{**vars(part), **sides})
