"""A training run's whole state as a folder: safetensors and JSON, never pickle.

weights/                 what is trained, as diffusers reads it: a U-Net folder, or a file of LoRA adapters
ema/                     the running average in the same form, where one is kept
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

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from dde_core.calibration import Calibration
from dde_core.models.parallel import like, whole
from dde_core.models.policy import Policy

WEIGHTS, AVERAGE = "weights", "ema"
CALIBRATION, OPTIMIZER = "calibration.safetensors", "optimizer.safetensors"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run is. The reader's position and every random draw follow from ``step``. ``images_seen`` counts pictures
    that went through the U-Net: two a pair, one for `sft`."""

    step: int
    pairs_seen: int
    images_seen: int


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A run's state after a step, copied to the host's memory: training goes on while it is written."""

    weights: dict[str, Tensor]
    average: dict[str, Tensor] | None
    optimizer: dict[str, Tensor]
    calibration: dict[str, Tensor]
    progress: Progress

    def write(self, folder: Path, policy: Policy) -> None:
        """Into an existing folder. ``policy`` says which form the weights' files have; its own are not read.

        Raises OSError where the disk does not take it.
        """
        try:
            policy.write(self.weights, folder / WEIGHTS)
            if self.average is not None:
                policy.write(self.average, folder / AVERAGE)
            save_file(self.optimizer, folder / OPTIMIZER)
            save_file(self.calibration, folder / CALIBRATION)
        except SafetensorError as error:
            found = re.search(r"\(os error (\d+)\)", str(error))
            raise OSError(int(found[1]) if found else None, str(error), str(folder)) from error
        (folder / "state.json").write_text(json.dumps(asdict(self.progress)))


def snapshot(
    policy: Policy, optimizer: Optimizer, calibration: Calibration, progress: Progress, rank: int
) -> Snapshot | None:
    """Copy the state. Every worker must ask, since shares are gathered; rank 0 gets it, the others None."""
    weights, average = _copied(policy.weights(), rank), None
    if policy.ema:
        with policy.averaged():
            average = _copied(policy.weights(), rank)
    moments = _copied(dict(_flat(optimizer.state_dict()["state"])), rank)
    if rank != 0:
        return None
    return Snapshot(weights, average, moments, calibration.state_dict(), progress)


def _copied(tensors: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Whole tensors on the host, contiguous and with memory of their own. Empty on other ranks than 0."""
    copies = {}
    for name, tensor in tensors.items():
        everything = whole(tensor)
        if rank == 0:
            copies[name] = everything.detach().to("cpu", copy=True).contiguous()
    return copies


def load(folder: Path, policy: Policy, optimizer: Optimizer, calibration: Calibration) -> Progress:
    """Put the state back into freshly made objects. Raises DataError where the folder belongs to another model."""
    progress = Progress(**json.loads((folder / "state.json").read_text()))
    if policy.ema:
        policy.read_average(folder / AVERAGE, progress.step)
    policy.read(folder / WEIGHTS)
    states = _nested(load_file(folder / OPTIMIZER))
    for number, parameter in enumerate(policy.parameters()):
        moments = {
            name: value for name, value in states[number].items() if isinstance(value, Tensor) and value.dim()
        }
        states[number] |= {
            name: like(value, parameter) for name, value in moments.items() if value.shape == parameter.shape
        }
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
    calibration.load_state_dict(load_file(folder / CALIBRATION))
    return progress


def _flat(state: dict, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """An optimizer's state as named tensors: "0/exp_avg". Whole numbers become int64 scalars. 8-bit Adam nests deeper."""
    for name, value in state.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}/")
        elif isinstance(value, Tensor):
            yield f"{prefix}{name}", value
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
