"""One code path for both ways in which workers hold a U-Net: each the whole of it (DDP), or a shard (FSDP2).

Under FSDP2 weights, gradients, moments and averages are DTensors: a worker stores its rows only, and a block
is gathered while it computes. ``full_tensor`` and ``sharded_like`` convert between DTensors and plain
tensors. Both return plain tensors unchanged under DDP.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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
from dde_core.methods import MethodName
from dde_core.parallelism import Parallelism, Parameters, adafactor_averages, choose_parallelism


def choose(
    method: MethodName,
    training: TrainConfig,
    unet: UNet2DConditionModel,
    device: torch.device,
    world_size: int,
) -> Parallelism:
    """Resolve ``training.parallelism`` for this U-Net, with its adapters, on the smallest GPU of all workers.

    "auto" is a collective on GPUs: every worker must call it. Raises ConfigError for FSDP2 with an optimizer
    that cannot be sharded.
    """
    gpu_bytes = float("inf")
    if world_size > 1 and training.parallelism == "auto":
        gpu_bytes = smallest_memory(device)
    return choose_parallelism(method, training, count_parameters(unet, training), gpu_bytes, world_size)


def count_parameters(unet: UNet2DConditionModel, training: TrainConfig) -> Parameters:
    """Those of the U-Net without its adapters, those that are trained, and Adafactor's averages of these."""
    total = sum(parameter.numel() for parameter in unet.parameters())
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    num_trained = sum(parameter.numel() for parameter in trained)
    return Parameters(
        base=total - num_trained if training.lora else total,
        trained=num_trained,
        averages=sum(adafactor_averages(parameter.shape) for parameter in trained),
    )


def smallest_memory(device: torch.device) -> float:
    """Bytes of the smallest of all workers' GPUs, on every worker. A CPU's memory counts as unlimited."""
    if device.type != "cuda":
        return float("inf")
    memory = torch.tensor(torch.cuda.get_device_properties(device).total_memory, device=device)
    torch.distributed.all_reduce(memory, op=torch.distributed.ReduceOp.MIN)
    return float(memory)


def shard(unet: UNet2DConditionModel, device: torch.device, world_size: int) -> None:
    """Shard the U-Net over all workers and move each worker's shard to its device.

    Every resnet and every transformer block is a group of its own; the parameters outside of them are the
    last group.
    """
    mesh = init_device_mesh(device.type, (world_size,))
    for module in unet.modules():
        if isinstance(module, ResnetBlock2D | BasicTransformerBlock):
            fully_shard(module, mesh=mesh)
    fully_shard(unet, mesh=mesh)


def wrap(unet: nn.Module, parallelism: Parallelism, device: torch.device) -> nn.Module:
    """The module to train. Its backward pass averages gradients over workers."""
    if parallelism != "ddp":
        return unet
    device_ids = [device] if device.type == "cuda" else None
    return DistributedDataParallel(unet, device_ids=device_ids, gradient_as_bucket_view=True)


@contextmanager
def synchronized(module: nn.Module, is_last: bool) -> Iterator[None]:
    """Run one micro-batch. Gradients are averaged over workers in the last one of a step only."""
    if isinstance(module, DistributedDataParallel) and not is_last:
        with module.no_sync():
            yield
        return
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(is_last)
    yield


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor, on every worker. A collective: every worker must call it."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    return tensor


def sharded_like(value: Tensor, target: Tensor) -> Tensor:
    """Shard a plain tensor, which every worker has in full, as ``target`` is sharded."""
    if not isinstance(target, DTensor):
        return value
    on_device = value.to(target.device)
    return distribute_tensor(on_device, target.device_mesh, target.placements, src_data_rank=None)
