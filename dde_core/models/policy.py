"""The trained U-Net, in full or by LoRA adapters, and the frozen reference that it is compared with."""

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
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.optimization import Adafactor

from dde_core.config import LoraConfig, TrainConfig
from dde_core.errors import ConfigError, DataError
from dde_core.methods import MethodName
from dde_core.models import parallel
from dde_core.models.folder import ModelFolder
from dde_core.models.lora_file import read_lora

UNET_WEIGHTS = "diffusion_pytorch_model.safetensors"


def use_deterministic_kernels() -> None:
    """Use one thread and deterministic kernels in this process, so that equal batches give bit-identical
    numbers.

    TF32 is switched off: its mantissa has 10 bits, torch uses it for convolutions, and precision "fp32" means
    float32.
    """
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    # An extra write that changes no result.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    # cuBLAS refuses deterministic algorithms without it.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


class Policy:
    """``unet`` is the model; ``trained`` is what a training loop calls: the same model, wrapped for several
    workers.

    With ``world_size`` > 1 torch.distributed must be initialized; ``training`` and the needs of ``method``
    then decide how the workers hold the model. Raises ConfigError for adapters that fit nowhere.
    """

    def __init__(
        self,
        folder: ModelFolder,
        training: TrainConfig,
        device: torch.device | str = "cpu",
        world_size: int = 1,
        method: MethodName = "dde",
    ) -> None:
        self._folder = folder
        self._training = training
        self.device = torch.device(device)
        self._world_size = world_size
        self.unet = folder.unet()
        if training.lora:
            check_targets(self.unet, training.lora)
            self._add_adapters(training.lora)
        if training.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.parallelism = parallel.choose(method, training, self.unet, self.device, world_size)
        self._place(self.unet)
        self._trained_parameters = [each for each in self.unet.parameters() if each.requires_grad]
        self._adapted = [module for module in self.unet.modules() if isinstance(module, BaseTunerLayer)]
        self.trained = parallel.wrap(self.unet, self.parallelism, self.device)
        self.ema = EMAModel(self.parameters(), decay=training.ema_decay) if training.ema_decay else None

    def _place(self, unet: UNet2DConditionModel) -> None:
        """Move the U-Net to the device, in full or as this worker's shard."""
        if self.parallelism == "fsdp":
            parallel.shard(unet, self.device, self._world_size)
        else:
            unet.to(self.device)
        if self._training.compile:
            unet.compile()

    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters in a fixed order. Under FSDP2 these are this worker's shards at all
        times."""
        return self._trained_parameters

    @torch.no_grad()
    def reference(self, *args: Any, **kwargs: Any) -> Any:
        """The frozen model's output: with LoRA the same U-Net without its adapters, else a frozen copy."""
        if not self._training.lora:
            return self._frozen_copy(*args, **kwargs)
        self._set_adapters(enabled=False)
        try:
            return self.unet(*args, **kwargs)
        finally:
            self._set_adapters(enabled=True)

    def _set_adapters(self, *, enabled: bool) -> None:
        """Unlike peft's own switch, this leaves requires_grad alone: FSDP2 may hold other tensors at this
        moment."""
        for layer in self._adapted:
            layer._disable_adapters = not enabled

    @cached_property
    def _frozen_copy(self) -> UNet2DConditionModel:
        """Loaded at its first use: `sft`, and a run on a ledger, train without it."""
        unet = self._folder.unet().requires_grad_(False)
        self._place(unet)
        return unet

    def autocast(self) -> AbstractContextManager[Any]:
        """The context to run the U-Net in. bf16 is autocast: weights, errors and losses stay float32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._training.precision == "bf16")

    def clip_gradients(self) -> torch.Tensor:
        """Scale all gradients down together to a norm of at most ``max_grad_norm``. Returns the norm before
        that."""
        return parallel.full_tensor(nn.utils.clip_grad_norm_(self.parameters(), self._training.max_grad_norm))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Run with the running average of the weights in place of the last ones, if the run has one."""
        self._swap_average()
        try:
            yield
        finally:
            self._swap_average()

    @torch.no_grad()
    def _swap_average(self) -> None:
        """Swap weights and average, one tensor at a time."""
        if self.ema is None:
            return
        for parameter, average in zip(self.parameters(), self.ema.shadow_params, strict=True):
            weights = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(weights)

    def weights(self) -> dict[str, torch.Tensor]:
        """The trained tensors of this worker (not copies), by their names in diffusers' files."""
        weights: dict[str, torch.Tensor]
        if self._training.lora:
            weights = peft.get_peft_model_state_dict(self.unet)
        else:
            weights = self.unet.state_dict()
        return weights

    def write(self, weights: dict[str, torch.Tensor], folder: Path) -> None:
        """Write a copy of ``weights()`` in diffusers' format: a U-Net folder, or a file of LoRA adapters."""
        if not self._training.lora:
            folder.mkdir(parents=True, exist_ok=True)
            # FSDP2 changes the module's class; diffusers could not load that name.
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
        """Load what ``write`` wrote. Raises DataError before a change if names or shapes are of another
        U-Net."""
        weights = self.weights()
        saved = read_lora(folder)[0] if self._training.lora else load_file(folder / UNET_WEIGHTS)
        values = {name.removeprefix("unet."): value for name, value in saved.items()}
        shapes = {name: value.shape for name, value in weights.items()}
        if shapes != {name: value.shape for name, value in values.items()}:
            raise DataError(f"checkpoint {str(folder)!r} belongs to another U-Net, or to other adapters")
        for name, value in weights.items():
            value.copy_(parallel.sharded_like(values[name], value))

    def read_average(self, folder: Path, step: int) -> None:
        """Load the running average after ``step`` steps. This overwrites the U-Net's weights: call ``read``
        after it."""
        assert self.ema is not None
        self.read(folder)
        self.ema = EMAModel(self.parameters(), decay=self._training.ema_decay)
        self.ema.optimization_step = step

    def _add_adapters(self, lora: LoraConfig) -> None:
        """Add adapters with A drawn from the run's seed and B = 0: the policy starts equal to its
        reference."""
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
    """Raises ConfigError for a target that matches no linear or convolution layer of the U-Net."""
    names = [name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    unmatched = lora.unmatched(names)
    if unmatched:
        raise ConfigError("lora.targets", unmatched[0], "matches no linear or convolution layer of the U-Net")


def make_optimizer(parameters: list[nn.Parameter], training: TrainConfig) -> torch.optim.Optimizer:
    """Fused AdamW, AdamW with 8-bit moments, or Adafactor at the learning rate that is configured.

    Raises ConfigError if 8-bit moments need bitsandbytes and it is missing.
    """
    settings: dict[str, Any] = {"lr": training.learning_rate, "weight_decay": training.weight_decay}
    if training.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **settings)
    optimizer: torch.optim.Optimizer
    if training.optimizer == "adafactor":
        optimizer = Adafactor(
            parameters, scale_parameter=False, relative_step=False, warmup_init=False, **settings
        )
        return optimizer
    check_optimizer(training)
    import bitsandbytes

    make_8bit: Any = bitsandbytes.optim.AdamW8bit  # type: ignore[attr-defined]  # the library has no types
    optimizer = make_8bit(parameters, **settings)
    return optimizer


def learning_rate(training: TrainConfig, step: int) -> float:
    """The learning rate at ``step`` (from 0): linear warm-up, then constant."""
    return training.learning_rate * min(1.0, (step + 1) / (training.warmup_steps + 1))


def check_optimizer(training: TrainConfig) -> None:
    """Raises ConfigError for an optimizer whose library is not installed."""
    if training.optimizer == "adamw_8bit" and find_spec("bitsandbytes") is None:
        raise ConfigError(
            "training.optimizer",
            training.optimizer,
            "needs bitsandbytes, which is not installed: pip install 'dde-align[8bit]'",
        )
