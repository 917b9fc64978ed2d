"""A training run's whole state as a folder: safetensors and JSON, never pickle.

unet/                    the policy, as diffusers writes it
optimizer.safetensors    Adam's moments and step counts, by parameter number
calibration.safetensors  the four arrays
state.json               steps done, pairs seen
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from dde_core.calibration import Calibration
from dde_core.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run is. The reader's position and every random draw follow from ``step``."""

    step: int
    pairs_seen: int


def save(folder: Path, unet: UNet2DConditionModel, optimizer: Optimizer, calibration: Calibration, progress: Progress) -> None:
    """Write the state into an existing folder."""
    unet.save_pretrained(folder / "unet")
    states = optimizer.state_dict()["state"]
    moments = {f"{i}.{name}": value.contiguous() for i, state in states.items() for name, value in state.items()}
    save_file(moments, folder / "optimizer.safetensors")
    save_file(calibration.state_dict(), folder / "calibration.safetensors")
    (folder / "state.json").write_text(json.dumps(asdict(progress)))


def load(folder: Path, unet: UNet2DConditionModel, optimizer: Optimizer, calibration: Calibration) -> Progress:
    """Put the state back into freshly made objects. Raises DataError where the folder belongs to another model."""
    weights = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    if _shapes(weights) != _shapes(unet.state_dict()):
        raise DataError(f"checkpoint {str(folder)!r} belongs to another U-Net")
    unet.load_state_dict(weights)
    states: dict[int, dict] = {}
    for key, value in load_file(folder / "optimizer.safetensors").items():
        number, name = key.split(".", 1)
        states.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
    calibration.load_state_dict(load_file(folder / "calibration.safetensors"))
    return Progress(**json.loads((folder / "state.json").read_text()))


def _shapes(weights: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in weights.items()}
