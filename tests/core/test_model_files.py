"""Files of a model folder that would load, or fail, without a word: each is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from dde_core.errors import ConfigError, IncompleteModelError, ModelError
from dde_core.models.configs import TextEncoderFields
from dde_core.models.json_files import parse_object
from dde_core.models.vocabulary import check_tokenizer
from dde_core.models.weight_files import (
    LENGTH_BYTES,
    WeightFiles,
    find_weights,
    header_bytes,
    is_finite,
    parse_header,
    parse_index,
)
from dde_core.shapes import MODEL_DIR

ENCODER = TextEncoderFields.read(
    "text_encoder", json.loads((MODEL_DIR / "text_encoder/config.json").read_text())
)


# ---- JSON


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"[]", "c.json must hold a JSON object, got a list"),
        (b"nonsense", "c.json is not JSON"),
        (b"", "c.json is not JSON"),
        (b"\xff\xfe\x00\x80", "c.json is not JSON"),
        (b"[" * 200_000, "c.json is nested too deeply"),
        (b'{"a":' * 200_000, "c.json is nested too deeply"),
        (b"version https://git-lfs.github.com/spec/v1\noid", r"c.json is a Git LFS pointer.*git lfs pull"),
    ],
)
def test_a_file_that_holds_no_json_object_is_refused_by_name(data: bytes, message: str):
    with pytest.raises(ModelError, match=message):
        parse_object(data, "c.json")


# ---- which files hold the weights


UNET = "diffusion_pytorch_model"


@pytest.mark.parametrize(
    ("part", "names", "expected"),
    [
        ("unet", [f"{UNET}.safetensors"], WeightFiles(f"{UNET}.safetensors", None, None)),
        (
            "unet",
            [f"{UNET}.fp16.safetensors", f"{UNET}.safetensors", f"{UNET}.bin"],
            WeightFiles(f"{UNET}.safetensors", None, None),
        ),
        (
            "unet",
            [f"{UNET}.fp16.safetensors", "config.json"],
            WeightFiles(f"{UNET}.fp16.safetensors", None, "fp16"),
        ),
        (
            "vae",
            [f"{UNET}.safetensors", f"{UNET}.safetensors.index.json"],
            WeightFiles(None, f"{UNET}.safetensors.index.json", None),
        ),
        (
            "text_encoder",
            ["model.safetensors", "model.safetensors.index.json"],
            WeightFiles("model.safetensors", None, None),
        ),
        (
            "text_encoder_2",
            ["model.fp16-00001-of-00002.safetensors", "model.safetensors.index.fp16.json"],
            WeightFiles(None, "model.safetensors.index.fp16.json", "fp16"),
        ),
    ],
)
def test_the_weights_are_the_files_that_the_library_loads(part, names, expected):
    assert find_weights(part, names) == expected


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "unet lacks unet/diffusion_pytorch_model.safetensors"),
        (["model.safetensors"], "unet lacks unet/diffusion_pytorch_model.safetensors"),
        ([f"{UNET}-00001-of-00002.safetensors"], "lacks their index unet/.*safetensors.index.json"),
        ([f"{UNET}.bin"], f"{UNET}.bin is a pickle, which is never loaded"),
        ([f"{UNET}.fp16.safetensors", f"{UNET}.ema.safetensors"], "several variants.*: ema, fp16"),
    ],
)
def test_a_part_without_weights_is_refused_with_what_it_has(names, message):
    with pytest.raises(ModelError, match=message):
        find_weights("unet", names)


@pytest.mark.parametrize(
    "index",
    [{}, {"weight_map": {}}, {"metadata": {}, "weight_map": {"a": "../b.safetensors"}}, {"metadata": 3}],
)
def test_an_index_that_names_no_files_of_its_folder_is_refused(index):
    with pytest.raises(ModelError, match=r"i\.json must"):
        parse_index(json.dumps(index).encode(), "i.json")


# ---- safetensors


def read_header(data: bytes):
    length = header_bytes(data[:32], len(data), "w")
    return parse_header(data[LENGTH_BYTES : LENGTH_BYTES + length], len(data), "w")


def with_header(header: object, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(LENGTH_BYTES, "little") + text + data


def test_a_header_gives_the_tensors_in_the_order_of_their_bytes():
    tensors = {"b": torch.zeros(2, 3), "a": torch.zeros(4, dtype=torch.bfloat16), "empty": torch.zeros(0)}
    found = read_header(save(tensors, metadata={"format": "pt"}))
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in found.items()} == {
        "b": ("F32", (2, 3)),
        "a": ("BF16", (4,)),
        "empty": ("F32", (0,)),
    }
    starts = [tensor.start for tensor in found.values()]
    assert starts == sorted(starts)


def entry(start: int, end: int, shape: list[int], dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "w is not a safetensors file"),
        (b"<!DOCTYPE html><html>", "w is not a safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "w is a Git LFS pointer"),
        (save({"a": torch.zeros(64)})[:20], "w is cut off: its header alone"),
        (save({"a": torch.zeros(64)})[:-1], "w is cut off: it has .* of .* bytes"),
        (save({"a": torch.zeros(64)}) + b"more", "w is damaged: 4 bytes follow"),
        (with_header([]), "its header cannot be read"),
        (with_header({"a": 3}), "its header cannot be read"),
        (with_header({"a": entry(0, 4, [-1])}, b"1234"), "its header cannot be read"),
        (with_header({"a": entry(0, 4, [2])}, b"1234"), "the bytes of a do not fit"),
        (with_header({"a": entry(4, 8, [1])}, b"12345678"), "the bytes of a do not fit"),
        (with_header({"a": entry(0, 4, [1]), "b": entry(0, 4, [1])}, b"1234"), "the bytes of b do not fit"),
        (with_header({"a": entry(0, 4, [1], "F4")}, b"1234"), "w holds a as 'F4', which is not supported"),
    ],
)
def test_a_damaged_weight_file_is_refused_by_its_header_and_size(data: bytes, message: str):
    with pytest.raises(ModelError, match=message):
        read_header(data)


@pytest.mark.parametrize(
    ("dtype", "name"),
    [(torch.float64, "F64"), (torch.float32, "F32"), (torch.float16, "F16"), (torch.bfloat16, "BF16")],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_infinite_and_nan_weights_are_found_in_every_precision(dtype, name, value):
    values = torch.tensor([0.0, -1.0, 6e4, 1e-8], dtype=dtype)
    assert is_finite(values.view(torch.uint8).numpy().tobytes(), name)
    values[2] = value
    assert not is_finite(values.view(torch.uint8).numpy().tobytes(), name)


def test_position_ids_are_not_read_as_numbers():
    assert is_finite(np.full(4, -1).tobytes(), "I64")


# ---- tokenizers


def files_of_shapes() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (MODEL_DIR / "tokenizer").iterdir()}


def check(files: dict[str, bytes], encoder: TextEncoderFields = ENCODER) -> None:
    check_tokenizer("tokenizer", files.get, encoder)


def test_the_shipped_tokenizer_is_proven_from_either_form_of_its_vocabulary():
    files = files_of_shapes()
    check(files)
    del files["tokenizer.json"]
    check(files)


def changed(data: bytes, **fields) -> bytes:
    return json.dumps(json.loads(data) | fields).encode()


def with_added(files: dict[str, bytes], number: object) -> dict[str, bytes]:
    return files | {"added_tokens.json": json.dumps({"<cat>": number}).encode()}


def test_tokens_may_be_added_within_the_text_encoders_rows():
    check(with_added(files_of_shapes(), 150))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: {k: v for k, v in f.items() if k == "tokenizer_config.json"}, "lacks tokenizer.json, or"),
        (
            lambda f: {k: v for k, v in f.items() if k in ("vocab.json", "merges.txt")},
            "lacks tokenizer_config",
        ),
        (
            lambda f: {k: v for k, v in f.items() if k not in ("tokenizer.json", "merges.txt")},
            "lacks tokenizer.json, or vocab.json and merges.txt",
        ),
        (
            lambda f: (
                {k: v for k, v in f.items() if k != "tokenizer.json"} | {"merges.txt": f["merges.txt"][:300]}
            ),
            "no merges for .* of 152 tokens.*cut off",
        ),
        (
            lambda f: f | {"tokenizer_config.json": changed(f["tokenizer_config.json"], model_max_length=77)},
            "model_max_length must be at most the text encoder's max_position_embeddings = 16, got 77",
        ),
        (
            lambda f: (
                f | {"tokenizer_config.json": changed(f["tokenizer_config.json"], model_max_length=1e30)}
            ),
            "model_max_length must be a whole number",
        ),
        (
            lambda f: (
                f | {"tokenizer_config.json": changed(f["tokenizer_config.json"], tokenizer_class="Bert")}
            ),
            "tokenizer_class must be 'CLIPTokenizer', got 'Bert'",
        ),
        (
            lambda f: f | {"tokenizer_config.json": changed(f["tokenizer_config.json"], eos_token="<end>")},
            "eos_token must be in the vocabulary, got '<end>'",
        ),
        (
            lambda f: with_added(f, 152),
            "'<cat>' must be one of the text encoder's vocab_size = 152 rows, got 152",
        ),
        (lambda f: with_added(f, -1), "'<cat>' must be one of"),
        (lambda f: with_added(f, [1]), "'<cat>' must be one of"),
        (lambda f: f | {"tokenizer.json": b"{}"}, "must hold a model with a vocab"),
        (
            lambda f: f | {"tokenizer.json": json.dumps({"model": {"vocab": {}, "merges": [3]}}).encode()},
            "tokens or merges that cannot be read",
        ),
        (
            lambda f: (
                f | {"tokenizer.json": json.dumps({"model": {"vocab": {"red": 1}, "merges": []}}).encode()}
            ),
            "different words would get the same ids",
        ),
        (
            lambda f: f | {"tokenizer.json": b"version https://git-lfs.github.com/spec/v1"},
            "is a Git LFS pointer",
        ),
    ],
)
def test_a_tokenizer_that_would_give_other_ids_is_refused(change, message: str):
    with pytest.raises((ModelError, ConfigError), match=message):
        check(change(files_of_shapes()))


def test_text_is_pooled_where_the_tokenizer_ends_it():
    config = json.loads((MODEL_DIR / "text_encoder" / "config.json").read_text())
    for end in (151, 2):
        check(files_of_shapes(), TextEncoderFields.read("text_encoder_2", config | {"eos_token_id": end}))
    with pytest.raises(
        ConfigError, match="the id of eos_token must be the text encoder's eos_token_id, 49407"
    ):
        check(files_of_shapes(), TextEncoderFields.read("text_encoder_2", config | {"eos_token_id": 49407}))


def test_a_missing_file_is_an_incomplete_model(tmp_path: Path):
    with pytest.raises(IncompleteModelError):
        check({})
