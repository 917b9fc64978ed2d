"""A training run's state as a folder of safetensors and JSON, never pickle.

weights/                 the trained weights in diffusers' format: a U-Net folder, or a file of LoRA adapters
ema/                     their running average in the same format, if the run has one
optimizer.safetensors    Adam's moments and step counts, by parameter number
calibration.safetensors  the four arrays
state.json               steps done, pairs seen
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from dde_core.calibration import Calibration
from dde_core.models.parallel import full_tensor, sharded_like
from dde_core.models.policy import Policy
from dde_core.train_step import check_finite

WEIGHTS = "weights"
AVERAGE = "ema"
OPTIMIZER = "optimizer.safetensors"
CALIBRATION = "calibration.safetensors"
STATE = "state.json"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is. The reader's position and every random draw follow from ``step``. ``images_seen``
    counts images that went through the U-Net: two for each pair, one for `sft`."""

    step: int
    pairs_seen: int
    images_seen: int


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A run's state after a step, copied to the host's memory, so that training continues while it is
    written."""

    weights: dict[str, Tensor]
    average: dict[str, Tensor] | None
    optimizer: dict[str, Tensor]
    calibration: dict[str, Tensor]
    progress: Progress

    def write(self, folder: Path, policy: Policy) -> None:
        """Write into an existing folder. ``policy`` provides the file format only; its own weights are not
        read.

        Raises OSError if the disk fails.
        """
        try:
            policy.write(self.weights, folder / WEIGHTS)
            if self.average is not None:
                policy.write(self.average, folder / AVERAGE)
            save_file(self.optimizer, folder / OPTIMIZER)
            save_file(self.calibration, folder / CALIBRATION)
        except SafetensorError as error:
            # SafetensorError carries the operating system's error number in its text alone.
            number = re.search(r"\(os error (\d+)\)", str(error))
            raise OSError(int(number[1]) if number else None, str(error), str(folder)) from error
        (folder / STATE).write_text(json.dumps(asdict(self.progress)))


def snapshot(
    policy: Policy, optimizer: Optimizer, calibration: Calibration, progress: Progress, rank: int
) -> Snapshot | None:
    """Copy the state. A collective (shards are gathered): every worker must call it. Rank 0 gets it, others
    None.

    Raises NonFiniteError, on every worker, for infinite or NaN values: no run could continue from them.
    """
    weights = weights_on_host(policy, rank)
    average = None
    if policy.ema:
        with policy.averaged():
            average = _copy_to_host(policy.weights(), rank)
    moments = _copy_to_host(dict(_flatten(optimizer.state_dict()["state"])), rank)
    if rank != 0:
        return None
    return Snapshot(weights, average, moments, calibration.state_dict(), progress)


def weights_on_host(policy: Policy, rank: int) -> dict[str, Tensor]:
    """A copy of the policy's full weights for rank 0; others get none. A collective, as ``snapshot`` is."""
    return _copy_to_host(policy.weights(), rank)


def _copy_to_host(tensors: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Full, finite tensors on the host, contiguous, in memory of their own. Empty on ranks other than 0."""
    copies = {}
    for name, tensor in tensors.items():
        full = full_tensor(tensor)
        check_finite(f"the state to store: {name}", full)
        if rank == 0:
            copies[name] = full.detach().to("cpu", copy=True).contiguous()
    return copies


def load(folder: Path, policy: Policy, optimizer: Optimizer, calibration: Calibration) -> Progress:
    """Restore the state into newly made objects. Raises DataError for a checkpoint of another model."""
    progress = Progress(**json.loads((folder / STATE).read_text()))
    if policy.ema:
        policy.read_average(folder / AVERAGE, progress.step)
    policy.read(folder / WEIGHTS)
    states = _nest(load_file(folder / OPTIMIZER))
    for number, parameter in enumerate(policy.parameters()):
        state = states[number]
        for name, value in state.items():
            if isinstance(value, Tensor) and value.dim() and value.shape == parameter.shape:
                state[name] = sharded_like(value, parameter)
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
    calibration.load_state_dict(load_file(folder / CALIBRATION))
    return progress


def _flatten(state: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """An optimizer's state as named tensors: "0/exp_avg". Integers become int64 scalars. 8-bit Adam nests
    deeper."""
    for name, value in state.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}/")
        elif isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        else:
            yield f"{prefix}{name}", torch.tensor(value)


def _nest(tensors: dict[str, Tensor]) -> dict[int, dict[str, Any]]:
    """The inverse of ``_flatten``."""
    states: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        number, *path, name = key.split("/")
        state = states.setdefault(int(number), {})
        for part in path:
            state = state.setdefault(part, {})
        state[name] = int(value) if value.dtype == torch.int64 else value
    return states


def model_weights(folder: Path) -> Path:
    """The path of the weights that become the model: the average if the run has one, else the last
    weights."""
    average = folder / AVERAGE
    return average if average.is_dir() else folder / WEIGHTS
