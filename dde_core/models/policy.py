"""The U-Net that is trained, whole or by LoRA adapters, and the frozen reference that it is compared with."""

from __future__ import annotations

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
from diffusers.utils import convert_state_dict_to_diffusers, convert_unet_state_dict_to_peft
from safetensors.torch import load_file
from torch import nn

from dde_core.config import LoraConfig, TrainConfig
from dde_core.errors import ConfigError, DataError
from dde_core.models.folder import LORA_WEIGHTS, ModelFolder

UNET_WEIGHTS = "diffusion_pytorch_model.safetensors"
ONE_FILE = "1TB"


def use_repeatable_kernels() -> None:
    """One thread and deterministic kernels in this process: the same batch gives the same numbers, to the bit.

    Precision "fp32" is float32 on every device: a GPU's TF32 has 10 bits of mantissa, and torch takes it for convolutions.
    """
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS refuses deterministic algorithms without it


class Policy:
    """``unet`` is what a training loop wraps and steps. Raises ConfigError for adapters that fit nowhere."""

    def __init__(self, folder: ModelFolder, training: TrainConfig, device: torch.device | str = "cpu") -> None:
        self._folder, self._training, self.device = folder, training, torch.device(device)
        self.unet = folder.unet()
        if training.lora:
            check_targets(self.unet, training.lora)
            self._add_adapters(training.lora)
        self.unet.to(device)
        if training.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.ema = EMAModel(self.parameters(), decay=training.ema_decay) if training.ema_decay else None

    def parameters(self) -> list[nn.Parameter]:
        """What is trained, in a fixed order."""
        return [parameter for parameter in self.unet.parameters() if parameter.requires_grad]

    @torch.no_grad()
    def reference(self, *args: Any, **kwargs: Any) -> Any:
        """The frozen model's output: for LoRA the same U-Net with its adapters off, else a copy that was kept."""
        if not self._training.lora:
            return self._kept(*args, **kwargs)
        self.unet.disable_adapters()
        try:
            return self.unet(*args, **kwargs)
        finally:
            self.unet.enable_adapters()

    @cached_property
    def _kept(self) -> UNet2DConditionModel:
        """Loaded when it is first asked for: `sft`, and a run on a ledger, train without it."""
        return self._folder.unet().requires_grad_(False).to(self.device)

    def arithmetic(self) -> AbstractContextManager:
        """Run the U-Net under this. bf16 is autocast: weights stay float32, and so do errors and losses."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._training.precision == "bf16")

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """With the running average of the weights in place of the last ones, where one is kept."""
        if self.ema is None:
            yield
            return
        self.ema.store(self.parameters())
        self.ema.copy_to(self.parameters())
        try:
            yield
        finally:
            self.ema.restore(self.parameters())

    def save_weights(self, folder: Path) -> None:
        """Write what was trained as diffusers reads it: a U-Net folder, or a file of LoRA adapters."""
        lora = self._training.lora
        if lora is None:
            self.unet.save_pretrained(folder, max_shard_size=ONE_FILE)
            return
        StableDiffusionPipeline.save_lora_weights(
            folder,
            unet_lora_layers=convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(self.unet)),
            unet_lora_adapter_metadata=self.unet.peft_config["default"].to_dict(),
        )

    def load_weights(self, folder: Path) -> None:
        """Read what ``save_weights`` wrote. Raises DataError, and changes nothing, where it is of another U-Net."""
        if self._training.lora:
            saved = load_file(folder / LORA_WEIGHTS)
            own = convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(self.unet))
            values = {name.removeprefix("unet."): value for name, value in saved.items()}
            self._refuse_other(own, values, folder)
            peft.set_peft_model_state_dict(self.unet, convert_unet_state_dict_to_peft(values))
        else:
            values = load_file(folder / UNET_WEIGHTS)
            self._refuse_other(self.unet.state_dict(), values, folder)
            self.unet.load_state_dict(values)

    def load_average(self, folder: Path, step: int) -> None:
        """Read the running average as it was after ``step`` steps. It passes through the U-Net: load the policy's own after."""
        assert self.ema is not None
        self.load_weights(folder)
        self.ema = EMAModel(self.parameters(), decay=self._training.ema_decay)
        self.ema.optimization_step = step

    @staticmethod
    def _refuse_other(own: dict[str, torch.Tensor], values: dict[str, torch.Tensor], folder: Path) -> None:
        if {name: value.shape for name, value in own.items()} != {name: value.shape for name, value in values.items()}:
            raise DataError(f"checkpoint {str(folder)!r} belongs to another U-Net, or to other adapters")

    def _add_adapters(self, lora: LoraConfig) -> None:
        """A is drawn from the run's seed, B is zero: the policy starts as its reference."""
        config = peft.LoraConfig(
            r=lora.rank, lora_alpha=lora.alpha or lora.rank, target_modules=list(lora.targets), init_lora_weights="gaussian"
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
    """AdamW (fused on a GPU), or with its moments in 8 bits. Raises ConfigError where bitsandbytes is not installed."""
    settings: dict[str, Any] = {"lr": training.learning_rate, "weight_decay": training.weight_decay}
    if training.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=parameters[0].is_cuda, **settings)
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
