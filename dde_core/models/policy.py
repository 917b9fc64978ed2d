"""The U-Net that is trained, whole or by LoRA adapters, and the frozen reference that it is compared with."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import peft
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import nn

from dde_core.config import LoraConfig, TrainConfig
from dde_core.errors import ConfigError, DataError
from dde_core.methods import MethodName
from dde_core.models import parallel
from dde_core.models.folder import LORA_WEIGHTS, ModelFolder

UNET_WEIGHTS = "diffusion_pytorch_model.safetensors"


def use_deterministic_kernels() -> None:
    """One thread and deterministic kernels in this process: the same batch gives the same numbers, to the bit.

    Precision "fp32" is float32 on every device: a GPU's TF32 has 10 bits of mantissa, and torch takes it for convolutions.
    """
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a write more, no other result
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    os.environ.setdefault(
        "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
    )  # cuBLAS refuses deterministic algorithms without it


class Policy:
    """``unet`` is the model, ``trained`` what a training loop calls with gradients: the same, wrapped for several workers.

    With ``world_size`` > 1 torch.distributed must be initialized; ``training`` and the needs of ``method`` then
    decide how the workers hold the model. Raises ConfigError for adapters that fit nowhere.
    """

    def __init__(
        self,
        folder: ModelFolder,
        training: TrainConfig,
        device: torch.device | str = "cpu",
        world_size: int = 1,
        method: MethodName = "dde",
    ) -> None:
        self._folder, self._training, self.device = folder, training, torch.device(device)
        self._world_size = world_size
        self.unet = folder.unet()
        if training.lora:
            check_targets(self.unet, training.lora)
            self._add_adapters(training.lora)
        if training.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.parallelism = parallel.choose(method, training, self.unet, self.device, world_size)
        self._place(self.unet)
        self._trained_parameters = [
            parameter for parameter in self.unet.parameters() if parameter.requires_grad
        ]
        self._adapted = [module for module in self.unet.modules() if isinstance(module, BaseTunerLayer)]
        self.trained = parallel.wrap(self.unet, self.parallelism, self.device)
        self.ema = EMAModel(self.parameters(), decay=training.ema_decay) if training.ema_decay else None

    def _place(self, unet: UNet2DConditionModel) -> None:
        """Onto the device, whole or as this worker's share."""
        if self.parallelism == "fsdp":
            parallel.shard(unet, self.device, self._world_size)
        else:
            unet.to(self.device)
        if self._training.compile:
            unet.compile()

    def parameters(self) -> list[nn.Parameter]:
        """What is trained, in a fixed order. Under FSDP2 this worker's shares, whatever a module holds at the moment."""
        return self._trained_parameters

    @torch.no_grad()
    def reference(self, *args: Any, **kwargs: Any) -> Any:
        """The frozen model's output: for LoRA the same U-Net with its adapters off, else a copy that was kept."""
        if not self._training.lora:
            return self._kept(*args, **kwargs)
        self._switch_adapters(off=True)
        try:
            return self.unet(*args, **kwargs)
        finally:
            self._switch_adapters(off=False)

    def _switch_adapters(self, *, off: bool) -> None:
        """peft's own switch also turns requires_grad off and on, on whatever tensors FSDP2 has in place just then."""
        for layer in self._adapted:
            layer._disable_adapters = off

    @cached_property
    def _kept(self) -> UNet2DConditionModel:
        """Loaded when it is first asked for: `sft`, and a run on a ledger, train without it."""
        unet = self._folder.unet().requires_grad_(False)
        self._place(unet)
        return unet

    def autocast(self) -> AbstractContextManager:
        """Run the U-Net under this. bf16 is autocast: weights stay float32, and so do errors and losses."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._training.precision == "bf16")

    def clip_gradients(self) -> torch.Tensor:
        """Scale all gradients down together where their norm is above ``max_grad_norm``. Their norm before, on every worker."""
        return parallel.full_tensor(nn.utils.clip_grad_norm_(self.parameters(), self._training.max_grad_norm))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """With the running average of the weights in place of the last ones, where one is kept."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        """Weights and average change places, one tensor at a time."""
        if self.ema is None:
            return
        for parameter, average in zip(self.parameters(), self.ema.shadow_params, strict=True):
            weights = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(weights)

    def weights(self) -> dict[str, torch.Tensor]:
        """What is trained, by the names of its file: the live tensors, of this worker."""
        if self._training.lora:
            return convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(self.unet))
        return self.unet.state_dict()

    def write(self, weights: dict[str, torch.Tensor], folder: Path) -> None:
        """A copy of ``weights()`` as diffusers reads it: a U-Net folder, or a file of LoRA adapters."""
        if not self._training.lora:
            folder.mkdir(parents=True, exist_ok=True)
            # FSDP2 gives the module a class of its own, which nobody could load.
            config = json.loads(self.unet.to_json_string()) | {"_class_name": UNet2DConditionModel.__name__}
            (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
            save_file(weights, folder / UNET_WEIGHTS, metadata={"format": "pt"})
            return
        StableDiffusionPipeline.save_lora_weights(
            folder,
            unet_lora_layers=weights,
            unet_lora_adapter_metadata=self.unet.peft_config["default"].to_dict(),
        )

    @torch.no_grad()
    def read(self, folder: Path) -> None:
        """Take what ``write`` wrote. Raises DataError, and changes nothing, where it is of another U-Net."""
        own, saved = (
            self.weights(),
            load_file(folder / (LORA_WEIGHTS if self._training.lora else UNET_WEIGHTS)),
        )
        values = {name.removeprefix("unet."): value for name, value in saved.items()}
        if {name: value.shape for name, value in own.items()} != {
            name: value.shape for name, value in values.items()
        }:
            raise DataError(f"checkpoint {str(folder)!r} belongs to another U-Net, or to other adapters")
        for name, value in own.items():
            value.copy_(parallel.sharded_like(values[name], value))

    def read_average(self, folder: Path, step: int) -> None:
        """Take the running average as it was after ``step`` steps. It passes through the U-Net: read the policy's own after."""
        assert self.ema is not None
        self.read(folder)
        self.ema = EMAModel(self.parameters(), decay=self._training.ema_decay)
        self.ema.optimization_step = step

    def _add_adapters(self, lora: LoraConfig) -> None:
        """A is drawn from the run's seed, B is zero: the policy starts as its reference."""
        config = peft.LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha or lora.rank,
            target_modules=list(lora.targets),
            init_lora_weights="gaussian",
        )
        self.unet.requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._training.seed)
            self.unet.add_adapter(config)


