"""Three workers with unequal shards of each global batch, in uneven micro-batches, make the update of one.

In float64, to 1e-9. Gathering is exact.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import distributed

from dde_core.batches import micro_batches
from dde_core.calibration import Calibration
from dde_core.config import ObjectiveConfig
from dde_core.models.parallel import full_tensor, shard, synchronized, wrap
from dde_core.noise import draw_evaluation_point, draw_noise, draw_timestep
from dde_core.parallelism import num_micro_batches
from dde_core.schedule import Schedule
from dde_core.train_step import PairBatch, pair_errors, step_losses
from services.training.worker.collectives import gather, gather_errors
from tests.support.ranks import run_ranks
from tests.support.tiny_unet import TEXT_WIDTH, tiny_unet

STEPS, BATCH, MICRO, SHAPE = 20, 7, 2, (4, 8, 8)
WAYS = ("ddp", "fsdp")
CONFIG = ObjectiveConfig(beta=500.0, calibration_bins=20)
POINTS = ("expected", "sampled", "mode")
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}


def make_batch(step: int, places: np.ndarray) -> PairBatch:
    names = [f"{step}-{place}" for place in places]

    def draw(side: str, visit: int) -> torch.Tensor:
        return torch.stack([draw_noise(0, name, side, visit, SHAPE) for name in names]).double()

    text = torch.stack([draw_noise(0, name, "shared", 2, (3, TEXT_WIDTH)) for name in names]).double()
    t = torch.tensor([draw_timestep(0, name, 0, np.arange(1001) / 1000) for name in names])
    sides = {f"latents_{side}": draw(side, 1) for side in "wl"} | {
        f"noise_{side}": draw(side, 0) for side in "wl"
    }
    sides |= {
        f"z_{side}": torch.stack([draw_evaluation_point(0, name, side, 0, SHAPE) for name in names]).double()
        for side in "wl"
    }
    conditioning = {f"conditioning_{side}": {"encoder_hidden_states": text} for side in "wl"}
    return PairBatch(pair_ids=tuple(names), t=t, share=torch.ones(len(names)), **sides, **conditioning)


def three(rank: int, folder: str) -> None:
    """One of three workers, with every parallelism."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", store=distributed.FileStore(f"{folder}/store", 3), rank=rank, world_size=3
    )
    for parallelism in WAYS:
        train(rank, 3, f"{folder}/{parallelism}-{rank}", parallelism)
    distributed.destroy_process_group()


