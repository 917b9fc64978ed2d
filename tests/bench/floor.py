"""The least that a training step can cost: text encoders, policy forward and backward, clipping and the optimizer, on tensors
that lie in memory. Nothing is read, drawn, checked or told, and the reference's errors are numbers that do not change."""

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
    """``batch`` is a whole optimizer step's, ``token_ids`` [b k s] are its captions. The loss is Diffusion-DPO's."""

    def __init__(
        self,
        folder: Any,
        training: TrainConfig,
        device: torch.device,
        batch: PairBatch,
        token_ids: Any,
        beta: float,
    ) -> None:
        self._batch, self._token_ids, self._training = batch, token_ids, training
        self._half_beta, self._schedule = beta / 2, folder.schedule().to(device)
        self._text, self._policy = TextEncoders(folder, device), Policy(folder, training, device)
        self._optimizer = make_optimizer(self._policy.parameters(), training)
        self._ref: dict[int, Tensor] = {}

    def step(self) -> None:
        """One optimizer step. The policy's own differences at the first one are the reference's from then on."""
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
        """A micro-batch whose captions are encoded now."""
        part, text = self._batch.rows(keep), self._text(self._token_ids[keep])
        sides = {name: {**getattr(part, name), **text} for name in ("conditioning_w", "conditioning_l")}
        return PairBatch(**{**vars(part), **sides})
