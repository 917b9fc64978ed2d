"""Files that are not a scorer's are refused before a weight is read, by the first thing that differs."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPModel

from dde_core.errors import ConfigError, DataError
from dde_core.scorers import hps, weights
from dde_core.scorers.load import load, prove
from dde_core.shapes import MODEL_DIR
from tests.support import scorers as tiny

KINDS = ("clip", "pickscore", "hps", "aesthetic", "imagereward", "diversity", "drift")
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading the value of a weight fails the test."""
    monkeypatch.setattr(weights.Weights, "values", lambda self: pytest.fail("read weights"))


def file_of(kind: str, checkpoint: Path) -> Path:
    """The file with the kind's weights."""
    names = {"imagereward": "ImageReward.pt", "hps": "", "aesthetic": ""}
    return checkpoint / names.get(kind, "model.safetensors") if checkpoint.is_dir() else checkpoint


def change(path: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    """Edit the tensors of a file in its own layout."""
    if path.suffix == ".safetensors":
        tensors = load_file(path)
        edit(tensors)
        save_file(tensors, path)
        return
    content = torch.load(path, weights_only=True)
    edit(content.get("state_dict", content))
    torch.save(content, path)


def refused(kind: str, checkpoint: Path, processor: Path | None) -> str:
    with pytest.raises(DataError) as caught:
        prove(kind, checkpoint, processor)
    return str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_proof_reads_no_weight(kind: str, tmp_path: Path, no_weights: None):
    prove(kind, *tiny.write_tiny(kind, tmp_path))


INNER = {
    "clip": "vision_model.encoder.layers.1.self_attn.q_proj.weight",
    "pickscore": "text_model.encoder.layers.0.mlp.fc1.bias",
    "hps": "visual.transformer.resblocks.1.attn.in_proj_bias",
    "aesthetic": "layers.4.bias",
    "imagereward": "blip.text_encoder.encoder.layer.1.crossattention.self.key.weight",
    "diversity": "visual_projection.weight",
    "drift": "vision_model.post_layernorm.bias",
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_tensor_is_named(kind: str, tmp_path: Path, no_weights: None):
    checkpoint, processor = tiny.write_tiny(kind, tmp_path)
    change(file_of(kind, checkpoint), lambda tensors: tensors.pop(INNER[kind]))
    message = refused(kind, checkpoint, processor)
    assert f"lacks {INNER[kind]!r}" in message
    assert file_of(kind, checkpoint).name in message


@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_of_another_shape_is_named_with_both_shapes(kind: str, tmp_path: Path, no_weights: None):
    checkpoint, processor = tiny.write_tiny(kind, tmp_path)
    shapes: list[list[int]] = []

    def longer(tensors: dict[str, Tensor]) -> None:
        old = tensors[INNER[kind]]
        tensors[INNER[kind]] = torch.cat([old, old])
        shapes.extend([list(old.shape), list(tensors[INNER[kind]].shape)])

    change(file_of(kind, checkpoint), longer)
    message = refused(kind, checkpoint, processor)
    assert f"{INNER[kind]!r} must have shape {shapes[0]}, got {shapes[1]}" in message


@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_that_the_kind_does_not_have_is_named(kind: str, tmp_path: Path, no_weights: None):
    checkpoint, processor = tiny.write_tiny(kind, tmp_path)
    change(file_of(kind, checkpoint), lambda tensors: tensors.update({"extra.weight": torch.zeros(2)}))
    assert "holds 'extra.weight'" in refused(kind, checkpoint, processor)


@pytest.mark.parametrize("kind", KINDS)
def test_whole_numbers_are_no_weights(kind: str, tmp_path: Path, no_weights: None):
    checkpoint, processor = tiny.write_tiny(kind, tmp_path)
    change(
        file_of(kind, checkpoint), lambda tensors: tensors.update({INNER[kind]: tensors[INNER[kind]].long()})
    )
    assert f"{INNER[kind]!r} must hold floating-point numbers" in refused(kind, checkpoint, processor)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_was_never_downloaded_is_refused(kind: str, tmp_path: Path):
    checkpoint, processor = tiny.write_tiny(kind, tmp_path)
    file_of(kind, checkpoint).write_text(POINTER)
    assert "git lfs pull" in refused(kind, checkpoint, processor)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_a_file_that_is_cut_off_is_refused(kind: str, share: float, tmp_path: Path):
    checkpoint, processor = tiny.write_tiny(kind, tmp_path)
    path = file_of(kind, checkpoint)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert path.name in refused(kind, checkpoint, processor)


class Bomb:
    """A pickle that runs a command when it is loaded without care."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("kind", ["hps", "aesthetic", "imagereward", "clip"])
@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_a_pickle_with_code_is_refused_and_not_run(kind: str, how: str, tmp_path: Path):
    checkpoint, processor = tiny.write_tiny(kind, tmp_path)
    path = file_of(kind, checkpoint)
    if kind == "clip":
        path.unlink()
        path = checkpoint / "pytorch_model.bin"
    content = {"state_dict": Bomb(tmp_path / "ran")}
    if how == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    message = refused(kind, checkpoint, processor)
    assert "more than tensors" in message
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["hps", "aesthetic", "imagereward"])
@pytest.mark.parametrize("other", ["hps", "aesthetic", "imagereward"])
def test_the_file_of_another_kind_is_refused(kind: str, other: str, tmp_path: Path, no_weights: None):
    if kind == other:
        return
    checkpoint, processor = tiny.write_tiny(kind, tmp_path / "mine")
    theirs, _ = tiny.write_tiny(other, tmp_path / "theirs")
    path = file_of(kind, checkpoint)
    path.write_bytes(file_of(other, theirs).read_bytes())
    message = refused(kind, checkpoint, processor)
    assert path.name in message
    assert "lacks" in message or "must hold" in message


@pytest.mark.parametrize("kind", ["hps", "aesthetic", "imagereward"])
def test_the_folder_of_a_clip_is_no_such_checkpoint(kind: str, tmp_path: Path):
    _, processor = tiny.write_tiny(kind, tmp_path / "mine")
    clip, _ = tiny.write_tiny("clip", tmp_path / "clip")
    assert "model.safetensors lacks" in refused(kind, clip, processor)


def test_other_kinds_of_folder_and_file_are_no_clip(tmp_path: Path):
    checkpoint, _ = tiny.write_tiny("hps", tmp_path)
    assert "must be a folder of CLIP" in refused("clip", checkpoint, None)
    assert "must be a folder of CLIP" in refused("clip", tmp_path / "absent", None)
    assert "lacks config.json" in refused("clip", MODEL_DIR, None)
    assert "model_type must be 'clip', got 'clip_text_model'" in refused(
        "clip", MODEL_DIR / "text_encoder", None
    )


@pytest.mark.parametrize(
    ("part", "field", "value", "words"),
    [
        (
            "text_config",
            "num_attention_heads",
            5,
            "(32) is not a multiple of the number of attention heads (5)",
        ),
        ("text_config", "hidden_act", "tanh", "hidden_act must be one of"),
        ("vision_config", "patch_size", 5, "patch_size must divide image_size = 28"),
        ("vision_config", "num_hidden_layers", 1000, "num_hidden_layers must be a whole number"),
        ("vision_config", "num_hidden_layers", 3, "lacks 'vision_model.encoder.layers.2"),
        ("vision_config", "layer_norm_eps", "tiny", "config.json"),
        ("text_config", "eos_token_id", 5, "must be the text encoder's eos_token_id, 5"),
    ],
)
def test_a_field_of_a_clip_config_is_named(part, field, value, words, tmp_path: Path, no_weights: None):
    checkpoint, _ = tiny.write_tiny("clip", tmp_path)
    path = checkpoint / "config.json"
    tiny.change_json(path, **{part: json.loads(path.read_text())[part] | {field: value}})
    assert words in refused("clip", checkpoint, None)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("num_attention_heads", 7, "med_config.json.num_attention_heads must divide hidden_size = 24"),
        ("num_hidden_layers", 3, "blip.text_encoder.encoder.layer.* must have 3 layers, got 2"),
        (
            "vocab_size",
            30524,
            "'blip.text_encoder.embeddings.word_embeddings.weight' must have shape [30524, 24]",
        ),
        ("model_type", "blip", "med_config.json.model_type must be 'bert'"),
        ("hidden_act", "silu", "med_config.json.hidden_act must be one of"),
    ],
)
def test_a_field_of_med_config_is_named(field, value, words, tmp_path: Path, no_weights: None):
    checkpoint, processor = tiny.write_tiny("imagereward", tmp_path)
    tiny.change_json(checkpoint / "med_config.json", **{field: value})
    assert words in refused("imagereward", checkpoint, processor)


def test_the_config_of_an_old_clip_is_read_with_its_two_kinds_of_parts(tmp_path: Path, no_weights: None):
    """OpenAI's folders repeat sizes under ``text_config_dict`` and ``vision_config_dict``."""
    checkpoint, _ = tiny.write_tiny("clip", tmp_path)
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "projection_dim")
    for part in ("text_config", "vision_config"):
        config[f"{part}_dict"] = {name: config[part][name] for name in sizes}
    config["vision_config_dict"] |= {"image_size": tiny.SIDE, "patch_size": tiny.PATCH}
    config["text_config_dict"] |= {"vocab_size": tiny.VOCABULARY, "eos_token_id": 2}
    path.write_text(json.dumps(config))
    assert prove("clip", checkpoint)["preprocessing"]["side"] == tiny.SIDE
    config["vision_config_dict"]["num_hidden_layers"] = 3
    path.write_text(json.dumps(config))
    assert "lacks 'vision_model.encoder.layers.2" in refused("clip", checkpoint, None)


def test_a_missing_med_config_is_named(tmp_path: Path):
    checkpoint, processor = tiny.write_tiny("imagereward", tmp_path)
    (checkpoint / "med_config.json").unlink()
    assert "lacks med_config.json" in refused("imagereward", checkpoint, processor)


def test_widths_without_16_heads_are_no_hps_and_no_image_reward(tmp_path: Path):
    checkpoint, processor = tiny.write_tiny("hps", tmp_path)
    change(
        checkpoint, lambda found: found.update({"token_embedding.weight": torch.zeros(tiny.VOCABULARY, 40)})
    )
    assert "multiple of 16 heads, got 40" in refused("hps", checkpoint, processor)
    checkpoint, processor = tiny.write_tiny("imagereward", tmp_path)
    name = "blip.visual_encoder.patch_embed.proj.weight"
    change(file_of("imagereward", checkpoint), lambda found: found.update({name: torch.zeros(40, 3, 7, 7)}))
    assert "multiple of 16 heads, got 40" in refused("imagereward", checkpoint, processor)


def test_a_checkpoint_of_full_width_must_have_all_layers(tmp_path: Path):
    checkpoint, processor = tiny.write_tiny("hps", tmp_path)
    change(checkpoint, lambda found: found.update({"visual.conv1.weight": torch.zeros(1280, 3, 7, 7)}))
    assert "visual.transformer must have 32 layers at width 1280, got 2" in refused(
        "hps", checkpoint, processor
    )


def test_the_sizes_of_vit_h_14_are_those_of_hps():
    """986.1 million parameters, as open_clip's table of models says."""
    sizes = hps.Sizes(
        vision=hps.Encoder(width=1280, mlp_width=5120, layers=32),
        text=hps.Encoder(width=1024, mlp_width=4096, layers=24),
        patch=14,
        grid=16,
        vocabulary=49408,
        positions=77,
        embedding=1024,
    )
    tensors = {name: torch.empty(shape, device="meta") for name, shape in hps.shapes_of(sizes).items()}
    assert hps.read_sizes("HPS_v2_compressed.pt", tensors) == sizes
    assert sizes.side == 224
    with torch.device("meta"):
        model = CLIPModel(hps.config_of(sizes))
    converted = hps.to_transformers(tensors)
    assert {name: each.shape for name, each in model.state_dict().items()} == {
        name: each.shape for name, each in converted.items()
    }
    assert sum(each.numel() for each in converted.values()) == pytest.approx(986.11e6, abs=0.01e6)
    heads = {model.config.vision_config.num_attention_heads, model.config.text_config.num_attention_heads}
    assert heads == {16}


def test_a_folder_must_hold_one_file_of_weights(tmp_path: Path):
    checkpoint, processor = tiny.write_tiny("hps", tmp_path / "mine")
    folder = checkpoint.parent
    prove("hps", folder, processor)
    (folder / "HPS_v2_compressed.pt").write_bytes(checkpoint.read_bytes())
    assert "HPS_v2.1_compressed.pt, HPS_v2_compressed.pt: name the file" in refused("hps", folder, processor)
    assert "got none" in refused("hps", tmp_path, processor)
    assert "does not exist" in refused("hps", tmp_path / "absent.pt", processor)
    assert "must end in one of" in refused("hps", processor / "vocab.json", processor)


def test_shards_are_read_by_their_index(tmp_path: Path):
    checkpoint, _ = tiny.write_tiny("drift", tmp_path)
    tensors = load_file(checkpoint / "model.safetensors")
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, checkpoint / file)
    index = {"metadata": {}, "weight_map": {name: file for file, held in parts.items() for name in held}}
    (checkpoint / "model.safetensors").unlink()
    assert "lacks model.safetensors" in refused("drift", checkpoint, None)
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    prove("drift", checkpoint)
    (checkpoint / "b.safetensors").unlink()
    assert "lacks b.safetensors" in refused("drift", checkpoint, None)


