"""Peak bytes of a forward and backward, counted on tensors without storage (device "meta").

On a GPU, attention is one kernel that keeps queries, keys, values, its output and one number a row, and
autocast runs convolutions and linear layers in bf16 and normalizations in float32. Neither happens on
"meta", so this module adds both.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.support.unet_configs import UNETS, conditioning, unet


def activation_bytes(name: str, *, bf16: bool, checkpointing: bool, samples: int = 1) -> int:
    """The peak beyond weights, their gradients and, with ``bf16``, their bf16 copies."""
    model = unet(name)
    if checkpointing:
        model.enable_gradient_checkpointing()
    size = UNETS[name]["sample_size"]
    x_t, t = (
        torch.empty(samples, 4, size, size, device="meta"),
        torch.ones(samples, dtype=torch.long, device="meta"),
    )
    added = conditioning(name, samples, "meta")
    text = added.pop("encoder_hidden_states")
    copies = bf16_copies(model) if bf16 else {}
    live = LiveBytes()
    for weight in [*model.parameters(), *copies.values()]:
        weight.grad = torch.empty_like(weight)
        live.ignore(weight, weight.grad)
    with like_a_gpu(copies), live:
        output = model(x_t, t, text, added_cond_kwargs=added or None).sample
        output.float().square().mean().backward()
    return live.peak


def bf16_copies(model: UNet2DConditionModel) -> dict[int, Tensor]:
    """The bf16 copy that autocast makes of each weight and keeps, by the weight's id."""
    return {id(weight): weight.detach().bfloat16().requires_grad_() for weight in model.parameters()}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operators allocate, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def ignore(self, *tensors: Tensor) -> None:
        self._sizes |= {tensor.untyped_storage()._cdata: 0 for tensor in tensors}

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = operator(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, Tensor):
                self._add(result.untyped_storage())
        return results

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


class Attention(torch.autograd.Function):
    """The shapes of a fused attention kernel and the tensors that it keeps for its backward."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output, rows = torch.empty_like(query), query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, rows)
        return output

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(saved) for saved in ctx.saved_tensors[:3])


@contextmanager
def like_a_gpu(copies: dict[int, Tensor]) -> Iterator[None]:
    """Emulate fused attention and, if there are bf16 ``copies`` of the weights, the casts of autocast."""

    def narrow(x: Tensor | None) -> Tensor | None:
        return x.bfloat16() if copies and x is not None else x

    def in_bf16(layer: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(x: Tensor, weight: Tensor, bias: Tensor | None = None, *rest: Any) -> Tensor:
            weight, bias = copies.get(id(weight), weight), copies.get(id(bias), bias)
            return layer(narrow(x), weight, bias, *rest)

        return call

    def in_float32(layer: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, *rest: layer(x.float(), *rest)

    def attention(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
        return Attention.apply(narrow(query), narrow(key), narrow(value))

    narrowed = {name: in_bf16(getattr(F, name)) for name in ("linear", "conv2d")}
    widened = {name: in_float32(getattr(F, name)) for name in ("group_norm", "layer_norm")}
    with mock.patch.multiple(F, **narrowed, **widened, scaled_dot_product_attention=attention):
        yield