def check_targets(unet: nn.Module, lora: LoraConfig) -> None:
    """Raises ConfigError for a target that is the name of no linear or convolution layer of the U-Net."""
    names = [name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    if idle := lora.unmatched(names):
        raise ConfigError("lora.targets", idle[0], "matches no linear or convolution layer of the U-Net")


def make_optimizer(parameters: list[nn.Parameter], training: TrainConfig) -> torch.optim.Optimizer:
    """AdamW, fused into one kernel, or with its moments in 8 bits. Raises ConfigError where bitsandbytes is not installed."""
    settings: dict[str, Any] = {"lr": training.learning_rate, "weight_decay": training.weight_decay}
    if training.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **settings)
    check_optimizer(training)
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(parameters, **settings)


def learning_rate(training: TrainConfig, step: int) -> float:
    """Linear warm-up to a constant. A function of the step alone."""
    return training.learning_rate * min(1.0, (step + 1) / (training.warmup_steps + 1))


def check_optimizer(training: TrainConfig) -> None:
    """Raises ConfigError for an optimizer whose library is not installed."""
    if training.optimizer == "adamw_8bit" and find_spec("bitsandbytes") is None:
        raise ConfigError(
            "training.optimizer",
            training.optimizer,
            "needs bitsandbytes, which is not installed: pip install 'dde-align[8bit]'",
        )