def train(rank: int, world_size: int, file: str, parallelism: str) -> None:
    schedule = Schedule.from_config(SCHEDULE)
    policy, reference = tiny_unet().double(), tiny_unet().double().requires_grad_(False)
    if parallelism == "fsdp":
        shard(policy, torch.device("cpu"), world_size)
        shard(reference, torch.device("cpu"), world_size)
    parallel = wrap(policy, parallelism, torch.device("cpu"))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-4)
    calibrations = {
        point: Calibration(schedule, replace(CONFIG, calibration_point=point)) for point in POINTS
    }
    for step in range(STEPS):
        places = np.arange(rank, BATCH, world_size)
        batch, errors = make_batch(step, places), []
        optimizer.zero_grad()
        for part, is_last in micro_batches(batch, num_micro_batches(BATCH, world_size, MICRO)):
            with synchronized(parallel, is_last):
                theta = pair_errors(parallel, schedule, part)
                with torch.no_grad():
                    ref = pair_errors(reference, schedule, part)
                correction = calibrations["expected"].correction(part.t)
                terms = step_losses(theta, ref, part.t, CONFIG, schedule, correction)
                (terms.loss.sum() / BATCH * world_size).backward()
            errors.append((part.t, part.share, theta, ref))
        optimizer.step()
        t, _, theta, ref = gather_errors(errors, places, BATCH)
        for calibration in calibrations.values():
            calibration.update(t, theta, ref)
    arrays = {
        point: torch.cat(list(calibration.state_dict().values()))
        for point, calibration in calibrations.items()
    }
    weights = torch.cat([full_tensor(value).flatten() for value in policy.state_dict().values()])
    save_file({"weights": weights, **arrays}, file)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the results of one worker and of three."""
    folder = tmp_path_factory.mktemp("trained")
    train(0, 1, f"{folder}/one", "none")
    run_ranks(three, (str(folder),), 3)
    return folder


@pytest.mark.parametrize("parallelism", WAYS)
def test_workers_do_not_change_the_update_in_float64(trained: Path, parallelism: str):
    """The first of three has one pair more. Under FSDP2 all gather at once: as many micro-batches each."""
    one, *three = (
        load_file(trained / name) for name in ("one", *(f"{parallelism}-{rank}" for rank in range(3)))
    )
    start = torch.cat([value.flatten() for value in tiny_unet().double().state_dict().values()])
    distance = (three[0]["weights"] - one["weights"]).norm() / (one["weights"] - start).norm()
    print(f"relative L2 distance of the update, 1 against 3 workers ({parallelism}), float64: {distance:.1e}")
    assert distance < 1e-9
    assert all(torch.equal(each["weights"], three[0]["weights"]) for each in three)
    for point in POINTS:
        assert all(torch.equal(each[point], three[0][point]) for each in three), (
            "all workers hold the same arrays"
        )
        torch.testing.assert_close(
            three[0][point], one[point], rtol=1e-5, atol=1e-12
        )  # errors are gathered in float32
        assert three[0][point].count_nonzero() > 40
    assert not torch.equal(three[0]["expected"], three[0]["sampled"])


@pytest.mark.parametrize(("size", "lengths"), [(3, [2, 2, 3]), (7, [7]), (1, [1] * 7), (100, [7])])
def test_micro_batches_have_the_gradient_of_the_whole_batch(size: int, lengths: list[int]):
    schedule, batch = Schedule.from_config(SCHEDULE), make_batch(0, np.arange(BATCH))
    correction, reference = (
        torch.linspace(0, 1e-3, BATCH, dtype=torch.float64),
        tiny_unet().double().requires_grad_(False),
    )
    with torch.no_grad():
        reference.conv_in.weight *= 1.1

    def gradient(parts) -> torch.Tensor:
        policy, done = tiny_unet().double(), 0
        for part in parts:
            theta, ref = (pair_errors(model, schedule, part) for model in (policy, reference))
            terms = step_losses(theta, ref, part.t, CONFIG, schedule, correction[done : done + len(part)])
            (terms.loss.sum() / BATCH).backward()
            done += len(part)
        return torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])

    parts = list(micro_batches(batch, num_micro_batches(BATCH, 1, size)))
    assert [len(part) for part, _ in parts] == lengths
    assert [is_last for _, is_last in parts] == [False] * (len(lengths) - 1) + [True]
    assert [name for part, _ in parts for name in part.pair_ids] == list(batch.pair_ids)
    whole = gradient([batch])
    assert whole.norm() > 1e-3
    assert ((gradient(part for part, _ in parts) - whole).norm() / whole.norm()).item() < 1e-9


def test_gathering_puts_values_at_their_positions():
    table = gather([torch.tensor([1.0, 2.0, 5.0]), torch.tensor([3, 4, 6])], np.array([2, 0, 1]), 3)
    assert table.tolist() == [[2.0, 5.0, 1.0], [4.0, 6.0, 3.0]]


def test_a_shard_whose_other_workers_have_died_is_an_error_and_no_row_of_zeros():
    with pytest.raises(ValueError, match="process group has not been initialized"):
        gather([torch.tensor([1.0, 2.0])], np.array([2, 0]), 3)


@given(batch_size=st.integers(1, 200), world_size=st.integers(1, 16), size=st.integers(1, 50))
def test_all_workers_have_equally_many_micro_batches_of_no_more_pairs_than_requested(
    batch_size, world_size, size
):
    assume(world_size <= batch_size)
    num_parts = num_micro_batches(batch_size, world_size, size)
    for share in {batch_size // world_size, -(-batch_size // world_size)}:
        lengths = [len(part) for part, _ in micro_batches(Numbers(range(share)), num_parts)]
        assert (len(lengths), sum(lengths)) == (num_parts, share)
        assert 1 <= min(lengths) <= max(lengths) <= (size if size > 1 or batch_size % world_size == 0 else 2)


class Numbers(list):
    """Rows that are just their numbers."""

    def rows(self, keep: slice) -> Numbers:
        return Numbers(self[keep])
