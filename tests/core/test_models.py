"""Our own generation equals the diffusers pipeline on the shipped folder, and checkpoints lose nothing."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file
from transformers.optimization import Adafactor

from dde_core import checkpoint
from dde_core.calibration import Calibration
from dde_core.checkpoint import Progress
from dde_core.config import LoraConfig, ObjectiveConfig, SampleConfig, TrainConfig
from dde_core.errors import DataError, ModelError
from dde_core.generation import TextToImage
from dde_core.models.folder import ModelFolder, encode_images, image_batch_size
from dde_core.models.policy import Policy, make_optimizer
from dde_core.models.saving import save_aligned
from dde_core.noise import initial_latents
from dde_core.parallelism import adafactor_averages
from dde_core.shapes import MODEL_DIR
from dde_core.shapes.scenes import all_scenes, render
from dde_core.train_step import PairErrors

PROMPTS, SEEDS = ["a small red circle at the left", "a large blue cross on a white background"], [3, 4]


@pytest.fixture(scope="module")
def model() -> TextToImage:
    return TextToImage(ModelFolder(MODEL_DIR))


def test_diffusers_loads_the_shipped_folder_as_it_is_and_draws_the_same_pictures(model: TextToImage):
    pipeline = StableDiffusionPipeline.from_pretrained(MODEL_DIR, dtype=torch.float32)
    assert isinstance(pipeline.scheduler, DDIMScheduler)
    pipeline.set_progress_bar_config(disable=True)
    latents = torch.stack([initial_latents(seed, (4, 8, 8)) for seed in SEEDS])
    theirs = pipeline(
        PROMPTS, latents=latents, num_inference_steps=10, guidance_scale=3.0, output_type="np"
    ).images
    ours = model(PROMPTS, SEEDS, SampleConfig(steps=10, guidance_scale=3.0))
    assert ours.shape == (2, 32, 32, 3)
    assert np.abs(ours - theirs * 255).max() <= 1.0, "equal but for rounding"


def test_a_picture_is_a_function_of_prompt_and_seed(model: TextToImage):
    sample = SampleConfig(steps=5, guidance_scale=3.0)
    alone = model(PROMPTS[:1], SEEDS[:1], sample)
    assert np.abs(alone[0].astype(int) - model(PROMPTS, SEEDS, sample)[0]).max() <= 1
    assert (model(PROMPTS[:1], SEEDS[1:], sample) != alone).any()


def test_any_multiple_of_eight_can_be_drawn(model: TextToImage):
    assert model(PROMPTS[:1], [0], SampleConfig(steps=1, height=40, width=24)).shape == (1, 40, 24, 3)


def test_pictures_survive_the_vae():
    folder = ModelFolder(MODEL_DIR)
    pictures = np.stack([render(scene) for scene in all_scenes()[::300]])
    vae = folder.vae()
    latents = encode_images(vae, pictures)
    assert latents.dtype == np.float16
    assert 0.3 < latents.std() < 3.0, "scaled to about unit deviation"
    restored = vae.decode(torch.from_numpy(latents).float() / vae.config.scaling_factor).sample
    error = (restored - (torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1)).abs().mean()
    assert error < 0.05
    assert folder.image_size() == (32, 32)


def test_an_aligned_folder_takes_over_no_pickle(tmp_path: Path):
    base = tmp_path / "base"
    shutil.copytree(MODEL_DIR, base)
    (base / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    (base / "v1-5-pruned.ckpt").write_bytes(b"another")
    save_aligned(base, MODEL_DIR / "unet", tmp_path / "aligned")
    ours, theirs = (
        {p.relative_to(root) for p in root.rglob("*") if p.is_file()}
        for root in (tmp_path / "aligned", MODEL_DIR)
    )
    assert ours == theirs


def test_parts_that_cannot_be_taken_over_do_not_cost_the_aligned_model(tmp_path: Path):
    base = tmp_path / "base"
    shutil.copytree(MODEL_DIR, base)
    index = json.loads((base / "model_index.json").read_text())
    named = {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "X"],
    }
    (base / "model_index.json").write_text(json.dumps(index | named))
    (base / "safety_checker").mkdir()
    (base / "safety_checker" / "pytorch_model.bin").write_bytes(b"a pickle")
    save_aligned(base, MODEL_DIR / "unet", tmp_path / "aligned")
    written = json.loads((tmp_path / "aligned" / "model_index.json").read_text())
    assert written["safety_checker"] == written["feature_extractor"] == [None, None]
    StableDiffusionPipeline.from_pretrained(tmp_path / "aligned", dtype=torch.float32)


def test_large_pictures_go_through_the_vae_a_few_at_a_time():
    assert [image_batch_size(size, size) for size in (32, 256, 512, 1024, 2048)] == [32, 32, 16, 4, 1]


def test_a_folder_that_is_no_model_is_refused_with_its_path(tmp_path: Path):
    with pytest.raises(ModelError, match=r"no model_index\.json"):
        ModelFolder(tmp_path)


PROGRESS = Progress(step=1, pairs_seen=64, images_seen=128)


def written(folder: Path, policy, optimizer, calibration) -> None:
    checkpoint.snapshot(policy, optimizer, calibration, PROGRESS, rank=0).write(folder, policy)


def stepped(seed: int, training: TrainConfig):
    folder = ModelFolder(MODEL_DIR)
    policy, calibration = Policy(folder, training), Calibration(folder.schedule(), ObjectiveConfig())
    optimizer = make_optimizer(policy.parameters(), training)
    torch.manual_seed(seed)
    train_a_little(policy, optimizer)
    errors = PairErrors(*torch.rand(2, 8))
    calibration.update(torch.arange(100, 900, 100), errors, PairErrors(*torch.rand(2, 8)))
    return policy, optimizer, calibration


def train_a_little(policy, optimizer) -> None:
    optimizer.zero_grad()
    latents, text = torch.linspace(-1, 1, 256).reshape(1, 4, 8, 8), torch.ones(1, 16, 64)
    policy.unet(latents + torch.rand(1), torch.tensor([5]), text).sample.square().mean().backward()
    optimizer.step()
    if policy.ema:
        policy.ema.step(policy.parameters())


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4)], ids=["whole", "lora"])
@pytest.mark.parametrize(
    ("ema_decay", "optimizer"), [(0.0, "adamw"), (0.9, "adamw"), (0.9, "adamw_8bit"), (0.9, "adafactor")]
)
def test_a_checkpoint_continues_to_the_same_bits(tmp_path: Path, lora, ema_decay, optimizer):
    training = TrainConfig(lora=lora, ema_decay=ema_decay, optimizer=optimizer, learning_rate=1e-3)
    policy, optimizer, calibration = stepped(0, training)
    written(tmp_path, policy, optimizer, calibration)
    other, other_optimizer, other_calibration = stepped(1, training)
    train_a_little(other, other_optimizer)
    assert checkpoint.load(tmp_path, other, other_optimizer, other_calibration) == PROGRESS
    for seed in (2, 3):
        for each, its_optimizer in ((policy, optimizer), (other, other_optimizer)):
            torch.manual_seed(seed)
            train_a_little(each, its_optimizer)
    with policy.averaged(), other.averaged():
        averages = [[p.clone() for p in each.parameters()] for each in (policy, other)]
    assert all(torch.equal(p, q) for p, q in zip(*averages, strict=True))
    assert all(torch.equal(p, q) for p, q in zip(policy.parameters(), other.parameters(), strict=True))
    assert ema_decay == 0 or any(
        (p != q).any() for p, q in zip(policy.parameters(), averages[0], strict=True)
    )
    t = torch.tensor([1, 150, 999])
    assert torch.equal(calibration.correction(t), other_calibration.correction(t))
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".safetensors", ".json"}


def test_a_stored_adafactor_keeps_what_the_plan_counts(tmp_path: Path):
    policy, optimizer, calibration = stepped(0, TrainConfig(optimizer="adafactor"))
    written(tmp_path, policy, optimizer, calibration)
    stored = load_file(tmp_path / checkpoint.OPTIMIZER)
    assert {name.split("/")[1] for name in stored} == {
        "step",
        "RMS",
        "exp_avg_sq",
        "exp_avg_sq_row",
        "exp_avg_sq_col",
    }
    averages = sum(value.numel() for name, value in stored.items() if "exp_avg_sq" in name)
    shapes = [parameter.shape for parameter in policy.parameters()]
    assert averages == sum(map(adafactor_averages, shapes))
    assert averages < sum(map(math.prod, shapes))


def test_adafactor_takes_the_steps_of_transformers_at_the_configured_rate():
    """Shazeer and Stern 2018, Algorithm 4, without a first moment: by hand for the first step, whose averages
    have no past."""
    training = TrainConfig(optimizer="adafactor", learning_rate=1e-3, weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in ((6, 5), (7,), (3, 2, 3, 3))]
    gradients = [[torch.randn(p.shape, generator=generator) for p in start] for _ in range(3)]
    ours, theirs, other = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(3))
    fixed = {"lr": 1e-3, "weight_decay": 0.1, "relative_step": False}
    optimizers = [
        (ours, make_optimizer(ours, training)),
        (theirs, Adafactor(theirs, scale_parameter=False, **fixed)),
        (other, Adafactor(other, scale_parameter=True, **fixed)),
    ]
    for step, of_step in enumerate(gradients):
        for parameters, optimizer in optimizers:
            for parameter, gradient in zip(parameters, of_step, strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()
        if step == 0:
            g, weight = of_step[0].double(), start[0].double()
            rows, columns = g.square().mean(1), g.square().mean(0)
            update = g / (rows[:, None] * columns[None] / rows.mean()).sqrt()
            update /= max(1.0, update.square().mean().sqrt().item())
            expected = weight - 1e-3 * 0.1 * weight - 1e-3 * update
            torch.testing.assert_close(ours[0].detach().double(), expected, rtol=0, atol=1e-6)
    assert all(map(torch.equal, ours, theirs))
    assert not any(map(torch.equal, ours, other))


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4)], ids=["whole", "lora"])
def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path, lora):
    policy, optimizer, calibration = stepped(0, TrainConfig(lora=lora))
    written(tmp_path, policy, optimizer, calibration)
    other, other_optimizer, other_calibration = stepped(1, TrainConfig(lora=lora and LoraConfig(rank=8)))
    if lora is None:
        other.unet.conv_out = torch.nn.Conv2d(64, 8, 3)
    with pytest.raises(DataError, match="another U-Net"):
        checkpoint.load(tmp_path, other, other_optimizer, other_calibration)