# ---- tokenizers


@pytest.mark.parametrize("kind", ["clip", "pickscore", "hps"])
@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer_config.json"])
def test_a_missing_file_of_a_tokenizer_is_named(kind: str, name: str, tmp_path: Path, no_weights: None):
    checkpoint, processor = tiny.write_tiny(kind, tmp_path)
    ((processor or checkpoint) / name).unlink()
    assert name in refused(kind, checkpoint, processor)


def test_a_missing_bert_vocabulary_is_named(tmp_path: Path, no_weights: None):
    checkpoint, _ = tiny.write_tiny("imagereward", tmp_path)
    assert "lacks vocab.txt" in refused("imagereward", checkpoint, None)


@pytest.mark.parametrize("kind", ["clip", "hps"])
def test_a_tokenizer_of_another_encoder_is_refused(kind: str, tmp_path: Path, no_weights: None):
    checkpoint, _ = tiny.write_tiny(kind, tmp_path)
    other = tmp_path / "shapes"
    other.mkdir()
    for path in (MODEL_DIR / "tokenizer").iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    (other / "preprocessor_config.json").write_text('{"crop_size": 28}')
    message = refused(kind, checkpoint, other)
    assert f"the id of eos_token must be the text encoder's eos_token_id, {tiny.VOCABULARY - 1}" in message


