"""LoRA models of one base share a U-Net call: each row is that of the U-Net with its own adapters merged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dde_core.conditioning import predict
from dde_core.config import LoraConfig, TrainConfig
from dde_core.engine.adapters import RowAdapters
from dde_core.errors import ModelError
from dde_core.models.folder import ModelFolder
from dde_core.models.lora_file import LORA_WEIGHTS
from dde_core.models.policy import Policy
from dde_core.models.text import TextEncoders
from dde_core.models.tokens import tokenize
from tests.support.tiny_folders import FOLDERS

ATTENTION = LoraConfig().targets
WITH_CONVOLUTIONS = (*ATTENTION, "conv1", "conv_shortcut", "time_emb_proj", "proj_in", "ff.net.0.proj")
DOWNSAMPLER = ("to_v", "downsamplers.0.conv")  # its convolution has stride 2
ADAPTERS = {
    "a": LoraConfig(rank=4, alpha=8, targets=ATTENTION),
    "b": LoraConfig(rank=16, alpha=4, targets=WITH_CONVOLUTIONS),
    "c": LoraConfig(rank=1, targets=DOWNSAMPLER),
}
TOLERANCE = 1e-5
"""Of the greatest value of the U-Net's output."""


def write_adapter(base: Path, lora: LoraConfig, target: Path, seed: int = 0) -> Path:
    """An adapter as training writes it, with values that change the U-Net's output by much."""
    policy = Policy(ModelFolder(base), TrainConfig(lora=lora))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    policy.write(policy.weights(), target)
    return target


class World:
    """A base model, three adapters of it, and six rows of inputs."""

    def __init__(self, root: Path, family: str) -> None:
        self.base = FOLDERS[family](root / "base")
        self.folders = {
            key: write_adapter(self.base, lora, root / key, seed=i)
            for i, (key, lora) in enumerate(ADAPTERS.items())
        }
        folder = ModelFolder(self.base)
        encoders = TextEncoders(folder)
        text = encoders(tokenize(folder.tokenizers(), [f"a red circle {i}" for i in range(6)]))
        sizes = np.full((6, 2), 32)
        self.conditioning = encoders.with_sizes(text, sizes, np.zeros_like(sizes), (32, 32))
        self.x = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(9))
        self.t = torch.tensor([1, 900, 500, 37, 999, 250])
        self.merged = {key: self.output(self.fused(key)) for key in (None, *ADAPTERS)}

    def fused(self, key: str | None):
        adapter = None if key is None else self.folders[key]
        return ModelFolder(self.base, adapter).unet().requires_grad_(False)

    def output(self, unet) -> torch.Tensor:
        with torch.no_grad():
            return predict(unet, self.x, self.t, self.conditioning)

    def loaded(self) -> tuple[torch.nn.Module, RowAdapters]:
        unet = self.fused(None)
        adapters = RowAdapters(unet)
        for key, folder in self.folders.items():
            adapters.load(key, folder)
        return unet, adapters


@pytest.fixture(scope="module", params=FOLDERS)
def world(request, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("models"), request.param)


