"""Two processes on gloo: a model in shares (FSDP2) makes the update of whole ones (DDP), and what it stores is whole."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed

from dde_core import checkpoint
from dde_core.calibration import Calibration
from dde_core.checkpoint import Progress
from dde_core.config import LoraConfig, ObjectiveConfig, TrainConfig
from dde_core.errors import ConfigError
from dde_core.models import parallel
from dde_core.models.folder import ModelFolder
from dde_core.models.parallel import synchronised
from dde_core.models.policy import Policy, make_optimizer, use_deterministic_kernels
from dde_core.models.saving import save_aligned
from tests.support.tiny_folders import WIDTH, sd15_folder
from tests.support.tiny_unet import TEXT_WIDTH, tiny_unet

RANKS, STEPS = 2, 3
KINDS = ("whole", "lora")


def train_config(parallelism: str, kind: str) -> TrainConfig:
    lora = (
        LoraConfig(rank=4, targets=("to_q", "to_v", "conv1", "conv_in", "proj_out"))
        if kind == "lora"
        else None
    )
    return TrainConfig(
        parallelism=parallelism,
        lora=lora,
        learning_rate=1e-3,
        ema_decay=0.9,
        gradient_checkpointing=True,
        max_grad_norm=0.5,
    )


def step(
    model: Callable,
    inputs: Callable[[int], Tensor],
    optimizer,
    number: int,
    rank: int,
    text: Tensor,
    reference=None,
) -> None:
    """The gradients of two micro-batches on each rank, that differ from rank to rank; the reference runs before the policy."""
    optimizer.zero_grad()
    for part in range(2):
        with synchronised(model, part == 1):
            x = inputs(100 * number + 10 * part + rank)
            if reference:
                reference(x, torch.tensor([5, 500]), text)
            model(x, torch.tensor([5, 500]), text).sample.square().mean().backward()


def in_float64(rank: int, folder: Path) -> dict[str, Tensor]:
    """The weights after a few steps, of both."""
    found = {}
    for kind in ("ddp", "fsdp"):
        unet = tiny_unet().double()
        if kind == "fsdp":
            parallel.shard(unet, torch.device("cpu"), RANKS)
        model = parallel.wrap(unet, kind, torch.device("cpu"))
        optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, fused=True)
        for number in range(STEPS):
            step(
                model,
                lambda seed: noise(seed).double(),
                optimizer,
                number,
                rank,
                torch.ones(2, 3, TEXT_WIDTH).double(),
            )
            optimizer.step()
        found[kind] = torch.cat([parallel.whole(p).detach().flatten() for p in unet.parameters()])
    return found


def noise(seed: int) -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


class Run:
    """A policy that trains."""

    def __init__(self, folder: Path, parallelism: str, kind: str, rank: int, world_size: int = RANKS) -> None:
        model = ModelFolder(folder)
        self.policy = Policy(model, train_config(parallelism, kind), world_size=world_size)
        self.optimizer = make_optimizer(self.policy.parameters(), train_config(parallelism, kind))
        self.calibration, self.rank = Calibration(model.schedule(), ObjectiveConfig()), rank

    def train(self, first: int) -> float:
        """A few steps. The last norm of the gradients."""
        for number in range(first, first + STEPS):
            text = torch.ones(2, 3, WIDTH)
            step(self.policy.trained, noise, self.optimizer, number, self.rank, text, self.policy.reference)
            assert all(parameter.grad is not None for parameter in self.policy.parameters())
            norm = self.policy.clip_gradients()
            self.optimizer.step()
            self.policy.ema.step(self.policy.parameters())
        return float(norm)

    def save(self, target: Path) -> None:
        done = Progress(step=STEPS, pairs_seen=4, images_seen=8)
        state = checkpoint.snapshot(self.policy, self.optimizer, self.calibration, done, self.rank)
        assert (state is None) == (self.rank > 0)
        if state:
            target.mkdir()
            state.write(target, self.policy)

    def load(self, source: Path) -> None:
        checkpoint.load(source, self.policy, self.optimizer, self.calibration)


def run(rank: int, folder: Path) -> None:
    use_deterministic_kernels()
    store = distributed.FileStore(f"{folder}/store", RANKS)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    save_file(in_float64(rank, folder), folder / f"float64-{rank}.safetensors")
    for parallelism, kind in itertools.product(("ddp", "fsdp"), KINDS):
        first = Run(folder / "model", parallelism, kind, rank)
        assert first.policy.parallelism == parallelism
        norms = [first.train(0)]
        first.save(folder / f"{parallelism}-{kind}-half")
        distributed.barrier()
        norms.append(first.train(STEPS))
        first.save(folder / f"{parallelism}-{kind}")
        again = Run(folder / "model", parallelism, kind, rank)
        again.load(folder / f"{parallelism}-{kind}-half")
        assert again.train(STEPS) == norms[1]
        again.save(folder / f"{parallelism}-{kind}-resumed")
        x, told = noise(0), (torch.tensor([5, 500]), torch.ones(2, 3, WIDTH))
        found = {
            "norms": torch.tensor(norms, dtype=torch.float64),
            "reference": again.policy.reference(x, *told).sample,
        }
        save_file(found, folder / f"{parallelism}-{kind}-{rank}.safetensors")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("parallel")
    sd15_folder(path / "model")
    mp.spawn(run, args=(path,), nprocs=RANKS)
    return path


def tensors(folder: Path) -> dict[str, Tensor]:
    files = sorted(path for path in folder.rglob("*.safetensors"))
    return {
        f"{path.relative_to(folder)}/{name}": value
        for path in files
        for name, value in load_file(path).items()
    }


def trained(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of the policy's own weights, by the names that the policy has for them."""
    own = {name.split("/")[-1]: value for name, value in found.items() if name.startswith("weights/")}
    return {name.removeprefix("unet."): value for name, value in own.items()}


