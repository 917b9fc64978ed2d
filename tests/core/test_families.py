"""Both families: images equal those of diffusers, diffusers loads what is saved, other kinds are refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from dde_core.conditioning import predict
from dde_core.config import LoraConfig, SampleConfig, TrainConfig
from dde_core.errors import ConfigError, ModelError
from dde_core.generation import TextToImage
from dde_core.models.folder import ModelFolder
from dde_core.models.policy import Policy, make_optimizer
from dde_core.models.saving import save_adapters, save_aligned
from dde_core.models.text import TextEncoders, time_ids
from dde_core.models.tokens import tokenize
from dde_core.noise import initial_latents
from tests.support.tiny_folders import FOLDERS, sdxl_folder
from tests.support.zero_folder import change

PIPELINES = {"sd15": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
PROMPTS, SEEDS = ["a small red circle at the left", "a large blue cross on a white background"], [3, 4]
SAMPLE = SampleConfig(steps=4, guidance_scale=3.0)


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FOLDERS[family](tmp_path_factory.mktemp("models") / family)


def theirs(family: str, folder: Path, adapters: Path | None = None) -> np.ndarray:
    pipeline = PIPELINES[family].from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if adapters:
        pipeline.load_lora_weights(adapters)
    latents = torch.stack([initial_latents(seed, (4, 8, 8)) for seed in SEEDS])
    return (
        pipeline(PROMPTS, latents=latents, num_inference_steps=4, guidance_scale=3.0, output_type="np").images
        * 255
    )


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_our_pictures_are_those_of_the_diffusers_pipeline(family: str, prediction_type: str, tmp_path: Path):
    path = FOLDERS[family](tmp_path / "model", prediction_type)
    assert ModelFolder(path).schedule().prediction_type == prediction_type
    ours = TextToImage(ModelFolder(path))(PROMPTS, SEEDS, SAMPLE)
    assert np.abs(ours - theirs(family, path)).max() <= 1.0, "equal but for rounding"


@pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning")
@pytest.mark.parametrize(
    "fields",
    [
        {"steps_offset": 0},
        {"steps_offset": 2},
        {"timestep_spacing": "trailing"},
        {"timestep_spacing": "linspace"},
        {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
        {"beta_schedule": "linear", "set_alpha_to_one": True},
    ],
    ids=str,
)
def test_a_schedulers_fields_change_our_pictures_as_they_change_diffusers(
    family: str, folder: Path, tmp_path: Path, fields
):
    path = copy(folder, tmp_path / "model")
    change(path, "scheduler/scheduler_config.json", **fields)
    ours = TextToImage(ModelFolder(path))(PROMPTS, SEEDS, SAMPLE)
    assert np.abs(ours - theirs(family, path)).max() <= 1.0, "equal but for rounding"


def test_sdxl_that_encodes_the_empty_prompt_is_followed_too(tmp_path: Path):
    path = sdxl_folder(tmp_path / "model", zeros=False)
    ours = TextToImage(ModelFolder(path))(PROMPTS, SEEDS, SAMPLE)
    assert np.abs(ours - theirs("sdxl", path)).max() <= 1.0


def test_time_ids_are_what_the_pipeline_counts_crops_in():
    ids = time_ids(np.array([[1000, 2000], [32, 32]]), np.array([[0, 500], [0, 0]]), (512, 512))
    assert ids.tolist() == [[1000, 2000, 0, 256, 512, 512], [32, 32, 0, 0, 512, 512]]


def test_no_caption_is_zeros_in_sdxl_and_the_empty_caption_in_sd15(family: str, folder: Path):
    encoders, tokenizers = TextEncoders(ModelFolder(folder)), ModelFolder(folder).tokenizers()
    text = encoders(tokenize(tokenizers, ["", PROMPTS[0]]))
    empty = text["encoder_hidden_states"][0]
    assert bool((empty == 0).all()) == (family == "sdxl")
    assert (text["encoder_hidden_states"][1] != 0).any()
    assert len(tokenizers) == {"sd15": 1, "sdxl": 2}[family]


def train_a_little(folder: Path, training: TrainConfig) -> Policy:
    """Two steps in which every adapter and weight moves."""
    policy = Policy(ModelFolder(folder), training)
    optimizer = make_optimizer(policy.parameters(), training)
    text = conditioning(folder)
    for seed in range(2):
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        predict(policy.unet, x, torch.tensor([5, 500]), text).square().mean().backward()
        optimizer.step()
    return policy


def save(policy: Policy, target: Path) -> None:
    policy.write(policy.weights(), target)


def conditioning(folder: Path) -> dict[str, torch.Tensor]:
    encoders = TextEncoders(ModelFolder(folder))
    text = encoders(tokenize(ModelFolder(folder).tokenizers(), PROMPTS))
    return encoders.with_sizes(text, np.full((2, 2), 32), np.zeros((2, 2), np.int64), (32, 32))


LORA = TrainConfig(learning_rate=1e-2, lora=LoraConfig(rank=4, alpha=8))


def test_adapters_load_in_diffusers_as_they_are_and_draw_what_we_draw(
    family: str, folder: Path, tmp_path: Path
):
    save(train_a_little(folder, LORA), tmp_path / "weights")
    save_adapters(tmp_path / "weights", tmp_path / "lora")
    assert [path.name for path in (tmp_path / "lora").iterdir()] == ["pytorch_lora_weights.safetensors"]
    ours = TextToImage(ModelFolder(folder, tmp_path / "lora"))(PROMPTS, SEEDS, SAMPLE)
    assert np.abs(ours - theirs(family, folder, tmp_path / "lora")).max() <= 1.0
    assert np.abs(ours - theirs(family, folder)).max() > 5.0, "the adapters do something"


def test_merged_adapters_are_the_policy_that_was_trained(folder: Path, tmp_path: Path):
    policy = train_a_little(folder, LORA)
    save(policy, tmp_path)
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([5, 500]), conditioning(folder)
    with torch.no_grad():
        trained = predict(policy.unet, x, t, text)
        merged = predict(ModelFolder(folder, tmp_path).unet(), x, t, text)
        base = predict(ModelFolder(folder).unet(), x, t, text)
    torch.testing.assert_close(merged, trained, rtol=1e-4, atol=1e-5)
    assert (trained - base).abs().max() > 1e-2
    assert torch.equal(predict(policy.reference, x, t, text), base), (
        "the reference is the policy with its adapters off"
    )


def test_adapters_start_as_the_reference_to_the_bit_and_the_same_at_every_start(folder: Path):
    first, again = (Policy(ModelFolder(folder), LORA) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), again.parameters(), strict=True))
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([5, 500]), conditioning(folder)
    with torch.no_grad():
        assert torch.equal(predict(first.unet, x, t, text), predict(first.reference, x, t, text))
    assert first.parameters()


def test_only_adapters_are_trained_where_they_are_requested(folder: Path):
    base = ModelFolder(folder).unet().state_dict()
    policy = train_a_little(folder, LORA)
    frozen = {
        name.replace(".base_layer", ""): value
        for name, value in policy.unet.state_dict().items()
        if "lora_" not in name
    }
    assert frozen.keys() == base.keys()
    assert all(torch.equal(frozen[name], base[name]) for name in base)


LOAD = """
import json, sys, torch, diffusers