def error_of(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def expected_rows(world: World, keys: list[str | None]) -> torch.Tensor:
    return torch.stack([world.merged[key][i] for i, key in enumerate(keys)])


# ---- rows of one call


@pytest.mark.parametrize(
    "keys",
    [
        ["a", None, "c", "b", None, "a"],
        ["c", "c", "b", None, "a", "b"],
        ["b"] * 6,
        [None] * 6,
    ],
    ids=str,
)
def test_each_row_is_that_of_the_unet_with_its_adapter_merged_in(world: World, keys):
    unet, adapters = world.loaded()
    with adapters.rows(keys):
        found = world.output(unet)
    for row, expected in zip(found, expected_rows(world, keys), strict=True):
        assert error_of(row, expected) < TOLERANCE
    for key in ADAPTERS:
        assert error_of(world.merged[key], world.merged[None]) > 0.01, "the adapter does something"


def test_a_wrong_adapter_on_one_row_would_be_seen(world: World):
    unet, adapters = world.loaded()
    with adapters.rows(["a", None, "c", "b", None, "a"]):
        found = world.output(unet)
    wrong = expected_rows(world, ["a", None, "c", "b", None, "c"])
    assert error_of(found[5], wrong[5]) > 100 * TOLERANCE


def test_no_row_changes_with_the_adapters_of_the_others_to_the_bit(world: World):
    unet, adapters = world.loaded()
    outputs = []
    for others in (["a", "c", "b"], ["b", None, "a"], ["c", "c", "c"]):
        with adapters.rows(["b", others[0], None, others[1], "c", others[2]]):
            outputs.append(world.output(unet)[[0, 2, 4]])
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[0][1], world.output(unet)[2]), "a row without adapter is the base's"


def test_an_adapter_that_is_not_finite_spoils_its_own_rows_alone(world: World, tmp_path: Path):
    unet, adapters = world.loaded()
    broken = shutil.copytree(world.folders["a"], tmp_path / "broken")
    edit(broken, lambda weights: {name: tensor * float("nan") for name, tensor in weights.items()})
    adapters.load("broken", broken)
    with adapters.rows(["a", None, "broken", "b", None, "a"]):
        found = world.output(unet)
    assert found.isfinite().flatten(1).all(1).tolist() == [True, True, False, True, True, True]
    with adapters.rows(["a", None, "a", "b", None, "a"]):
        assert torch.equal(world.output(unet)[[0, 1, 3, 4, 5]], found[[0, 1, 3, 4, 5]])


def test_outside_of_a_call_with_adapters_the_unet_is_the_base(world: World):
    unet, adapters = world.loaded()
    with pytest.raises(KeyboardInterrupt), adapters.rows(["a"] * 6):
        raise KeyboardInterrupt
    assert torch.equal(world.output(unet), world.merged[None])
    with adapters.rows([None] * 6):
        assert torch.equal(world.output(unet), world.merged[None])


def test_another_number_of_rows_is_refused(world: World):
    unet, adapters = world.loaded()
    with adapters.rows(["a"] * 5), pytest.raises(ValueError, match="6 rows, but adapters were set for 5"):
        world.output(unet)
    with pytest.raises(ModelError, match="'d' is not loaded"), adapters.rows(["a", "d"]):
        pass


def test_in_bfloat16_rows_are_as_near_to_float32_as_those_of_the_merged_unet(world: World):
    keys = ["a", None, "c", "b", None, "a"]
    unet = world.fused(None).to(torch.bfloat16)
    adapters = RowAdapters(unet)
    for key, folder in world.folders.items():
        adapters.load(key, folder)
    with adapters.rows(keys), torch.no_grad():
        text = {name: rows.bfloat16() for name, rows in world.conditioning.items()}
        found = predict(unet, world.x.bfloat16(), world.t, text)
    assert found.dtype == torch.bfloat16
    assert error_of(found.float(), expected_rows(world, keys)) < 0.03


# ---- loading and unloading


def test_an_unloaded_adapter_leaves_nothing_behind(world: World):
    unet, adapters = world.loaded()
    hooks = [len(module._forward_hooks) for module in unet.modules()]
    with adapters.rows(["c"] * 6):
        before = world.output(unet)
    sizes = [adapters.num_bytes]
    for key in ("b", "a"):
        adapters.unload(key)
        sizes.append(adapters.num_bytes)
        with adapters.rows(["c", None, "c", "c", None, "c"]):
            found = world.output(unet)
        assert torch.equal(found[[0, 2, 3, 5]], before[[0, 2, 3, 5]])
    assert adapters.keys == ("c",)
    alone = RowAdapters(world.fused(None))
    alone.load("c", world.folders["c"])
    assert sizes[0] > sizes[1] > sizes[2] == alone.num_bytes > 0
    adapters.unload("c")
    assert adapters.num_bytes == 0
    assert sum(hooks) > 0 == sum(len(module._forward_hooks) for module in unet.modules())
    assert torch.equal(world.output(unet), world.merged[None])
    adapters.load("c", world.folders["c"])
    with adapters.rows(["c"] * 6):
        assert torch.equal(world.output(unet), before)
    with pytest.raises(ModelError, match="adapter 'c' is loaded already"):
        adapters.load("c", world.folders["a"])
    with pytest.raises(ModelError, match="adapter 'a' is not loaded"):
        adapters.unload("a")


