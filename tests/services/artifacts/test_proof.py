"""Folders as people have them: what cannot be aligned is refused at registration, with what is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dde_core.models.weight_files import STEMS
from dde_core.shapes import MODEL_DIR
from services.artifacts import models
from services.artifacts.proof import prove
from services.errors import BadRequest, NotFound
from tests.support.tiny_folders import FOLDERS
from tests.support.zero_folder import change, write_zero_folder

UNET = Path("unet") / f"{STEMS['unet']}.safetensors"
SCHEDULER = "scheduler/scheduler_config.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_zero_folder(tmp_path / "model")


def refusal(folder: Path | str, family: Any = None) -> BadRequest | NotFound:
    with pytest.raises((BadRequest, NotFound)) as refused:
        prove(str(folder), family)
    assert repr(str(folder)) in refused.value.message
    return refused.value


def rewrite(path: Path, edit: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> None:
    save_file(edit(load_file(path)), path)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_what_diffusers_saves_is_proven(family, tmp_path: Path):
    proof = prove(FOLDERS[family](tmp_path / "model").as_uri(), family)
    assert (proof.family, proof.lineage()) == (family, {})


def test_the_shipped_model_is_proven_and_has_its_old_digest():
    uri = MODEL_DIR.as_uri()
    assert models.folder_digest(uri, prove(uri).tensors) == models.folder_digest(uri)


def test_the_layers_for_adapters_are_read_from_the_proven_headers(folder: Path):
    layers = models.unet_layers(str(folder))
    assert "mid_block.attentions.0.transformer_blocks.0.attn1.to_q" in layers
    assert "conv_norm_out" not in layers


# ---- weights


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda t: {name: t[name] for name in t if name != "text_projection.weight"},
            "text_encoder_2 lacks 1 of 21 tensors that its config.json asks for: text_projection.weight",
        ),
        (lambda t: dict(list(t.items())[::2]), "text_encoder_2 lacks 10 of 21 tensors"),
        (lambda t: {f"te2.{name}": t[name] for name in t}, "lacks 21 of 21 .*its files hold te2.embeddings"),
        (lambda t: t | {"text_projection.weight": np.zeros((4, 6), np.float32)}, r"\[4, 6\].* for \[6, 4\]"),
        (lambda t: t | {"text_projection.weight": np.zeros((6, 4), np.int8)}, "loaded as float32, got I8"),
        (
            lambda t: t | {"lora.up.weight": np.zeros(1, np.float32)},
            "1 tensors .* not ask for: lora.up.weight",
        ),
        (
            lambda t: t | {"text_model.text_projection.weight": np.zeros((6, 4), np.float32)},
            "text_projection.weight twice",
        ),
    ],
)
def test_tensors_that_do_not_fit_the_config_are_named(tmp_path: Path, edit, message: str):
    folder = write_zero_folder(tmp_path / "model", "sdxl")
    rewrite(folder / "text_encoder_2" / "model.safetensors", edit)
    assert_matches(refusal(folder), message)


def assert_matches(error: BadRequest, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        raise error


def test_old_names_of_tensors_are_known(folder: Path):
    ids = {"text_model.embeddings.position_ids": np.arange(16)[None]}
    rewrite(
        folder / "text_encoder" / "model.safetensors", lambda t: {f"text_model.{n}": t[n] for n in t} | ids
    )
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(name: str) -> str:
        for new, before in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")
        return name

    rewrite(folder / "vae" / UNET.name, lambda t: {rename(name): t[name] for name in t})
    prove(str(folder))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "is a Git LFS pointer"),
        (b"", "is not a safetensors file"),
        (None, "lacks unet/diffusion_pytorch_model.safetensors"),
    ],
)
def test_a_unet_that_was_never_downloaded_is_refused(folder: Path, data: bytes | None, message: str):
    (folder / UNET).unlink()
    if data is not None:
        (folder / UNET).write_bytes(data)
    assert_matches(refusal(folder), message)


def test_a_unet_that_is_cut_in_half_is_refused(folder: Path):
    data = (folder / UNET).read_bytes()
    (folder / UNET).write_bytes(data[: len(data) // 2])
    assert_matches(refusal(folder), f"{UNET} is cut off: it has {len(data) // 2} of {len(data)} bytes")


def shard(folder: Path) -> tuple[Path, Path, Path]:
    """Split the U-Net's weights into two shards. Returns them and their index."""
    tensors = load_file(folder / UNET)
    (folder / UNET).unlink()
    paths = [folder / "unet" / f"{STEMS['unet']}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    halves = [dict(list(tensors.items())[i::2]) for i in (0, 1)]
    for path, half in zip(paths, halves, strict=True):
        save_file(half, path)
    places = {name: path.name for path, half in zip(paths, halves, strict=True) for name in half}
    index = folder / f"{UNET}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return paths[0], paths[1], index


def test_shards_are_proven_with_their_index(folder: Path):
    first, second, index = shard(folder)
    assert len(prove(str(folder)).tensors) == 4
    places = json.loads(index.read_text())
    some = next(name for name, place in places["weight_map"].items() if place == first.name)
    moved = places | {"weight_map": places["weight_map"] | {some: second.name}}
    index.write_text(json.dumps(moved))
    assert_matches(refusal(folder), f"{second.name} lacks {some}, which {index.name} says it holds")
    index.write_text(json.dumps(places))
    rewrite(second, lambda t: t | {some: np.zeros(1, np.float32)})
    assert_matches(refusal(folder), f"holds {some}, which another shard holds as well")
    second.unlink()
    assert_matches(refusal(folder), f"it lacks unet/{second.name}")
    index.unlink()
    assert_matches(refusal(folder), "has shards of weights, but lacks their index")


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_one_weight_that_is_not_finite_is_found_while_the_digest_is_computed(folder: Path, dtype, value):
    def spoil(tensors):
        tensors["conv_out.bias"] = tensors["conv_out.bias"].astype(dtype)
        tensors["conv_out.bias"][1] = value
        return tensors

    rewrite(folder / UNET, spoil)
    with pytest.raises(BadRequest, match=f"conv_out.bias of {UNET} has infinite or NaN values"):
        models.folder_digest(str(folder), prove(str(folder)).tensors)
    assert models.folder_digest(str(folder)), "the digest alone asks for nothing"


def test_a_variant_that_is_all_there_is_is_recorded(folder: Path):
    for part in ("unet", "vae"):
        path = folder / part / UNET.name
        rewrite(path, lambda t: {name: value.astype(np.float16) for name, value in t.items()})
        path.rename(path.with_name(f"{STEMS[part]}.fp16.safetensors"))
    loaded = "variant fp16, loaded as float32"
    assert prove(str(folder)).lineage() == {"weights": {"unet": loaded, "vae": loaded}}


# ---- JSON files, classes and tokenizers


@pytest.mark.parametrize(
    "path",
    [
        "unet/config.json",
        "vae/config.json",
        "text_encoder/config.json",
        "tokenizer/tokenizer_config.json",
        "tokenizer/tokenizer.json",
        SCHEDULER,
        "model_index.json",
    ],
)
@pytest.mark.parametrize("data", [b"[]", b"{", b"\xff\x00", b"[" * 200_000, b'{"a":' * 200_000, None])
def test_every_json_file_is_an_object_or_refused(folder: Path, path: str, data: bytes | None):
    for other in ("vocab.json", "merges.txt"):
        (folder / "tokenizer" / other).unlink()
    (folder / path).unlink()
    if data is not None:
        (folder / path).write_bytes(data)
    error = refusal(folder)
    assert path.rpartition("/")[2] in error.message
    assert error.status == 400


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text_encoder": ["transformers", "BertModel"]}, "text_encoder must be CLIPTextModel"),
        ({"vae": ["diffusers", "AutoencoderTiny"]}, "vae must be AutoencoderKL"),
        ({"unet": ["my_unet", "UNet2DConditionModel"]}, "unet .* has code of its own, which is never run"),
        ({"unet": ["diffusers"]}, "unet must be UNet2DConditionModel"),
        ({"_class_name": ["pipeline", "X"]}, "pipeline .* has code of its own, which is never run"),
        ({"_class_name": {"a": 1}}, "pipeline .* is not supported yet"),
    ],
)
def test_a_part_of_another_class_is_refused_by_its_name(folder: Path, fields, message: str):
    change(folder, "model_index.json", **fields)
    assert_matches(refusal(folder), message)