def draw(kind, folder, adapters=""):
    pipeline = getattr(diffusers, kind).from_pretrained(folder, dtype=torch.float32)
    if adapters:
        pipeline.load_lora_weights(adapters)
    seeded = torch.Generator().manual_seed(0)
    return pipeline("a red circle", num_inference_steps=2, output_type="np", generator=seeded).images[0]

for line in sys.stdin:
    kind, folder, *saved = json.loads(line)
    base, aligned = draw(kind, folder), draw(kind, *saved)
    assert aligned.shape == (32, 32, 3) and aligned.std() > 0
    assert abs(aligned - base).max() > 1e-3
    assert not [name for name in sys.modules if name.split(".")[0] in ("dde_core", "services")]
    print("loaded", flush=True)
"""


@pytest.fixture(scope="module")
def load_without_our_code(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., None]]:
    """Loads and draws in one process for all tests, which imports diffusers once."""
    folder = tmp_path_factory.mktemp("plain")
    log = folder / "log"
    with (
        log.open("w") as errors,
        subprocess.Popen(
            [sys.executable, "-c", LOAD],
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process,
    ):
        assert process.stdin
        assert process.stdout

        def load(*words: str) -> None:
            process.stdin.write(json.dumps(words) + "\n")
            process.stdin.flush()
            assert process.stdout.readline() == "loaded\n", log.read_text()

        yield load


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
def test_a_process_without_our_code_loads_what_was_saved(
    family: str, folder: Path, tmp_path: Path, lora: bool, load_without_our_code: Callable[..., None]
):
    save(train_a_little(folder, LORA if lora else TrainConfig(learning_rate=1e-3)), tmp_path / "weights")
    version = save_adapters if lora else partial(save_aligned, folder)
    version(tmp_path / "weights", tmp_path / "model")
    aligned = [str(folder), str(tmp_path / "model")] if lora else [str(tmp_path / "model")]
    load_without_our_code(PIPELINES[family].__name__, str(folder), *aligned)


def test_gradient_checkpointing_changes_no_gradient(folder: Path):
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([5, 500]), conditioning(folder)
    gradients = []
    for checkpointing in (False, True):
        policy = Policy(ModelFolder(folder), TrainConfig(gradient_checkpointing=checkpointing))
        predict(policy.unet, x, t, text).square().mean().backward()
        gradients.append([parameter.grad for parameter in policy.parameters()])
        assert policy.unet.is_gradient_checkpointing == checkpointing
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# ---- refusals


def test_another_family_is_named_as_not_supported_before_a_weight_is_read(folder: Path, tmp_path: Path):
    for pipeline in ("StableDiffusion3Pipeline", "FluxPipeline"):
        path = tmp_path / pipeline
        path.mkdir()
        (path / "model_index.json").write_text(
            json.dumps({"_class_name": pipeline, "transformer": ["diffusers", "X"]})
        )
        with pytest.raises(ModelError, match=f"pipeline '{pipeline}' is not supported yet"):
            ModelFolder(path)


def test_missing_components_are_named(folder: Path, family: str, tmp_path: Path):
    shutil.copytree(folder, tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    (tmp_path / "model" / "model_index.json").write_text(json.dumps(index | {"text_encoder": [None, None]}))
    with pytest.raises(ModelError, match=f"lacks text_encoder, which a {family} model needs"):
        ModelFolder(tmp_path / "model")


def copy(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


def weights_of(folder: Path, part: str) -> Path:
    return next((folder / part).glob("*.safetensors"))


def rewrite(path: Path, change) -> None:
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("text_encoder_2", lambda t: {name: t[name] for name in t if name != "text_projection.weight"}),
        ("text_encoder_2", lambda t: dict(list(t.items())[::2])),
        ("text_encoder_2", lambda t: {f"te2.{name}": value for name, value in t.items()}),
        ("text_encoder", lambda t: dict(list(t.items())[1:])),
        ("unet", lambda t: dict(list(t.items())[1:])),
        ("vae", lambda t: dict(list(t.items())[:-1])),
    ],
)
def test_a_missing_tensor_is_an_error_and_never_a_random_one(tmp_path: Path, part: str, change):
    model = ModelFolder(sdxl_folder(tmp_path / "model"))
    rewrite(weights_of(model.path, part), change)
    load = {"unet": model.unet, "vae": model.vae}.get(part, model.text_encoders)
    with pytest.raises(ModelError, match=f"{part} of .* cannot be loaded: .* of its tensors are missing"):
        load()


def test_a_tensor_of_another_shape_or_a_damaged_file_is_an_error(folder: Path, tmp_path: Path):
    model = ModelFolder(copy(folder, tmp_path / "model"))
    path = weights_of(model.path, "text_encoder")
    rewrite(path, lambda t: {name: value[..., :5].clone() for name, value in t.items()})
    with pytest.raises(ModelError, match=r"text_encoder of .* cannot be loaded"):
        model.text_encoders()
    for part, load in (("unet", model.unet), ("vae", model.vae)):
        path = weights_of(model.path, part)
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(ModelError, match=f"{part} of .* cannot be loaded"):
            load()


def test_a_tokenizer_without_a_vocabulary_is_an_error(folder: Path, tmp_path: Path):
    model = ModelFolder(copy(folder, tmp_path / "model"))
    for path in (model.path / "tokenizer").iterdir():
        if path.name != "tokenizer_config.json":
            path.unlink()
    with pytest.raises(ModelError, match=r"tokenizer of .* gives 'red' and 'big' the same ids"):
        model.tokenizers()


def test_weights_under_old_names_are_loaded(family: str, folder: Path, tmp_path: Path):
    model = ModelFolder(copy(folder, tmp_path / "model"))
    rewrite(
        weights_of(model.path, "text_encoder"),
        lambda t: {f"text_model.{name.removeprefix('text_model.')}": value for name, value in t.items()},
    )
    assert np.array_equal(
        TextToImage(model)(PROMPTS, SEEDS, SAMPLE), TextToImage(ModelFolder(folder))(PROMPTS, SEEDS, SAMPLE)
    )


def as_variant(folder: Path) -> None:
    """Leave weights in half precision only, under the names of diffusers' fp16 variant."""
    for path in list(folder.glob("*/*.safetensors")):
        rewrite(path, lambda t: {name: value.half() for name, value in t.items()})
        path.rename(path.with_name(f"{path.stem}.fp16.safetensors"))