def edit(folder: Path, change, metadata=None) -> None:
    """Write the adapter's file again, with other tensors or another peft config."""
    file = folder / LORA_WEIGHTS
    weights = {name: tensor.clone() for name, tensor in change(load_file(file)).items()}
    save_file(weights, file, metadata={"format": "pt"} | (metadata or {}))


def config_of(**settings) -> dict[str, str]:
    return {"lora_adapter_metadata": json.dumps({f"unet.{name}": value for name, value in settings.items()})}


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        config_of(r=4, lora_alpha=12, target_modules=list(ATTENTION)),
        config_of(r=4, lora_alpha=2, use_rslora=True, target_modules=list(ATTENTION)),
        config_of(
            r=9,
            lora_alpha=9,
            rank_pattern={"to_.*": 4},
            alpha_pattern={"attn2.to_k": 20},
            target_modules=["to_k"],
        ),
    ],
    ids=["none", "alpha", "rslora", "patterns"],
)
def test_scales_are_those_of_diffusers(world: World, tmp_path: Path, metadata):
    folder = shutil.copytree(world.folders["a"], tmp_path / "a")
    is_kept = (
        (lambda name: "to_k" in name) if "to_k" in str(metadata) and "to_q" not in str(metadata) else bool
    )
    edit(folder, lambda weights: {name: w for name, w in weights.items() if is_kept(name)}, metadata)
    expected = world.output(ModelFolder(world.base, folder).unet())
    unet = world.fused(None)
    adapters = RowAdapters(unet)
    adapters.load("a", folder)
    with adapters.rows(["a"] * 6):
        assert error_of(world.output(unet), expected) < TOLERANCE
    assert error_of(expected, world.merged["a"]) > 1e-3


@pytest.mark.parametrize("layers", ["attn", "attn1"], ids=["all", "some"])
def test_older_names_load_too_also_beside_newer_ones(world: World, tmp_path: Path, layers: str):
    """``lora.down`` for ``lora_A``: as adapters of attention were written, also beside other layers."""
    folder = shutil.copytree(world.folders["a"], tmp_path / "a")

    def older(name: str) -> str:
        if layers not in name:
            return name
        return name.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up.")

    config = config_of(r=4, lora_alpha=8, target_modules=list(ATTENTION))
    edit(folder, lambda weights: {older(name): tensor for name, tensor in weights.items()}, config)
    assert any(".lora.down." in name for name in load_file(folder / LORA_WEIGHTS))
    unet, adapters = world.loaded()
    adapters.load("older", folder)
    with adapters.rows(["older"] * 6):
        found = world.output(unet)
    with adapters.rows(["a"] * 6):
        assert torch.equal(world.output(unet), found)
    assert torch.equal(world.output(ModelFolder(world.base, folder).unet()), world.merged["a"])


# ---- what cannot be served is refused by name


def with_key(name: str):
    return lambda weights: weights | {name: torch.zeros(4, 4)}


