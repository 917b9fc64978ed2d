"""Laws that must hold on an accelerator as they do on the CPU: dde_core alone.

    python -m tests.bench.gpu_laws --out results.json
    python -m tests.bench.gpu_laws --device cpu --model tiny

Each law compares two ways to one number and states the largest deviation that it allows. Every law runs, whatever the others
gave; the exit code is 1 if one failed. Results: {"law, <name>": {"value": deviation, "against": "at most <bound>, ..."}}.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pyarrow import fs
from torch import Tensor

from dde_core.batches import BatchMaker, slices
from dde_core.config import ObjectiveConfig, SampleConfig, TrainConfig
from dde_core.generation import TextToImage
from dde_core.latents.ledger import Ledger
from dde_core.latents.reader import LatentReader
from dde_core.models.folder import ModelFolder
from dde_core.models.policy import Policy, use_deterministic_kernels
from dde_core.objectives import OBJECTIVES
from dde_core.schedule import Schedule, add_noise, epsilon_from, x0_from
from dde_core.shapes import MODEL_DIR
from dde_core.train_step import PairErrors, pair_errors, step_losses
from tests.bench.gpu_speed import OBJECTIVE, Ours
from tests.bench.gpu_step import machine_of, tell
from tests.bench.measure import result
from tests.bench.random_folder import RandomFolder, write_ledger, write_shard_of
from tests.support.unet_configs import SCHEDULER, random_pairs, schedule, unet

CPU = torch.device("cpu")


class Laws:
    """Each method named in ``ALL`` returns its deviation. ``model`` is the one whose ledger and run are compared."""

    def __init__(self, device: torch.device, model: str) -> None:
        self.device, self.model = device, model

    def schedule_tables(self) -> float:
        """alpha_bar, SNR and kappa."""
        here, there = schedule(CPU), schedule(self.device)
        names = ("alpha_bar", "snr", "kappa")
        return max(deviation(getattr(there, name)[2:], getattr(here, name)[2:]) for name in names)

    def noising(self) -> float:
        """x_t, and eps and x0 from an output, for both kinds of prediction, in float32."""
        worst = 0.0
        x0, noise, output = (
            torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)
        )
        t = torch.linspace(1, 1000, 64).round().long()
        for prediction_type in ("epsilon", "v_prediction"):
            here = Schedule.from_config(SCHEDULER | {"prediction_type": prediction_type})
            there = here.to(self.device)
            x_t = add_noise(here, x0, noise, t)
            worst = max(worst, deviation(add_noise(there, *self._moved(x0, noise, t)), x_t))
            for convert in (epsilon_from, x0_from):
                worst = max(
                    worst,
                    deviation(convert(there, *self._moved(output, x_t, t)), convert(here, output, x_t, t)),
                )
        return worst

    def losses(self) -> float:
        """Loss and gradient weight of every method."""
        worst, b = 0.0, 256
        t = torch.linspace(1, 1000, b).round().long()
        w, loser, w_ref, l_ref, correction = torch.rand(5, b, generator=torch.Generator().manual_seed(0))
        for method in OBJECTIVES:
            config = ObjectiveConfig(method=method)
            here = step_losses(
                PairErrors(w, loser), PairErrors(w_ref, l_ref), t, config, schedule(CPU), correction
            )
            moved = self._moved(w, loser, w_ref, l_ref, t, correction)
            theta, ref = PairErrors(*moved[:2]), PairErrors(*moved[2:4])
            there = step_losses(theta, ref, moved[4], config, schedule(self.device), moved[5])
            pairs = [(there.loss, here.loss), (there.gradient_weight, here.gradient_weight)]
            worst = max(worst, *(deviation(a, b) for a, b in pairs))
        return worst

    def gradient(self) -> float:
        """Relative L2 distance of a float32 U-Net's gradient from the CPU's."""
        flat = []
        for device in (CPU, self.device):
            model, pairs = unet("tiny", CPU, seed=0).to(device), random_pairs("tiny", 8, CPU, seed=1)
            terms = pair_errors(model, schedule(device), on(pairs, device))
            (terms.w - terms.l).sum().backward()
            flat.append(
                torch.cat([p.grad.flatten().double().cpu() for p in model.parameters() if p.grad is not None])
            )
        return float((flat[1] - flat[0]).norm() / flat[0].norm())

    def images(self) -> float:
        """Levels of 255 between images of the shapes model, prompt and seed for prompt and seed, in float32."""
        prompts, seeds = ["a small red star at the left", "a large blue circle"], [0, 1]
        config = SampleConfig(steps=10)
        drawn = [
            TextToImage(ModelFolder(str(MODEL_DIR)), device)(prompts, seeds, config)
            for device in (CPU, self.device)
        ]
        return float(np.abs(drawn[0].astype(int) - drawn[1].astype(int)).max())

    def ledger(self) -> float:
        """Stored errors of the reference against online ones in the same batch shape, bf16."""
        return self._ledger_against_online(micro=4)

    def ledger_other_shape(self) -> float:
        """The same in another batch shape: rounding alone is left, the reason why a ledger's key names the precision."""
        return self._ledger_against_online(micro=3)

    def _ledger_against_online(self, micro: int) -> float:
        written = TrainConfig(
            steps=1, batch_size=12, micro_batch_size=4, draws=1, precision="bf16", reference="ledger"
        )
        online = dataclasses.replace(written, micro_batch_size=micro)
        with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
            folder, data = RandomFolder(self.model, self.device), Path(scratch)
            write_shard_of(folder, data, ["a red circle"] * 12)
            stored = Ledger(
                fs.LocalFileSystem(),
                str(write_ledger(folder, data, OBJECTIVE, written, self.device)),
                self.device,
            )
            worst, policy = 0.0, Policy(folder, online, self.device)
            with LatentReader(fs.LocalFileSystem(), scratch) as reader:
                maker = BatchMaker(reader, folder, folder.schedule(), OBJECTIVE, online, self.device)
                for part in slices(reader.shard(0), micro):
                    batch = maker.make(part)
                    with policy.autocast():
                        now = pair_errors(policy.unet, schedule(self.device), batch)
                    then = stored.errors(part)
                    worst = max(worst, deviation(now.w, then.w), deviation(now.l, then.l))
        return worst

    def repeated_run(self) -> float:
        """Weights of a run of three bf16 steps against those of the same run again."""
        training = TrainConfig(
            steps=3, batch_size=4, micro_batch_size=2, draws=1, learning_rate=1e-4, precision="bf16", reference="ledger",
            gradient_checkpointing=True,
        )  # fmt: skip
        found = []
        with tempfile.TemporaryDirectory() as scratch:
            folder, data = RandomFolder(self.model, self.device), Path(scratch)
            write_shard_of(folder, data, [f"a red circle {i}" for i in range(8)])
            record = write_ledger(folder, data, OBJECTIVE, training, self.device)
            for _ in range(2):
                made = Ours(folder, training, self.device, data, record)
                with made.reader:
                    losses = [made.step()["loss"] for _ in range(3)]
                parameters = made._policy.parameters()
                found.append((losses, torch.cat([p.detach().flatten().cpu() for p in parameters])))
                del made, parameters
        assert found[0][0][0] != found[0][0][2], "three steps change the loss"
        return deviation(found[1][1], found[0][1])

    def _moved(self, *tensors: Tensor) -> list[Tensor]:
        return [tensor.to(self.device) for tensor in tensors]


