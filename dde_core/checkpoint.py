"""A training run's whole state as a folder: safetensors and JSON, never pickle.

weights/                 what is trained, as diffusers reads it: a U-Net folder, or a file of LoRA adapters
ema/                     the running average in the same form, where one is kept
optimizer.safetensors    Adam's moments and step counts, by parameter number
calibration.safetensors  the four arrays
state.json               steps done, pairs seen
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch.optim import Optimizer

from dde_core.calibration import Calibration
from dde_core.models.policy import Policy

WEIGHTS, AVERAGE = "weights", "ema"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run is. The reader's position and every random draw follow from ``step``."""

    step: int
    pairs_seen: int


def save(folder: Path, policy: Policy, optimizer: Optimizer, calibration: Calibration, progress: Progress) -> None:
    """Write the state into an existing folder."""
    policy.save_weights(folder / WEIGHTS)
    if policy.ema:
        with policy.averaged():
            policy.save_weights(folder / AVERAGE)
    states = optimizer.state_dict()["state"]
    moments = {f"{i}.{name}": value.contiguous() for i, state in states.items() for name, value in state.items()}
    save_file(moments, folder / "optimizer.safetensors")
    save_file(calibration.state_dict(), folder / "calibration.safetensors")
    (folder / "state.json").write_text(json.dumps(asdict(progress)))


def load(folder: Path, policy: Policy, optimizer: Optimizer, calibration: Calibration) -> Progress:
    """Put the state back into freshly made objects. Raises DataError where the folder belongs to another model."""
    progress = Progress(**json.loads((folder / "state.json").read_text()))
    if policy.ema:
        policy.load_average(folder / AVERAGE, progress.step)
    policy.load_weights(folder / WEIGHTS)
    states: dict[int, dict] = {}
    for key, value in load_file(folder / "optimizer.safetensors").items():
        number, name = key.split(".", 1)
        states.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
    calibration.load_state_dict(load_file(folder / "calibration.safetensors"))
    return progress


def model_weights(folder: Path) -> Path:
    """Where the weights lie that become the model: the average where one was kept, else the last ones."""
    return folder / AVERAGE if (folder / AVERAGE).is_dir() else folder / WEIGHTS