@pytest.mark.parametrize(
    ("path", "fields", "message"),
    [
        ("unet/config.json", {"time_cond_proj_dim": 256}, "unet.time_cond_proj_dim must be None"),
        ("vae/config.json", {"latents_mean": [0.0] * 4}, "vae.latents_mean must be None"),
        ("text_encoder/config.json", {"model_type": "bert"}, "text_encoder.model_type must be"),
        ("unet/config.json", {"in_channels": 8, "out_channels": 8}, "latent_channels = 4, got 8"),
        ("unet/config.json", {"cross_attention_dim": 8}, "unet.cross_attention_dim must be .* 4 in all"),
        (SCHEDULER, {"timestep_spacing": "karras"}, "timestep_spacing must be one of"),
        (SCHEDULER, {"rescale_betas_zero_snr": True}, "needs prediction_type 'v_prediction'"),
        (SCHEDULER, {"beta_end": 0.99}, "beta_end leaves nothing of an image at t = 391 of 1000"),
    ],
)
def test_a_field_that_asks_for_other_arithmetic_is_refused(folder: Path, path, fields, message):
    change(folder, path, **fields)
    assert_matches(refusal(folder), message)


def test_sdxl_must_fit_its_pooled_text(tmp_path: Path):
    folder = write_zero_folder(tmp_path / "model", "sdxl")
    change(folder, "unet/config.json", projection_class_embeddings_input_dim=16)
    assert_matches(refusal(folder), "projection_class_embeddings_input_dim must be 18")


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (SCHEDULER, {"timestep_spacing": "trailing"}),
        (SCHEDULER, {"timestep_spacing": "linspace"}),
        (SCHEDULER, {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}),
        ("unet/config.json", {"sample_size": None}),
        ("unet/config.json", {"sample_size": [8, 16]}),
        ("model_index.json", {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}),
    ],
)
def test_what_is_done_is_not_refused(folder: Path, path, fields):
    change(folder, path, **fields)
    prove(str(folder))


