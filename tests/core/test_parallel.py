"""Planner and trainer choose alike; on two gloo processes FSDP2 updates like DDP and stores whole tensors."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from peft import LoraConfig as PeftConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed

from dde_core import checkpoint
from dde_core.calibration import Calibration
from dde_core.checkpoint import Progress
from dde_core.config import LoraConfig, ObjectiveConfig, TrainConfig
from dde_core.errors import ConfigError
from dde_core.methods import METHODS
from dde_core.models import parallel
from dde_core.models.folder import ModelFolder
from dde_core.models.parallel import synchronized
from dde_core.models.policy import Policy, make_optimizer, use_deterministic_kernels
from dde_core.models.saving import save_aligned
from dde_core.parallelism import Parameters, choose_parallelism, micro_batch_counts, state_terms
from dde_core.planning.cluster import Cluster, parallelism_on
from dde_core.planning.estimate import parameters_of
from dde_core.planning.facts import FACTS
from tests.support.ranks import run_ranks
from tests.support.tiny_folders import WIDTH, sd15_folder
from tests.support.tiny_unet import TEXT_WIDTH, tiny_unet
from tests.support.unet_configs import unet

RANKS = 2
STEPS = 3
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
    """The gradients of two micro-batches, different on each rank; the reference runs before the policy."""
    optimizer.zero_grad()
    for part in range(2):
        with synchronized(model, part == 1):
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
        found[kind] = torch.cat([parallel.full_tensor(p).detach().flatten() for p in unet.parameters()])
    return found


def noise(seed: int) -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


class Run:
    """A policy that trains."""

    def __init__(self, folder: Path, parallelism: str, kind: str, rank: int, world_size: int = RANKS) -> None:
        model = ModelFolder(folder)
        self.policy = Policy(model, train_config(parallelism, kind), world_size=world_size)
        self.optimizer = make_optimizer(self.policy.parameters(), train_config(parallelism, kind))
        self.calibration = Calibration(model.schedule(), ObjectiveConfig())
        self.rank = rank

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
        x = noise(0)
        conditioning = (torch.tensor([5, 500]), torch.ones(2, 3, WIDTH))
        found = {
            "norms": torch.tensor(norms, dtype=torch.float64),
            "reference": again.policy.reference(x, *conditioning).sample,
        }
        save_file(found, folder / f"{parallelism}-{kind}-{rank}.safetensors")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("parallel")
    sd15_folder(path / "model")
    run_ranks(run, (path,), RANKS)
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


def test_shards_make_the_update_of_whole_models_in_float64(folder: Path):
    found = load_file(folder / "float64-0.safetensors")
    start = torch.cat([p.detach().flatten() for p in tiny_unet().double().parameters()])
    distance = float((found["ddp"] - found["fsdp"]).norm() / (found["ddp"] - start).norm())
    print(f"relative L2 distance of the update, FSDP2 against DDP, 2 ranks, float64: {distance:.1e}")
    assert distance < 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_shards_make_the_update_of_whole_models_in_float32_and_the_same_gradient_norms(
    folder: Path, kind: str
):
    whole, shards = (tensors(folder / f"{each}-{kind}") for each in ("ddp", "fsdp"))
    assert {n: t.shape for n, t in whole.items()} == {n: t.shape for n, t in shards.items()}, (
        "files are those of a whole model"
    )
    start = alone(folder, kind).policy.weights()
    a, b = map(trained, (whole, shards))
    apart, length = (sum(float((a[n] - each[n]).double().square().sum()) for n in a) for each in (b, start))
    distance = (apart / length) ** 0.5
    print(f"relative L2 distance of the update, FSDP2 against DDP, 2 ranks, {kind}: {distance:.1e}")
    assert distance < 1e-3
    its, other = (load_file(folder / f"{each}-{kind}-1.safetensors") for each in ("ddp", "fsdp"))
    torch.testing.assert_close(other["norms"], its["norms"], rtol=1e-4, atol=0)
    assert torch.equal(other["reference"], its["reference"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parallelism", ["ddp", "fsdp"])
def test_a_run_that_resumes_from_its_checkpoint_is_the_undisturbed_one_to_the_bit(
    folder: Path, parallelism: str, kind: str
):
    one, other = (tensors(folder / f"{parallelism}-{kind}{which}") for which in ("", "-resumed"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", KINDS)
def test_one_process_resumes_from_a_checkpoint_of_shards(folder: Path, kind: str):
    run = alone(folder, kind)
    assert run.policy.parallelism == "none"
    run.load(folder / f"fsdp-{kind}")
    saved = trained(tensors(folder / f"fsdp-{kind}"))
    assert all(torch.equal(value, saved[name]) for name, value in run.policy.weights().items())


def test_a_model_trained_in_shards_loads_as_any_other(folder: Path, tmp_path: Path):
    save_aligned(folder / "model", folder / "fsdp-whole" / "weights", tmp_path / "aligned")
    saved = trained(tensors(folder / "fsdp-whole"))
    assert all(
        torch.equal(value, saved[name])
        for name, value in ModelFolder(tmp_path / "aligned").unet().state_dict().items()
    )


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "adafactor"])
def test_fsdp_refuses_state_that_cannot_be_split_by_rows(optimizer):
    training = TrainConfig(parallelism="fsdp", optimizer=optimizer)
    message = rf"training\.optimizer does not go with training\.parallelism \"fsdp\", got '{optimizer}'"
    with pytest.raises(ConfigError, match=message):
        parallel.choose("dde", training, tiny_unet(), torch.device("cpu"), 2)


# ---- the choice of planner and trainer

ON = Cluster(gpus=16, gpu="h100")


@cache
def meta_unet(family: str, lora: LoraConfig | None):
    """The real U-Net without storage, as a policy prepares it: all trained, or adapters on frozen weights."""
    model = unet(family)
    if lora:
        model.requires_grad_(False)
        model.add_adapter(PeftConfig(r=lora.rank, target_modules=list(lora.targets)))
    return model


@pytest.fixture
def on_h100s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "smallest_memory", lambda device: ON.kind.cuda_gb * 1e9)


@pytest.mark.usefixtures("on_h100s")
@pytest.mark.parametrize("reference", ["auto", "online", "ledger"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("ema_decay", [0.0, 0.999])
@pytest.mark.parametrize("lora", [None, LoraConfig()], ids=["full", "lora"])
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("method", METHODS)
def test_planner_and_trainer_choose_alike(method, family, lora, ema_decay, precision, reference):
    training = TrainConfig(lora=lora, ema_decay=ema_decay, precision=precision, reference=reference)
    model = meta_unet(family, lora)
    assert parallel.count_parameters(model, training) == parameters_of(FACTS[family], training)
    planned = parallelism_on(ON, FACTS[family], ObjectiveConfig(method=method, beta=10.0), training)
    assert parallel.choose(method, training, model, torch.device("cpu"), ON.gpus) == planned


@pytest.mark.parametrize(
    ("batch_size", "workers", "micro_batch_size", "count", "pairs"),
    [(9, 8, 1, 1, 2), (8, 2, 3, 2, 2), (10, 2, 3, 2, 3), (10, 3, 0, 1, 4)],
)
def test_the_planner_counts_the_micro_batches_of_the_worker_that_has_most(
    batch_size, workers, micro_batch_size, count, pairs
):
    training = TrainConfig(batch_size=batch_size, micro_batch_size=micro_batch_size)
    assert micro_batch_counts(training, workers) == (count, pairs)


@pytest.mark.usefixtures("on_h100s")
@pytest.mark.parametrize(("method", "chosen"), [("sft", "ddp"), ("dde", "fsdp")])
def test_a_policy_counts_a_reference_only_where_its_method_has_one(monkeypatch, method, chosen):
    """SDXL in bf16 with a running average on 85 GB: 56.5 GB of state, 66.8 GB with a reference."""
    monkeypatch.setattr(parallel, "shard", lambda *arguments: None)
    monkeypatch.setattr(parallel, "wrap", lambda model, parallelism, device: model)
    folder = object.__new__(ModelFolder)
    monkeypatch.setattr(folder, "unet", lambda: meta_unet("sdxl", None), raising=False)
    training = TrainConfig(ema_decay=0.999, precision="bf16")
    assert Policy(folder, training, "meta", ON.gpus, method).parallelism == chosen


def test_a_ledger_and_adapters_leave_no_copy_of_the_reference():
    counts = Parameters(base=100, trained=100, averages=30)
    adapters = Parameters(base=100, trained=5, averages=3)
    assert "reference" in state_terms("dde", TrainConfig(), counts)
    assert "reference" not in state_terms("sft", TrainConfig(), counts)
    assert "reference" not in state_terms("dde", TrainConfig(reference="ledger"), counts)
    assert "reference" not in state_terms("dde", TrainConfig(lora=LoraConfig()), adapters)


def test_adafactor_keeps_its_averages_and_adam_two_moments_of_each_parameter():
    adapters = Parameters(base=100, trained=5, averages=3)
    sizes = {
        optimizer: state_terms("dde", TrainConfig(lora=LoraConfig(), optimizer=optimizer), adapters)[
            "optimizer"
        ].bytes
        for optimizer in ("adamw", "adamw_8bit", "adafactor")
    }
    assert sizes == {"adamw": 5 * 8, "adamw_8bit": 5 * 2, "adafactor": 3 * 4}


def test_one_worker_needs_no_parallelism_whatever_is_requested():
    training = TrainConfig(parallelism="fsdp", optimizer="adamw_8bit")
    assert choose_parallelism("dde", training, Parameters(1, 1, 1), 0, num_workers=1) == "none"