FIRST = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            with_key("text_encoder.layers.0.q_proj.lora_A.weight"),
            "'text_encoder.layers.0.q_proj.lora_A.weight'",
        ),
        (with_key("unet.conv_in.alpha"), "'unet.conv_in.alpha' is no LoRA weight"),
        (
            with_key("unet.conv_in.lora_magnitude_vector"),
            "'unet.conv_in.lora_magnitude_vector' is no LoRA weight",
        ),
        (
            with_key("unet.conv_norm_out.lora_A.weight"),
            "another base model: 'unet.conv_norm_out.lora_A.weight'",
        ),
        (
            with_key("unet.blocks.9.to_q.lora_A.weight"),
            "another base model: 'unet.blocks.9.to_q.lora_A.weight'",
        ),
        (
            with_key("unet.conv_in.lora_A.weight"),
            "'conv_in' has one of .lora_A.weight and .lora_B.weight only",
        ),
        (
            lambda weights: weights | {FIRST: torch.zeros(4, 7)},
            r"has shape \[4, 7\], the layer needs \[4, 64\]",
        ),
        (lambda weights: weights | {FIRST: torch.zeros(3, 64)}, r"needs \[64, 3\]"),
        (lambda weights: {}, "hold no LoRA weight"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_before_anything_changes(
    world: World, tmp_path: Path, change, message
):
    folder = shutil.copytree(world.folders["a"], tmp_path / "a")
    edit(folder, change)
    unet, adapters = world.loaded()
    size = adapters.num_bytes
    with pytest.raises(ModelError, match=message) as error:
        adapters.load("bad", folder)
    assert str(folder) in str(error.value)
    assert (adapters.keys, adapters.num_bytes) == (("a", "b", "c"), size)
    with adapters.rows(["a"] * 6):
        assert error_of(world.output(unet), world.merged["a"]) < TOLERANCE


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (config_of(r=8, lora_alpha=8), "must be 8 as in its config, got 4"),
        (config_of(r=4, use_dora=True), "use_dora must be false, got True"),
        (config_of(r=4, unknown=1), "unknown"),
        ({"lora_adapter_metadata": "{"}, "cannot be loaded"),
        ({"lora_adapter_metadata": "[1]"}, "cannot be loaded"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(world: World, tmp_path: Path, metadata, message):
    folder = shutil.copytree(world.folders["a"], tmp_path / "a")
    edit(folder, lambda weights: weights, metadata)
    with pytest.raises(ModelError, match=message):
        RowAdapters(world.fused(None)).load("bad", folder)


def test_a_file_that_is_damaged_or_missing_is_refused(world: World, tmp_path: Path):
    adapters = RowAdapters(world.fused(None))
    folder = shutil.copytree(world.folders["a"], tmp_path / "a")
    data = (folder / LORA_WEIGHTS).read_bytes()
    (folder / LORA_WEIGHTS).write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError, match="cannot be loaded"):
        adapters.load("a", folder)
    with pytest.raises(ModelError, match="cannot be loaded"):
        adapters.load("a", tmp_path / "nothing")


def test_adapters_of_another_base_are_refused(tmp_path: Path):
    sd15, sdxl = (FOLDERS[family](tmp_path / family) for family in ("sd15", "sdxl"))
    adapter = write_adapter(sdxl, ADAPTERS["a"], tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"another base model: .*to_k"):
        RowAdapters(ModelFolder(sd15).unet()).load("a", adapter)


def test_a_trained_adapter_of_attention_and_convolutions_loses_no_layer_in_diffusers(world: World):
    """diffusers looks at the first name of a file to tell how all are written."""
    adapted = {
        name.removeprefix("unet.").rsplit(".lora", 1)[0]
        for name in load_file(world.folders["b"] / LORA_WEIGHTS)
    }
    before = world.fused(None).state_dict()
    unet = world.fused(None)
    unet.load_lora_adapter(str(world.folders["b"]), weight_name=LORA_WEIGHTS, prefix="unet")
    unet.fuse_lora()
    unet.unload_lora()
    after = unet.state_dict()
    changed = {name.removesuffix(".weight") for name in before if not torch.equal(before[name], after[name])}
    assert changed == adapted
    assert any("to_q" in name for name in adapted)
    assert any("conv1" in name for name in adapted)