def test_a_tokenizer_without_a_vocabulary_is_refused(folder: Path):
    for path in (folder / "tokenizer").iterdir():
        if path.name != "tokenizer_config.json":
            path.unlink()
    assert_matches(refusal(folder), "tokenizer lacks tokenizer.json, or vocab.json and merges.txt")


# ---- what people have in place of a folder


@pytest.mark.parametrize(
    ("uri", "advice"),
    [
        ("/models/dreamshaper_8.safetensors", "from_single_file"),
        ("/models/v1-5-pruned.ckpt", "from_single_file"),
        ("hf://stabilityai/stable-diffusion-xl-base-1.0", "hf download"),
        ("https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0", "hf download"),
        ("stabilityai/stable-diffusion-xl-base-1.0", "hf download"),
        ("/nowhere", "hf download"),
    ],
)
def test_what_is_no_folder_is_refused_with_the_way_to_one(uri: str, advice: str):
    error = refusal(uri)
    assert advice in error.message
    assert error.code == "no_diffusers_folder"


def test_a_cached_repository_is_one_of_symbolic_links(folder: Path, tmp_path: Path):
    """Hugging Face's cache links every file of a snapshot to a blob."""
    blobs = tmp_path / "blobs"
    shutil.move(folder, blobs)
    for path in list(blobs.rglob("*")):
        if path.is_file():
            target = folder / path.relative_to(blobs)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(path)
    prove(str(folder))