def alone(folder: Path, kind: str) -> Run:
    """One process, which has the first weights of every run."""
    return Run(folder / "model", "fsdp", kind, rank=0, world_size=1)


def test_shares_make_the_update_of_whole_models_in_float64(folder: Path):
    found = load_file(folder / "float64-0.safetensors")
    start = torch.cat([p.detach().flatten() for p in tiny_unet().double().parameters()])
    distance = float((found["ddp"] - found["fsdp"]).norm() / (found["ddp"] - start).norm())
    print(f"relative L2 distance of the update, FSDP2 against DDP, 2 ranks, float64: {distance:.1e}")
    assert distance < 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_shares_make_the_update_of_whole_models_in_float32_and_the_same_gradient_norms(
    folder: Path, kind: str
):
    whole, shares = (tensors(folder / f"{each}-{kind}") for each in ("ddp", "fsdp"))
    assert {n: t.shape for n, t in whole.items()} == {n: t.shape for n, t in shares.items()}, (
        "files are those of a whole model"
    )
    start, (a, b) = alone(folder, kind).policy.weights(), map(trained, (whole, shares))
    apart, length = (sum(float((a[n] - each[n]).double().square().sum()) for n in a) for each in (b, start))
    distance = (apart / length) ** 0.5
    print(f"relative L2 distance of the update, FSDP2 against DDP, 2 ranks, {kind}: {distance:.1e}")
    assert distance < 1e-3
    its, other = (load_file(folder / f"{each}-{kind}-1.safetensors") for each in ("ddp", "fsdp"))
    torch.testing.assert_close(other["norms"], its["norms"], rtol=1e-4, atol=0)
    assert torch.equal(other["reference"], its["reference"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parallelism", ["ddp", "fsdp"])
def test_a_run_that_goes_on_from_its_checkpoint_is_the_undisturbed_one_to_the_bit(
    folder: Path, parallelism: str, kind: str
):
    one, other = (tensors(folder / f"{parallelism}-{kind}{which}") for which in ("", "-resumed"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_shares_is_gone_on_with_by_one_process(folder: Path, kind: str):
    run = alone(folder, kind)
    assert run.policy.parallelism == "none"
    run.load(folder / f"fsdp-{kind}")
    saved = trained(tensors(folder / f"fsdp-{kind}"))
    assert all(torch.equal(value, saved[name]) for name, value in run.policy.weights().items())


def test_the_model_that_shares_have_made_loads_as_any_other(folder: Path, tmp_path: Path):
    save_aligned(folder / "model", folder / "fsdp-whole" / "weights", tmp_path / "aligned")
    saved = trained(tensors(folder / "fsdp-whole"))
    assert all(
        torch.equal(value, saved[name])
        for name, value in ModelFolder(tmp_path / "aligned").unet().state_dict().items()
    )


def test_eight_bit_moments_are_not_shared_out():
    with pytest.raises(
        ConfigError,
        match=r"training\.optimizer does not go with training\.parallelism \"fsdp\", got 'adamw_8bit'",
    ):
        parallel.choose(TrainConfig(parallelism="fsdp", optimizer="adamw_8bit"), 10, torch.device("cpu"), 2)
