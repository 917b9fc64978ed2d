"""Every loader, on tiny checkpoints in the original layouts, against the same arithmetic in plain torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import BlipVisionConfig

from dde_core.errors import ConfigError, DataError, NonFiniteError
from dde_core.scorers import clip_folders, hps, image_reward, load
from dde_core.scorers.load import ModelScorer
from tests.support import plain_scorers as plain
from tests.support import scorers as tiny

PROMPTS = ["a red star", "the big blue star on a star", "", "a blue text", "star " * 100]
IMAGES = np.random.default_rng(0).integers(0, 256, (5, 41, 33, 3), dtype=np.uint8)
IMAGES.flags.writeable = False
"""As Ray hands them out."""
TOLERANCE = 1e-6
KINDS = ("clip", "pickscore", "hps", "aesthetic", "imagereward", "diversity", "drift")
FEATURES = ("diversity", "drift")


def expected(kind: str, pixels: Tensor, text: dict[str, Tensor]) -> Tensor:
    """What the kind gives for pixels and ids, from the tensors that ``write_tiny`` writes."""
    if kind == "imagereward":
        return plain.image_reward(
            tiny.image_reward_tensors(), pixels, text["input_ids"], text["attention_mask"]
        )
    if kind == "hps":
        w = tiny.open_clip_tensors()
        images = plain.clip_images(w, pixels, 16, plain.gelu)
        return (images * plain.clip_prompts(w, text["input_ids"], 16, plain.gelu)).sum(1)
    w = plain.as_open_clip(tiny.clip_folder_tensors())
    images = plain.clip_images(w, pixels, tiny.CLIP_HEADS, plain.quick_gelu)
    if kind in FEATURES:
        return images
    if kind == "aesthetic":
        return plain.head(images, tiny.head_tensors(tiny.EMBEDDING))
    return (images * plain.clip_prompts(w, text["input_ids"], tiny.CLIP_HEADS, plain.quick_gelu)).sum(1)


def loaded(kind: str, folder: Path, **more) -> ModelScorer:
    checkpoint, processor = tiny.write_tiny(kind, folder)
    return load.load(kind, checkpoint, processor, **more)


def difference(scorer: ModelScorer, kind: str, images: np.ndarray = IMAGES) -> float:
    found = torch.from_numpy(scorer(images, PROMPTS))
    return float((found - expected(kind, *scorer.prepare(images, PROMPTS))).abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_scorer_computes_what_its_authors_compute(kind: str, tmp_path: Path):
    scorer = loaded(kind, tmp_path, batch_size=2)
    scores = scorer(IMAGES, PROMPTS)
    assert scores.dtype == np.float64
    assert scores.shape == ((5, tiny.EMBEDDING) if kind in FEATURES else (5,))
    assert difference(scorer, kind) < TOLERANCE * max(1.0, float(np.abs(scores).max()))
    assert scores.std(axis=0).min() > 1e-3, "tells images apart"


@pytest.mark.parametrize("kind", KINDS)
def test_the_score_of_an_image_does_not_depend_on_the_batch(kind: str, tmp_path: Path):
    alone = loaded(kind, tmp_path, batch_size=1)(IMAGES, PROMPTS)
    together = loaded(kind, tmp_path, batch_size=5)(IMAGES, PROMPTS)
    np.testing.assert_allclose(alone, together, atol=1e-5)


@pytest.mark.parametrize("kind", ["clip", "hps", "imagereward"])
def test_a_score_depends_on_its_prompt(kind: str, tmp_path: Path):
    scorer = loaded(kind, tmp_path)
    same = np.repeat(IMAGES[:1], 2, axis=0)
    first, second = scorer(same, PROMPTS[:2])
    assert abs(first - second) > 1e-3


@pytest.mark.parametrize("kind", FEATURES)
def test_features_have_length_1(kind: str, tmp_path: Path):
    lengths = np.linalg.norm(loaded(kind, tmp_path)(IMAGES, PROMPTS), axis=1)
    np.testing.assert_allclose(lengths, 1, atol=1e-12)


@pytest.mark.parametrize("kind", ["clip", "hps", "aesthetic", "imagereward"])
def test_a_score_has_a_gradient_by_the_image(kind: str, tmp_path: Path):
    scorer = loaded(kind, tmp_path)
    pixels, text = scorer.prepare(IMAGES, PROMPTS)
    pixels.requires_grad_(True)
    scorer.model(pixels, text).sum().backward()
    assert pixels.grad is not None
    step = 1e-2 * pixels.grad[0] / pixels.grad[0].norm()
    moved = pixels.detach().clone()
    moved[0] += step
    found = expected(kind, moved, text)[0] - expected(kind, pixels.detach(), text)[0]
    slope = float((pixels.grad[0] * step).sum())
    assert float(found) == pytest.approx(slope, rel=0.05)
    assert all(parameter.grad is None for parameter in scorer.model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_near_float32_and_is_described(kind: str, tmp_path: Path):
    exact = loaded(kind, tmp_path)
    half = loaded(kind, tmp_path, dtype=torch.bfloat16)
    assert half.description["dtype"] == "bfloat16"
    assert next(half.model.parameters()).dtype == torch.bfloat16
    wanted = exact(IMAGES, PROMPTS)
    spread = float(np.abs(wanted).max())
    assert 0 < np.abs(half(IMAGES, PROMPTS) - wanted).max() < 0.1 * max(spread, 1)


@pytest.mark.parametrize("kind", ["hps", "aesthetic"])
def test_safetensors_give_the_same_scores_as_a_pickle(kind: str, tmp_path: Path):
    checkpoint, processor = tiny.write_tiny(kind, tmp_path)
    tensors = tiny.open_clip_tensors() if kind == "hps" else tiny.head_tensors(tiny.EMBEDDING)
    save_file(tensors, tmp_path / "same.safetensors")
    scores = [
        load.load(kind, path, processor)(IMAGES, PROMPTS)
        for path in (checkpoint, tmp_path / "same.safetensors")
    ]
    np.testing.assert_array_equal(*scores)


@pytest.mark.parametrize("kind", ["hps", "imagereward"])
def test_half_precision_files_are_computed_in_float32(kind: str, tmp_path: Path):
    halves = {
        name: each.half() if each.is_floating_point() else each
        for name, each in (tiny.open_clip_tensors() if kind == "hps" else tiny.image_reward_tensors()).items()
    }
    checkpoint, processor = tiny.write_tiny(kind, tmp_path)
    (tiny.write_hps if kind == "hps" else tiny.write_image_reward)(checkpoint, halves)
    scorer = load.load(kind, checkpoint, processor)
    assert {parameter.dtype for parameter in scorer.model.parameters()} == {torch.float32}
    pixels, text = scorer.prepare(IMAGES, PROMPTS)
    if kind == "hps":
        images = plain.clip_images(halves, pixels, 16, plain.gelu)
        wanted = (images * plain.clip_prompts(halves, text["input_ids"], 16, plain.gelu)).sum(1)
    else:
        wanted = plain.image_reward(halves, pixels, text["input_ids"], text["attention_mask"])
    np.testing.assert_allclose(scorer(IMAGES, PROMPTS), wanted.numpy(), rtol=TOLERANCE, atol=TOLERANCE)


def test_the_first_aesthetic_head_is_one_linear_layer(tmp_path: Path):
    _, clip = tiny.write_tiny("aesthetic", tmp_path)
    draw = tiny.Draw(9)
    weight = draw(1, tiny.EMBEDDING, std=1.0)
    bias = draw(1, std=1.0)
    head = tiny.write_head(tmp_path / "sa_0_4_vit_l_14_linear.pth", {"weight": weight, "bias": bias})
    scorer = load.load("aesthetic", head, clip)
    features = expected("drift", *scorer.prepare(IMAGES, PROMPTS))
    wanted = features @ weight[0].double() + bias[0].double()
    np.testing.assert_allclose(scorer(IMAGES, PROMPTS), wanted.numpy(), atol=2e-6)


def test_a_clip_saved_by_transformers_loads_with_the_ids_that_old_files_hold(tmp_path: Path):
    checkpoint, _ = tiny.write_tiny("clip", tmp_path)
    wanted = load.load("clip", checkpoint)(IMAGES, PROMPTS)
    ids = {"text_model.embeddings.position_ids": torch.arange(tiny.POSITIONS)[None]}
    torch.save(tiny.clip_folder_tensors() | ids, checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    np.testing.assert_array_equal(load.load("clip", checkpoint)(IMAGES, PROMPTS), wanted)


# ---- mistakes that give other scores without a word


@pytest.mark.parametrize(("name", "wrong"), [("ACTIVATION", "quick_gelu"), ("HEADS", 8), ("EPS", 1e-3)])
def test_parity_catches_a_wrong_hps(name, wrong, tmp_path, monkeypatch):
    monkeypatch.setattr(hps, name, wrong)
    assert difference(loaded("hps", tmp_path), "hps") > 100 * TOLERANCE


def test_parity_catches_a_projection_that_is_not_transposed(tmp_path, monkeypatch):
    convert = hps.to_transformers

    def forgetful(values: dict[str, Tensor]) -> dict[str, Tensor]:
        return convert(values) | {"text_projection.weight": values["text_projection"]}

    monkeypatch.setattr(hps, "to_transformers", forgetful)
    assert difference(loaded("hps", tmp_path), "hps") > 100 * TOLERANCE


@pytest.mark.parametrize(
    ("name", "wrong"), [("VISION_HEADS", 8), ("VISION_EPS", 1e-3)], ids=["vision heads", "vision eps"]
)
def test_parity_catches_a_wrong_image_reward(name, wrong, tmp_path, monkeypatch):
    monkeypatch.setattr(image_reward, name, wrong)
    assert difference(loaded("imagereward", tmp_path), "imagereward") > 100 * TOLERANCE


def test_the_eps_of_blip_is_not_the_one_of_transformers():
    assert image_reward.VISION_EPS == 1e-6 != BlipVisionConfig().layer_norm_eps


@pytest.mark.parametrize("field", ["num_attention_heads", "layer_norm_eps"])
def test_parity_catches_a_med_config_that_is_not_read(field, tmp_path, monkeypatch):
    values = image_reward.read_object
    wrong = {"num_attention_heads": 8, "layer_norm_eps": 1e-2}
    monkeypatch.setattr(image_reward, "read_object", lambda path: values(path) | {field: wrong[field]})
    assert difference(loaded("imagereward", tmp_path), "imagereward") > 100 * TOLERANCE


def test_parity_catches_a_text_encoder_that_sees_only_earlier_tokens(tmp_path, monkeypatch):
    scorer = loaded("imagereward", tmp_path)
    encoder = scorer.model.text.forward
    monkeypatch.setattr(scorer.model.text, "forward", lambda **more: encoder(**more | {"is_decoder": True}))
    assert difference(scorer, "imagereward") > 100 * TOLERANCE


def test_parity_catches_an_embedding_of_another_length(tmp_path, monkeypatch):
    scorer = loaded("aesthetic", tmp_path)
    monkeypatch.setattr("dde_core.scorers.models._unit", lambda features: features)
    assert difference(scorer, "aesthetic") > 100 * TOLERANCE


def test_parity_catches_a_clip_with_the_other_activation(tmp_path, monkeypatch):
    values = clip_folders.read_object
    monkeypatch.setattr(clip_folders, "read_object", lambda path: with_gelu(values(path)))
    assert difference(loaded("clip", tmp_path), "clip") > 100 * TOLERANCE


def with_gelu(config: dict) -> dict:
    return config | {part: config[part] | {"hidden_act": "gelu"} for part in ("text_config", "vision_config")}


# ---- what cannot be scored


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (IMAGES.astype(np.float32), "float32"),
        (IMAGES[:4], "one for each prompt"),
        (IMAGES[..., :1], "height, width, 3"),
        (IMAGES[:, :0], "at least 1 px"),
        (np.zeros((5, 1, 200, 3), np.uint8), "50 times"),
    ],
    ids=["floats", "too few", "gray", "empty", "a stripe"],
)
def test_images_that_cannot_be_scored_are_refused(images, words, tmp_path):
    with pytest.raises(DataError, match=words):
        loaded("clip", tmp_path)(images, PROMPTS)


def test_a_size_is_refused_before_images_are_drawn(tmp_path):
    scorer = loaded("hps", tmp_path)
    scorer.check(PROMPTS, 0, 0)
    scorer.check(PROMPTS, 512, 768)
    with pytest.raises(DataError, match="8 x 512 px"):
        scorer.check(PROMPTS, 8, 512)


@pytest.mark.parametrize("kind", ["clip", "drift"])
def test_a_score_that_is_not_finite_is_an_error(kind, tmp_path):
    scorer = loaded(kind, tmp_path)
    scorer.model.clip.visual_projection.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="image 0"):
        scorer(IMAGES, PROMPTS)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"dtype": torch.float16}, "dtype"),
        ({"batch_size": 0}, "batch_size"),
        ({"resize": "aliased"}, "resize"),
    ],
)
def test_a_setting_without_effect_or_sense_is_refused(settings, field, tmp_path):
    with pytest.raises(ConfigError, match=f"^{field} must"):
        loaded("clip", tmp_path, **settings)
