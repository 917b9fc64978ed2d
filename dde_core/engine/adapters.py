"""LoRA adapters of one U-Net, each on the rows of a call that want it.

For a row with adapter k, a layer gives y = W x + (alpha / rank) B_k A_k x (Hu et al. 2021, Eq. 3). The
low-rank products of all rows are two batched ones, with ranks padded by zeros; a row without adapter has
zeros for both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from torch.nn import functional

from dde_core.errors import ModelError
from dde_core.models.lora_file import read_lora

PREFIX = "unet."
DOWN = ".lora_A.weight"
UP = ".lora_B.weight"


@dataclass(frozen=True)
class LowRank:
    """The adapter of one layer. ``up`` has alpha / rank multiplied in.

    For a linear layer ``down`` is [rank, in] and ``up`` [out, rank]; for a convolution ``down`` is
    [rank, in, height, width] and ``up`` [out, rank].
    """

    down: Tensor
    up: Tensor


class RowAdapters:
    """The adapters of one U-Net, by key. Not thread-safe: the thread that calls the U-Net loads them too.

    Load adapters after the U-Net has its device and dtype; they take those of each layer.
    """

    def __init__(self, unet: nn.Module) -> None:
        self._layers: dict[str, nn.Module] = {
            name: module for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)
        }
        self._device = next(unet.parameters()).device
        self._keys: list[str] = []
        self._adapted: dict[str, _AdaptedLayer] = {}
        self._call = _Call()

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of the loaded adapters."""
        return tuple(self._keys)

    @property
    def num_bytes(self) -> int:
        """Bytes of all adapters, padding included."""
        tensors = [tensor for layer in self._adapted.values() for tensor in (layer.down, layer.up)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def load(self, key: str, folder: Path | str) -> None:
        """Load the adapters that ``load_lora_weights`` reads from a folder.

        Raises ModelError, before anything changes, for a key in use and for a file that is damaged or does
        not fit this U-Net.
        """
        if key in self._keys:
            raise ModelError(f"adapter {key!r} is loaded already")
        weights = read_adapter(folder, self._layers)
        for name in weights.keys() - self._adapted.keys():
            self._adapted[name] = _AdaptedLayer(self._layers[name], len(self._keys), self._call)
        for name, layer in self._adapted.items():
            layer.append(weights.get(name))
        self._keys.append(key)

    def unload(self, key: str) -> None:
        """Forget an adapter and free its memory. Raises ModelError for a key that is not loaded."""
        slot = self._slot(key)
        for name, layer in list(self._adapted.items()):
            layer.drop(slot)
            if layer.is_empty:
                layer.detach()
                del self._adapted[name]
        self._keys.pop(slot - 1)

    @contextmanager
    def rows(self, keys: Sequence[str | None]) -> Iterator[None]:
        """Within it, row i of each U-Net call has the adapter ``keys[i]``; None means none.

        Outside of it no row has one. Raises ModelError for a key that is not loaded. A U-Net call with
        another number of rows raises ValueError.
        """
        slots = [0 if key is None else self._slot(key) for key in keys]
        self._call.slots = torch.tensor(slots).to(self._device) if any(slots) else None
        try:
            yield
        finally:
            self._call.slots = None

    def _slot(self, key: str) -> int:
        """The place of a key's weights in every stack. Place 0 has no adapter."""
        if key not in self._keys:
            raise ModelError(f"adapter {key!r} is not loaded")
        return self._keys.index(key) + 1


@dataclass
class _Call:
    """The slot of each row, int64 [rows], shared by all layers; None where no row has an adapter."""

    slots: Tensor | None = None


class _AdaptedLayer:
    """The low-rank weights of all adapters for one layer, and the hook that adds them to its output.

    ``down`` is [slots, rank, ...] and ``up`` [slots, out, rank], of the greatest rank.
    """

    def __init__(self, layer: nn.Module, num_adapters: int, call: _Call) -> None:
        self._call = call
        self._ranks = [0] * (1 + num_adapters)
        weight: Any = layer.weight
        self.down = weight.new_zeros((len(self._ranks), 0, *weight.shape[1:]))
        self.up = weight.new_zeros((len(self._ranks), weight.shape[0], 0))
        self._hook = layer.register_forward_hook(self._add)

    @property
    def is_empty(self) -> bool:
        """Whether no adapter has weights for the layer."""
        return not any(self._ranks)

    def append(self, weights: LowRank | None) -> None:
        """Add a slot; None fills it with zeros."""
        rank = 0 if weights is None else len(weights.down)
        self._ranks.append(rank)
        greatest = max(self._ranks)
        slots = len(self._ranks)
        down = self.down.new_zeros((slots, greatest, *self.down.shape[2:]))
        up = self.up.new_zeros((slots, self.up.shape[1], greatest))
        down[:-1, : self.down.shape[1]] = self.down
        up[:-1, :, : self.up.shape[2]] = self.up
        if weights is not None:
            down[-1, :rank] = weights.down
            up[-1, :, :rank] = weights.up
        self.down, self.up = down, up

    def drop(self, slot: int) -> None:
        """Remove a slot, and the padding that it alone needed."""
        self._ranks.pop(slot)
        kept = [i for i in range(len(self.down)) if i != slot]
        greatest = max(self._ranks)
        self.down = self.down[kept, :greatest].clone()
        self.up = self.up[kept, :, :greatest].clone()

    def detach(self) -> None:
        """Remove the hook."""
        self._hook.remove()

    def _add(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        """The hook: the layer's output with each row's own low-rank product added."""
        slots = self._call.slots
        if slots is None:
            return None
        x = inputs[0]
        if len(x) != len(slots):
            raise ValueError(f"the call has {len(x)} rows, but adapters were set for {len(slots)}")
        down = self.down.index_select(0, slots)
        up = self.up.index_select(0, slots)
        if isinstance(module, nn.Conv2d):
            hidden = _convolve_rows(module, x, down)
            return output + torch.bmm(up, hidden.flatten(2)).view_as(output)
        hidden = torch.bmm(x.reshape(len(x), -1, x.shape[-1]), down.transpose(1, 2))
        output.view(len(x), -1, output.shape[-1]).baddbmm_(hidden, up.transpose(1, 2))
        return output


def _convolve_rows(layer: nn.Conv2d, x: Tensor, kernels: Tensor) -> Tensor:
    """Each row convolved with its own kernels [rows, rank, in, height, width], as one grouped convolution."""
    rows, rank = kernels.shape[:2]
    hidden = functional.conv2d(
        x.reshape(1, -1, *x.shape[2:]),
        kernels.flatten(0, 1),
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        groups=rows,
    )
    return hidden.view(rows, rank, *hidden.shape[2:])


def read_adapter(folder: Path | str, layers: dict[str, nn.Module]) -> dict[str, LowRank]:
    """The adapters of a folder, by layer name, in float32.

    They are scaled as diffusers scales them: by the file's peft config, or by 1 if it has none. Raises
    ModelError, naming the first of them, for keys that are no adapter of one of ``layers``, and for shapes
    that differ.
    """
    where = f"adapters of {str(folder)!r}"
    weights, metadata = read_lora(folder)
    config = _config(where, metadata)
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in weights.items():
        side = next((side for side in (DOWN, UP) if key.endswith(side)), None)
        if side is None or not key.startswith(PREFIX):
            raise ModelError(f"{where} cannot be served: {key!r} is no LoRA weight of the U-Net")
        name = key.removeprefix(PREFIX).removesuffix(side)
        if name not in layers:
            message = f"{key!r} belongs to no linear or convolution layer of this U-Net"
            raise ModelError(f"{where} are for another base model: {message}")
        found.setdefault(name, {})[side] = tensor.float()
    adapters: dict[str, LowRank] = {}
    for name, sides in found.items():
        if len(sides) != 2:
            raise ModelError(f"{where} are damaged: {name!r} has one of {DOWN} and {UP} only")
        adapters[name] = _low_rank(where, name, layers[name], sides[DOWN], sides[UP], config)
    if not adapters:
        raise ModelError(f"{where} hold no LoRA weight of the U-Net")
    return adapters


def _config(where: str, metadata: dict[str, Any] | None) -> LoraConfig | None:
    """The U-Net's peft config. Raises ModelError for one that is invalid or asks for other arithmetic."""
    if metadata is None:
        return None
    settings = {key.removeprefix(PREFIX): value for key, value in metadata.items() if key.startswith(PREFIX)}
    try:
        config = LoraConfig(**settings)
    except (ValueError, TypeError) as error:
        raise ModelError(f"{where} cannot be loaded: {error}") from error
    for name in ("use_dora", "lora_bias"):
        if getattr(config, name):
            raise ModelError(f"{where} cannot be served: {name} must be false, got True")
    return config


def _low_rank(
    where: str, name: str, layer: nn.Module, down: Tensor, up: Tensor, config: LoraConfig | None
) -> LowRank:
    """One layer's adapter with its scale. Raises ModelError for shapes that differ."""
    weight: Any = layer.weight
    ones = (1,) * (weight.ndim - 2)
    rank = len(down)
    for side, tensor, shape in (
        (DOWN, down, (rank, *weight.shape[1:])),
        (UP, up, (weight.shape[0], rank, *ones)),
    ):
        if tuple(tensor.shape) != shape or rank == 0:
            message = f"{PREFIX}{name}{side} has shape {list(tensor.shape)}, the layer needs {list(shape)}"
            raise ModelError(f"{where} are for another base model: {message}")
    return LowRank(down, up.flatten(1) * _scale(where, name, rank, config))


def _scale(where: str, name: str, rank: int, config: LoraConfig | None) -> float:
    """alpha / rank, or alpha / sqrt(rank) for a rank-stabilized adapter; 1 without a config."""
    if config is None:
        return 1.0
    ranks: dict[str, int] = config.rank_pattern or {}
    alphas: dict[str, float] = config.alpha_pattern or {}
    configured = ranks.get(get_pattern_key(list(ranks), name), config.r)
    if configured != rank:
        raise ModelError(
            f"{where} are damaged: rank of {name!r} must be {configured} as in its config, got {rank}"
        )
    alpha = alphas.get(get_pattern_key(list(alphas), name), config.lora_alpha)
    return float(alpha / (sqrt(rank) if config.use_rslora else rank))
