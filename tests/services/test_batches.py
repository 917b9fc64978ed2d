"""Two processes that share each global batch make the update of one, in float64 to 1e-9; and gathering is exact."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from dde_core.calibration import Calibration
from dde_core.config import ObjectiveConfig
from dde_core.noise import draw_noise, draw_timestep
from dde_core.schedule import Schedule
from dde_core.train_step import PairBatch, pair_errors, step_losses
from services.training.batches import gather, gather_errors
from tests.tiny_unet import TEXT_WIDTH, tiny_unet

STEPS, BATCH, SHAPE = 20, 6, (4, 8, 8)
CONFIG = ObjectiveConfig(beta=500.0, calibration_bins=20)
SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def make_batch(step: int, places: np.ndarray) -> PairBatch:
    names = [f"{step}-{place}" for place in places]

    def draw(side: str, visit: int) -> torch.Tensor:
        return torch.stack([draw_noise(0, name, side, visit, SHAPE) for name in names]).double()

    text = torch.stack([draw_noise(0, name, "shared", 2, (3, TEXT_WIDTH)) for name in names]).double()
    t = torch.tensor([draw_timestep(0, name, 0, np.arange(1001) / 1000) for name in names])
    sides = {f"latents_{side}": draw(side, 1) for side in "wl"} | {f"noise_{side}": draw(side, 0) for side in "wl"}
    conditioning = {f"conditioning_{side}": {"encoder_hidden_states": text} for side in "wl"}
    return PairBatch(pair_ids=tuple(names), t=t, **sides, **conditioning)


def train(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    if world_size > 1:
        store = distributed.FileStore(f"{folder}/store", world_size)
        distributed.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    schedule = Schedule.from_config(SCHEDULE)
    policy, reference = tiny_unet().double(), tiny_unet().double().requires_grad_(False)
    parallel = DistributedDataParallel(policy) if world_size > 1 else policy
    optimizer, calibration = torch.optim.AdamW(policy.parameters(), lr=1e-4), Calibration(schedule, CONFIG)
    for step in range(STEPS):
        places = np.arange(rank, BATCH, world_size)
        batch = make_batch(step, places)
        theta = pair_errors(parallel, schedule, batch)
        with torch.no_grad():
            ref = pair_errors(reference, schedule, batch)
        terms = step_losses(theta, ref, batch.t, CONFIG, schedule, calibration.correction(batch.t))
        optimizer.zero_grad()
        (terms.loss.sum() / BATCH * world_size).backward()
        optimizer.step()
        calibration.update(*gather_errors(batch.t, [(theta, ref)], places, BATCH))
    arrays = torch.cat(list(calibration.state_dict().values()))
    weights = torch.cat([value.flatten() for value in policy.state_dict().values()])
    save_file({"weights": weights, "arrays": arrays}, f"{folder}/{world_size}-{rank}.safetensors")
    if world_size > 1:
        distributed.destroy_process_group()


def test_workers_do_not_change_the_update_in_float64(tmp_path: Path):
    train(0, 1, str(tmp_path))
    mp.spawn(train, args=(3, str(tmp_path)), nprocs=3)
    one, *three = (load_file(tmp_path / f"{name}.safetensors") for name in ("1-0", "3-0", "3-1", "3-2"))
    start = torch.cat([value.flatten() for value in tiny_unet().double().state_dict().values()])
    distance = (three[0]["weights"] - one["weights"]).norm() / (one["weights"] - start).norm()
    print(f"relative L2 distance of the update, 1 against 3 workers, float64: {distance:.1e}")
    assert distance < 1e-9
    assert all(torch.equal(each["arrays"], three[0]["arrays"]) for each in three), "all workers hold the same arrays"
    assert all(torch.equal(each["weights"], three[0]["weights"]) for each in three)
    assert three[0]["arrays"].abs().max() > 0


def test_gathering_puts_values_where_they_belong():
    table = gather([torch.tensor([1.0, 2.0]), torch.tensor([3, 4])], np.array([2, 0]), 3)
    assert table.tolist() == [[2.0, 0.0, 1.0], [4.0, 0.0, 3.0]]
