"""How several workers hold one U-Net: each a whole one (DDP), or each a share of it (FSDP2). One code path for both.

Under FSDP2 weights, gradients, moments and averages are DTensors, of which a worker has its rows alone; blocks are gathered
for as long as they compute. ``whole`` and ``like`` go from such a tensor to a plain one and back, and leave plain ones alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from dde_core.config import TrainConfig
from dde_core.errors import ConfigError
from dde_core.planning.cluster import AUTO_ROOM

Parallelism = Literal["none", "ddp", "fsdp"]


def choose(training: TrainConfig, num_parameters: int, device: torch.device, world_size: int) -> Parallelism:
    """What ``training.parallelism`` comes to. "auto" shares the model out where a whole one does not fit on a GPU.

    Raises ConfigError for 8-bit moments on shares: their tables are not cut by rows.
    """
    if world_size == 1:
        return "none"
    asked = training.parallelism
    if asked == "auto":
        asked = "ddp" if state_bytes(training, num_parameters) <= _room(device) else "fsdp"
    if asked == "fsdp" and training.optimizer == "adamw_8bit":
        raise ConfigError(
            "training.optimizer", training.optimizer, 'does not go with training.parallelism "fsdp"'
        )
    return asked


def _room(device: torch.device) -> float:
    """Bytes, on the smallest of all workers' GPUs: one answer for all. A CPU's memory is taken to be enough."""
    if device.type != "cuda":
        return float("inf")
    room = torch.tensor(torch.cuda.get_device_properties(device).total_memory * AUTO_ROOM, device=device)
    torch.distributed.all_reduce(room, op=torch.distributed.ReduceOp.MIN)
    return float(room)


def state_bytes(training: TrainConfig, num_parameters: int) -> int:
    """Of a whole model: float32 weights, bf16 casts, and for a full fine-tune gradients, moments, average and reference."""
    each = 4 + 2 * (training.precision == "bf16")
    if not training.lora:
        moments = 2 if training.optimizer == "adamw_8bit" else 8
        each += 4 + moments + 4 * (training.ema_decay > 0) + 4 * (training.reference != "ledger")
    return each * num_parameters


def shard(unet: UNet2DConditionModel, device: torch.device, world_size: int) -> None:
    """Share the U-Net out, block by block, over all workers: resnets and transformer blocks, then what is left.

    Its weights move to the device, each worker's share alone.
    """
    mesh = init_device_mesh(device.type, (world_size,))
    for module in unet.modules():
        if isinstance(module, ResnetBlock2D | BasicTransformerBlock):
            fully_shard(module, mesh=mesh)
    fully_shard(unet, mesh=mesh)


def wrap(unet: UNet2DConditionModel, parallelism: Parallelism, device: torch.device) -> nn.Module:
    """The module whose backward pass averages gradients over workers."""
    if parallelism != "ddp":
        return unet
    devices = [device] if device.type == "cuda" else None
    return DistributedDataParallel(unet, device_ids=devices, gradient_as_bucket_view=True)


@contextmanager
def synchronised(module: nn.Module, is_last: bool) -> Iterator[None]:
    """Gradients are averaged over workers once a step, with the last micro-batch."""
    if isinstance(module, DistributedDataParallel) and not is_last:
        with module.no_sync():
            yield
        return
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(is_last)
    yield


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every worker. Every worker must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(value: Tensor, target: Tensor) -> Tensor:
    """A plain tensor, which every worker has, shared out as ``target`` is."""
    if not isinstance(target, DTensor):
        return value
    return distribute_tensor(
        value.to(target.device), target.device_mesh, target.placements, src_data_rank=None
    )