ALL: dict[str, tuple[Callable[[Laws], float], float, str]] = {
    "schedule tables": (Laws.schedule_tables, 0.0, "the CPU's, relative"),
    "noising and predictions, float32": (Laws.noising, 1e-5, "the CPU's, relative to the largest"),
    "losses and gradient weights, every method": (Laws.losses, 1e-12, "the CPU's, relative to the largest"),
    "gradient, float32": (Laws.gradient, 1e-4, "the CPU's, relative L2"),
    "images of the shapes model, float32": (Laws.images, 1.0, "the CPU's, levels of 255"),
    "ledger against online, bf16, one batch shape": (Laws.ledger, 0.0, "online, relative to the largest"),
    "ledger against online, bf16, another batch shape": (
        Laws.ledger_other_shape,
        0.02,
        "online, relative to the largest",
    ),
    "a run of three bf16 steps, twice": (Laws.repeated_run, 0.0, "the first, relative to the largest weight"),
}
"""Name: the law, its bound, what the deviation is from."""


def deviation(found: Tensor, expected: Tensor) -> float:
    """Largest absolute difference, over the largest absolute value expected. inf where something is not finite."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    if not (torch.isfinite(found).all() and torch.isfinite(expected).all()):
        return float("inf")
    return float((found - expected).abs().max() / expected.abs().max())


def on(batch: Any, device: torch.device) -> Any:
    """A PairBatch with its tensors on a device."""

    def moved(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: tensor.to(device) for name, tensor in value.items()}
        return value.to(device) if isinstance(value, Tensor) else value

    return dataclasses.replace(batch, **{name: moved(value) for name, value in vars(batch).items()})


def main(arguments: list[str] | None = None) -> int:
    """Run every law, print and merge what each gave, and say how many failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", default="sd15", help="whose ledger and run are compared")
    parser.add_argument("--out", type=Path, help="JSON file that the results are merged into")
    options = parser.parse_args(arguments)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before the GPU is first used
    use_deterministic_kernels()
    laws, failed = Laws(torch.device(options.device), options.model), 0
    for name, (law, bound, against) in ALL.items():
        try:
            value = law(laws)
        except Exception:
            traceback.print_exc()
            value = float("nan")
        holds = value <= bound
        failed += not holds
        print(f"{'holds' if holds else 'FAILS'}: {name}: {value:.3g}, at most {bound:g}", flush=True)
        row = {**result(None, value, "", f"at most {bound:g}: {against}"), "machine": machine_of(laws.device)}
        tell({f"law, {name}": row}, options.out)
    print(f"{len(ALL) - failed} passed, {failed} failed", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
