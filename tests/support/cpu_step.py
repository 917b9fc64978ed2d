"""One real step of Stable Diffusion 1.5's U-Net, with random weights, on the CPU in float32. Prints JSON.

    python -m tests.support.cpu_step [SIZE]

One pair of SIZE x SIZE latents (default 16), `uniform`, the policy as its own reference; first with
gradient checkpointing, then without. Gradients are allocated from the start, so the two peaks differ by
activations only. It is a process of its own because a process's peak never falls.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from typing import Any

import torch

from dde_core.config import ObjectiveConfig
from dde_core.train_step import check_finite, pair_errors, step_losses
from tests.support.unet_configs import random_pairs, schedule, unet

OBJECTIVE = ObjectiveConfig(method="uniform")


def step(model: Any, batch: Any) -> dict[str, float]:
    """One step. Returns loss, winner's error, gradient norm, seconds, and the process's peak in GB."""
    began = time.monotonic()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.grad.fill_(0.0)  # writes, so that the memory is really allocated
    with torch.no_grad():
        ref = pair_errors(model, schedule(), batch)
    theta = pair_errors(model, schedule(), batch)
    terms = step_losses(theta, ref, batch.t, OBJECTIVE, schedule())
    check_finite("loss", terms.loss)
    terms.loss.mean().backward()
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
    check_finite("gradient", norm)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    numbers = {"loss": terms.loss.item(), "error_w": theta.w.item(), "grad_norm": norm.item()}
    return {**numbers, "seconds": time.monotonic() - began, "peak_gb": peak}


def main(size: int = 16) -> None:
    torch.set_num_threads(1)
    model, batch = unet("sd15", "cpu", seed=0), random_pairs("sd15", 1, "cpu", size=size, seed=0)
    model.enable_gradient_checkpointing()
    checkpointed = step(model, batch)
    model.disable_gradient_checkpointing()
    print(json.dumps({"checkpointed": checkpointed, "kept": step(model, batch)}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
