"""A training run's whole state as a folder: safetensors and JSON, never pickle.

weights/                 what is trained, as diffusers reads it: a U-Net folder, or a file of LoRA adapters
ema/                     the running average in the same form, where one is kept
optimizer.safetensors    Adam's moments and step counts, by parameter number
calibration.safetensors  the four arrays
state.json               steps done, pairs seen
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from dde_core.calibration import Calibration
from dde_core.models.policy import Policy

WEIGHTS, AVERAGE = "weights", "ema"
CALIBRATION, OPTIMIZER = "calibration.safetensors", "optimizer.safetensors"


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
    save_file(dict(_flat(optimizer.state_dict()["state"])), folder / OPTIMIZER)
    save_file(calibration.state_dict(), folder / CALIBRATION)
    (folder / "state.json").write_text(json.dumps(asdict(progress)))


def load(folder: Path, policy: Policy, optimizer: Optimizer, calibration: Calibration) -> Progress:
    """Put the state back into freshly made objects. Raises DataError where the folder belongs to another model."""
    progress = Progress(**json.loads((folder / "state.json").read_text()))
    if policy.ema:
        policy.load_average(folder / AVERAGE, progress.step)
    policy.load_weights(folder / WEIGHTS)
    states = _nested(load_file(folder / OPTIMIZER))
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
    calibration.load_state_dict(load_file(folder / CALIBRATION))
    return progress


def _flat(state: dict, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """An optimizer's state as named tensors: "0/exp_avg". Whole numbers become int64 scalars.

    8-bit Adam nests deeper, and its parameters share their tables of 256 values (qmap), which safetensors wants apart.
    """
    for name, value in state.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}/")
        elif isinstance(value, Tensor):
            yield f"{prefix}{name}", value.clone() if str(name).startswith("qmap") else value.contiguous()
        else:
            yield f"{prefix}{name}", torch.tensor(value)


def _nested(tensors: dict[str, Tensor]) -> dict[int, dict]:
    """The inverse of ``_flat``."""
    states: dict[int, dict] = {}
    for key, value in tensors.items():
        number, *path, name = key.split("/")
        state = states.setdefault(int(number), {})
        for part in path:
            state = state.setdefault(part, {})
        state[name] = int(value) if value.dtype == torch.int64 else value
    return states


def model_weights(folder: Path) -> Path:
    """Where the weights lie that become the model: the average where one was kept, else the last ones."""
    return folder / AVERAGE if (folder / AVERAGE).is_dir() else folder / WEIGHTS