def test_a_variant_is_loaded_as_float32_and_aligned_under_the_default_names(
    family: str, folder: Path, tmp_path: Path
):
    half = copy(folder, tmp_path / "half")
    as_variant(half)
    model = ModelFolder(half)
    for part in (model.unet(), model.vae(), *model.text_encoders()):
        assert {parameter.dtype for parameter in part.parameters()} == {torch.float32}
    ours = TextToImage(model)(PROMPTS, SEEDS, SAMPLE)
    assert np.abs(ours.astype(int) - TextToImage(ModelFolder(folder))(PROMPTS, SEEDS, SAMPLE)).max() <= 16
    Policy(model, TrainConfig()).write(model.unet().state_dict(), tmp_path / "weights")
    save_aligned(half, tmp_path / "weights", tmp_path / "aligned")
    assert np.abs(theirs(family, tmp_path / "aligned") - ours).max() <= 1.0, "diffusers loads it unchanged"


@pytest.mark.parametrize("size", [None, [8, 16]])
def test_the_images_size_may_be_absent_or_a_height_and_a_width(
    family: str, folder: Path, tmp_path: Path, size
):
    model = ModelFolder(copy(folder, tmp_path / "model"))
    path = model.path / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sample_size": size}))
    default = {"sd15": 64, "sdxl": 128}[family]
    height, width = size or (default, default)
    assert model.image_size() == (height * 4, width * 4)
    if size is None:
        assert model.resolution() == default * 4
    else:
        assert TextToImage(model)(PROMPTS, SEEDS, SAMPLE).shape == (2, 32, 64, 3)
        with pytest.raises(ConfigError, match=r"data\.resolution must be given: .* 64 x 32 px"):
            model.resolution()


def test_another_prediction_type_is_refused_with_its_value(folder: Path, tmp_path: Path):
    shutil.copytree(folder, tmp_path / "model")
    path = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "sample"}))
    with pytest.raises(
        ConfigError, match="prediction_type must be one of epsilon, v_prediction, got 'sample'"
    ):
        ModelFolder(tmp_path / "model").schedule()


def test_adapters_that_match_nothing_are_refused_by_name(folder: Path):
    for target in ("to_qq", "norm1", "q"):
        with pytest.raises(
            ConfigError, match=f"matches no linear or convolution layer of the U-Net, got '{target}'"
        ):
            Policy(ModelFolder(folder), TrainConfig(lora=LoraConfig(targets=("to_q", target))))


def test_an_optimizer_whose_library_is_missing_is_refused_with_what_to_install(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    training = TrainConfig(optimizer="adamw_8bit")
    with pytest.raises(
        ConfigError, match=r"needs bitsandbytes, which is not installed: pip install 'dde-align\[8bit\]'"
    ):
        make_optimizer(Policy(ModelFolder(folder), training).parameters(), training)
