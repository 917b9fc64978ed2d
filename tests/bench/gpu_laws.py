"""Laws that must hold on an accelerator as they do on the CPU: dde_core alone.

    python -m tests.bench.gpu_laws --out results.json
    python -m tests.bench.gpu_laws --device cpu --model tiny

Each law computes one quantity in two ways and bounds their deviation. All laws run, even if one fails; the
exit code is then 1. Results: {"law, <name>": {"value": deviation, "against": "at most <bound>: ..."}}.
"""

from __future__ import annotations

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
from dde_core.schedule import Schedule, add_noise, epsilon_from, x0_from
from dde_core.shapes import MODEL_DIR
from dde_core.train_step import PairBatch, PairErrors, pair_errors, step_losses
from tests.bench.gpu_speed import OBJECTIVE, Ours
from tests.bench.gpu_step import gpu_parser, machine_of, record_results
from tests.bench.measure import result
from tests.bench.random_folder import RandomFolder, write_ledger, write_shard_of
from tests.support.methods import OF_DATASETS
from tests.support.unet_configs import SCHEDULER, random_pairs, schedule, unet

CPU = torch.device("cpu")


class Laws:
    """The methods listed in ``ALL`` return their deviations. ``model`` is used for the ledger and the run."""

    def __init__(self, device: torch.device, model: str) -> None:
        self.device = device
        self.model = model

    def schedule_tables(self) -> float:
        """alpha_bar, SNR and kappa."""
        on_cpu = schedule(CPU)
        on_device = schedule(self.device)
        names = ("alpha_bar", "snr", "kappa")
        return max(deviation(getattr(on_device, name)[2:], getattr(on_cpu, name)[2:]) for name in names)

    def noising(self) -> float:
        """x_t, and eps and x0 from a model's output, for both prediction types, in float32."""
        worst = 0.0
        x0, noise, output = (
            torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)
        )
        t = torch.linspace(1, 1000, 64).round().long()
        for prediction_type in ("epsilon", "v_prediction"):
            on_cpu = Schedule.from_config(SCHEDULER | {"prediction_type": prediction_type})
            on_device = on_cpu.to(self.device)
            x_t = add_noise(on_cpu, x0, noise, t)
            worst = max(worst, deviation(add_noise(on_device, *self._moved(x0, noise, t)), x_t))
            for convert in (epsilon_from, x0_from):
                expected = convert(on_cpu, output, x_t, t)
                found = convert(on_device, *self._moved(output, x_t, t))
                worst = max(worst, deviation(found, expected))
        return worst

    def losses(self) -> float:
        """Loss and gradient weight of every method that trains on a dataset."""
        worst = 0.0
        b = 256
        t = torch.linspace(1, 1000, b).round().long()
        w, loser, w_ref, l_ref, correction = torch.rand(5, b, generator=torch.Generator().manual_seed(0))
        for method in OF_DATASETS:
            config = ObjectiveConfig(method=method)
            errors = PairErrors(w, loser), PairErrors(w_ref, l_ref)
            on_cpu = step_losses(*errors, t, config, schedule(CPU), correction)
            moved = self._moved(w, loser, w_ref, l_ref, t, correction)
            errors = PairErrors(*moved[:2]), PairErrors(*moved[2:4])
            on_device = step_losses(*errors, moved[4], config, schedule(self.device), moved[5])
            worst = max(
                worst,
                deviation(on_device.loss, on_cpu.loss),
                deviation(on_device.gradient_weight, on_cpu.gradient_weight),
            )
        return worst

    def gradient(self) -> float:
        """Relative L2 distance of a float32 U-Net's gradient from the CPU's."""
        flat = []
        for device in (CPU, self.device):
            model = unet("tiny", CPU, seed=0).to(device)
            pairs = random_pairs("tiny", 8, CPU, seed=1)
            errors = pair_errors(model, schedule(device), moved_to(pairs, device))
            (errors.w - errors.l).sum().backward()
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            flat.append(torch.cat([gradient.flatten().double().cpu() for gradient in gradients]))
        return float((flat[1] - flat[0]).norm() / flat[0].norm())

    def images(self) -> float:
        """Levels of 255 between images of the shapes model with the same prompt and seed, in float32."""
        prompts = ["a small red star at the left", "a large blue circle"]
        seeds = [0, 1]
        config = SampleConfig(steps=10)
        folder = ModelFolder(str(MODEL_DIR))
        on_cpu, on_device = (
            TextToImage(folder, device)(prompts, seeds, config).astype(int) for device in (CPU, self.device)
        )
        return float(np.abs(on_cpu - on_device).max())

    def ledger(self) -> float:
        """Stored reference errors against online ones in the same batch shape, bf16."""
        return self._ledger_against_online(micro=4)

    def ledger_other_shape(self) -> float:
        """The same in another batch shape. Rounding differs, so a ledger's key names the precision."""
        return self._ledger_against_online(micro=3)

    def _ledger_against_online(self, micro: int) -> float:
        written = TrainConfig(
            steps=1, batch_size=12, micro_batch_size=4, draws=1, precision="bf16", reference="ledger"
        )
        online = dataclasses.replace(written, micro_batch_size=micro)
        with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
            folder = RandomFolder(self.model, self.device)
            data = Path(scratch)
            write_shard_of(folder, data, ["a red circle"] * 12)
            record = write_ledger(folder, data, OBJECTIVE, written, self.device)
            stored = Ledger(fs.LocalFileSystem(), str(record), self.device)
            worst = 0.0
            policy = Policy(folder, online, self.device)
            with LatentReader(fs.LocalFileSystem(), scratch) as reader:
                maker = BatchMaker(reader, folder, folder.schedule(), OBJECTIVE, online, self.device)
                for part in slices(reader.shard(0), micro):
                    batch = maker.make(part)
                    with policy.autocast():
                        computed = pair_errors(policy.unet, schedule(self.device), batch)
                    read = stored.errors(part)
                    worst = max(worst, deviation(computed.w, read.w), deviation(computed.l, read.l))
        return worst

    def repeated_run(self) -> float:
        """Weights after three bf16 steps against those of a second, identical run."""
        training = TrainConfig(
            steps=3, batch_size=4, micro_batch_size=2, draws=1, learning_rate=1e-4, precision="bf16",
            reference="ledger", gradient_checkpointing=True,
        )  # fmt: skip
        losses: list[list[float]] = []
        weights: list[Tensor] = []
        with tempfile.TemporaryDirectory() as scratch:
            folder = RandomFolder(self.model, self.device)
            data = Path(scratch)
            write_shard_of(folder, data, [f"a red circle {i}" for i in range(8)])
            record = write_ledger(folder, data, OBJECTIVE, training, self.device)
            for _ in range(2):
                ours = Ours(folder, training, self.device, data, record)
                with ours.reader:
                    losses.append([ours.step()["loss"] for _ in range(3)])
                weights.append(torch.cat([p.detach().flatten().cpu() for p in ours.policy.parameters()]))
                del ours  # frees the GPU for the second run
        assert losses[0][0] != losses[0][2], "three steps change the loss"
        return deviation(weights[1], weights[0])

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
"""By name: the law, its bound, and what the deviation is measured from."""


def deviation(found: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest absolute expected value. inf if a value is not finite."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    if not (torch.isfinite(found).all() and torch.isfinite(expected).all()):
        return float("inf")
    return float((found - expected).abs().max() / expected.abs().max())


def moved_to(batch: PairBatch, device: torch.device) -> PairBatch:
    """The batch with its tensors on a device."""

    def moved(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: tensor.to(device) for name, tensor in value.items()}
        return value.to(device) if isinstance(value, Tensor) else value

    return dataclasses.replace(batch, **{name: moved(value) for name, value in vars(batch).items()})


def main(arguments: list[str] | None = None) -> int:
    """Run every law; print and record each deviation. Returns 1 if a law failed, else 0."""
    options = gpu_parser(__doc__).parse_args(arguments)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before the GPU is first used
    use_deterministic_kernels()
    laws = Laws(torch.device(options.device), options.model)
    failed = 0
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
        record_results({f"law, {name}": row}, options.out)
    print(f"{len(ALL) - failed} passed, {failed} failed", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