def test_a_vocabulary_without_all_bytes_is_refused(tmp_path: Path, no_weights: None):
    checkpoint, processor = tiny.write_tiny("hps", tmp_path)
    path = processor / "vocab.json"
    vocabulary = json.loads(path.read_text())
    vocabulary["星"] = vocabulary.pop("é")
    path.write_text(json.dumps(vocabulary))
    assert "lacks 'é': a prompt with this byte would end there" in refused("hps", checkpoint, processor)


def test_a_bert_vocabulary_of_another_size_is_refused(tmp_path: Path, no_weights: None):
    checkpoint, processor = tiny.write_tiny("imagereward", tmp_path)
    path = processor / "vocab.txt"
    rows = len(tiny.bert_vocabulary()) + 2
    path.write_text(path.read_text() + "[DEC]\n[ENC]\n")
    prove("imagereward", checkpoint, processor)
    path.write_text(path.read_text() + "more\n")
    message = refused("imagereward", checkpoint, processor)
    assert f"has {rows} rows: vocab.txt and [DEC] and [ENC] are {rows + 1} tokens" in message


def test_an_old_config_pools_at_the_greatest_id_which_must_end_a_prompt(tmp_path: Path):
    checkpoint, _ = tiny.write_tiny("clip", tmp_path)
    path = checkpoint / "config.json"
    tiny.change_json(path, text_config=json.loads(path.read_text())["text_config"] | {"eos_token_id": 2})
    prove("clip", checkpoint)
    vocabulary = json.loads((checkpoint / "vocab.json").read_text())
    start, end = vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]
    tiny.change_json(checkpoint / "vocab.json", **{"<|startoftext|>": end, "<|endoftext|>": start})
    assert "must be the greatest" in refused("clip", checkpoint, None)


def test_the_aesthetic_head_needs_a_clip_of_its_width(tmp_path: Path, no_weights: None):
    checkpoint, _ = tiny.write_tiny("aesthetic", tmp_path)
    assert "processor must be the CLIP folder" in refused("aesthetic", checkpoint, None)
    _, processor = tiny.write_tiny("aesthetic", tmp_path)
    tiny.write_head(checkpoint, tiny.head_tensors(48))
    assert "'layers.0.weight' must have shape [20, 32], got [20, 48]" in refused(
        "aesthetic", checkpoint, processor
    )


def test_infinite_weights_of_a_head_are_refused(tmp_path: Path):
    checkpoint, processor = tiny.write_tiny("aesthetic", tmp_path)
    change(checkpoint, lambda tensors: tensors["layers.2.bias"].fill_(torch.inf))
    with pytest.raises(DataError, match="must be finite"):
        load("aesthetic", checkpoint, processor)


def test_kinds_without_a_checkpoint_are_refused(tmp_path: Path):
    for kind in ("match", "unknown"):
        with pytest.raises(ConfigError, match="kind must be one of"):
            prove(kind, tmp_path)
