"""Tiny random checkpoints of every kind of scorer, in the layouts in which the real ones are published."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

Tensors = dict[str, Tensor]

WORDS = ("a", "red", "big", "blue", "star", "on", "the", "end", "of", "text")
"""Words that are one token each, with their end."""
BERT_WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS)
POSITIONS = 77
WIDTH = 48
TEXT_WIDTH = 32
MLP_WIDTH = 40
BERT_WIDTH = 24
BERT_POSITIONS = 64
EMBEDDING = 32
PATCH = 7
GRID = 4
SIDE = PATCH * GRID
LAYERS = 2
HEAD_WIDTHS = (20, 12, 8, 6, 1)
CLIP_HEADS = 4


def write_tiny(kind: str, folder: Path) -> tuple[Path, Path | None]:
    """Write a checkpoint of a kind below ``folder``. Returns it and its processor, if it needs one."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind in ("clip", "diversity", "drift"):
        return write_clip(folder / "clip"), None
    if kind == "pickscore":
        clip = write_clip(folder / "pickscore")
        processor = folder / "processor"
        processor.mkdir(exist_ok=True)
        for path in (
            *clip.glob("*token*"),
            *clip.glob("*vocab*"),
            *clip.glob("*merges*"),
            *clip.glob("prep*"),
        ):
            path.rename(processor / path.name)
        return clip, processor
    if kind == "hps":
        return write_hps(folder / "HPS_v2.1_compressed.pt"), write_clip_tokenizer(folder / "tokenizer")
    if kind == "aesthetic":
        return write_head(folder / "sac+logos+ava1-l14-linearMSE.pth"), write_clip(folder / "clip")
    if kind == "imagereward":
        return write_image_reward(folder / "imagereward"), write_bert_vocabulary(folder / "bert")
    raise ValueError(f"kind must be one with a checkpoint, got {kind!r}")


# ---- tokenizers


def byte_letters() -> dict[int, str]:
    """The printable letter that stands for each byte in CLIP's vocabulary."""
    kept = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255]
    moved = [b for b in range(256) if b not in kept]
    return {b: chr(b) for b in kept} | {b: chr(256 + i) for i, b in enumerate(moved)}


def clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Every byte, each with and without the end of a word, the words above, start and end; and the merges."""
    letters = list(byte_letters().values())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            pair = (parts[-2], parts[-1])
            if pair not in merges:
                merges.append(pair)
                tokens.append("".join(pair))
            parts = [*parts[:-2], "".join(pair)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}, merges


VOCABULARY = len(clip_vocabulary()[0])


def write_clip_tokenizer(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary, merges = clip_vocabulary()
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": POSITIONS,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def bert_vocabulary() -> list[str]:
    """Special tokens, the words above, and every small letter and sign, at a word's start and inside it."""
    letters = [chr(c) for c in range(33, 127) if not chr(c).isupper()]
    return list(dict.fromkeys([*BERT_WORDS, *letters, *(f"##{letter}" for letter in letters)]))


def write_bert_vocabulary(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(bert_vocabulary()) + "\n")
    return folder


# ---- weights


class Draw:
    """Random tensors, drawn in turn. Scales are large enough that every part of a model shows in a score."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, std: float = 0.0) -> Tensor:
        scale = std or max(shape[-1] if shape else 1, 1) ** -0.5
        return torch.randn(shape, generator=self.generator) * scale

    def norm(self, name: str, width: int) -> Tensors:
        return {f"{name}.weight": 1 + self(width, std=0.3), f"{name}.bias": self(width, std=0.3)}

    def linear(self, name: str, inputs: int, outputs: int) -> Tensors:
        return {
            f"{name}.weight": self(outputs, inputs, std=1.5 * inputs**-0.5),
            f"{name}.bias": self(outputs, std=0.3),
        }


def open_clip_tensors(seed: int = 0) -> Tensors:
    """A CLIP in the layout of open_clip. As in ViT-H/14, its text is as wide as the embedding."""
    draw = Draw(seed)
    found: Tensors = {
        "positional_embedding": draw(POSITIONS, TEXT_WIDTH),
        "text_projection": draw(TEXT_WIDTH, EMBEDDING),
        "logit_scale": torch.tensor(4.6),
        "visual.class_embedding": draw(WIDTH, std=1.0),
        "visual.positional_embedding": draw(GRID**2 + 1, WIDTH, std=1.0),
        "visual.proj": draw(WIDTH, EMBEDDING),
        "visual.conv1.weight": draw(WIDTH, 3, PATCH, PATCH, std=(3 * PATCH**2) ** -0.5),
        "token_embedding.weight": draw(VOCABULARY, TEXT_WIDTH, std=1.0),
    }
    for name, width in (("visual.ln_pre", WIDTH), ("visual.ln_post", WIDTH), ("ln_final", TEXT_WIDTH)):
        found |= draw.norm(name, width)
    for prefix, width in (("visual.", WIDTH), ("", TEXT_WIDTH)):
        for i in range(LAYERS):
            block = f"{prefix}transformer.resblocks.{i}"
            found |= draw.norm(f"{block}.ln_1", width) | draw.norm(f"{block}.ln_2", width)
            projections = draw.linear("in_proj", width, 3 * width)
            found |= {f"{block}.attn.{name.replace('.', '_')}": each for name, each in projections.items()}
            found |= draw.linear(f"{block}.attn.out_proj", width, width)
            found |= draw.linear(f"{block}.mlp.c_fc", width, MLP_WIDTH)
            found |= draw.linear(f"{block}.mlp.c_proj", MLP_WIDTH, width)
    return found


def head_tensors(width: int, prefix: str = "", seed: int = 1) -> Tensors:
    """LAION's head: linear layers 0, 2, 4, 6 and 7, with dropout between and no activation."""
    draw = Draw(seed)
    found: Tensors = {}
    inputs = width
    for number, outputs in zip((0, 2, 4, 6, 7), HEAD_WIDTHS, strict=True):
        found |= draw.linear(f"{prefix}layers.{number}", inputs, outputs)
        inputs = outputs
    return found


def image_reward_tensors(seed: int = 2) -> Tensors:
    """BLIP's vision and text encoder and the head, in the layout of ImageReward.pt."""
    draw = Draw(seed)
    vision = "blip.visual_encoder"
    text = "blip.text_encoder"
    rows = len(bert_vocabulary()) + 2
    found: Tensors = {
        f"{vision}.cls_token": draw(1, 1, WIDTH, std=1.0),
        f"{vision}.pos_embed": draw(1, GRID**2 + 1, WIDTH, std=1.0),
        f"{vision}.patch_embed.proj.weight": draw(WIDTH, 3, PATCH, PATCH, std=(3 * PATCH**2) ** -0.5),
        f"{vision}.patch_embed.proj.bias": draw(WIDTH, std=0.3),
        f"{text}.embeddings.position_ids": torch.arange(BERT_POSITIONS)[None],
        f"{text}.embeddings.word_embeddings.weight": draw(rows, BERT_WIDTH, std=1.0),
        f"{text}.embeddings.position_embeddings.weight": draw(BERT_POSITIONS, BERT_WIDTH, std=1.0),
    }
    found |= draw.norm(f"{vision}.norm", WIDTH) | draw.norm(f"{text}.embeddings.LayerNorm", BERT_WIDTH)
    for i in range(LAYERS):
        block = f"{vision}.blocks.{i}"
        found |= draw.norm(f"{block}.norm1", WIDTH) | draw.norm(f"{block}.norm2", WIDTH)
        found |= draw.linear(f"{block}.attn.qkv", WIDTH, 3 * WIDTH) | draw.linear(
            f"{block}.attn.proj", WIDTH, WIDTH
        )
        found |= draw.linear(f"{block}.mlp.fc1", WIDTH, MLP_WIDTH) | draw.linear(
            f"{block}.mlp.fc2", MLP_WIDTH, WIDTH
        )
        layer = f"{text}.encoder.layer.{i}"
        for attention, width in (("attention", BERT_WIDTH), ("crossattention", WIDTH)):
            for name, inputs in (("query", BERT_WIDTH), ("key", width), ("value", width)):
                found |= draw.linear(f"{layer}.{attention}.self.{name}", inputs, BERT_WIDTH)
            found |= draw.linear(f"{layer}.{attention}.output.dense", BERT_WIDTH, BERT_WIDTH)
            found |= draw.norm(f"{layer}.{attention}.output.LayerNorm", BERT_WIDTH)
        found |= draw.linear(f"{layer}.intermediate.dense", BERT_WIDTH, MLP_WIDTH)
        found |= draw.linear(f"{layer}.output.dense", MLP_WIDTH, BERT_WIDTH)
        found |= draw.norm(f"{layer}.output.LayerNorm", BERT_WIDTH)
    return found | head_tensors(BERT_WIDTH, "mlp.", seed)


def write_hps(path: Path, tensors: Tensors | None = None) -> Path:
    """As HPS_v2_compressed.pt: the tensors under ``state_dict``."""
    torch.save({"state_dict": tensors or open_clip_tensors()}, path)
    return path


def write_head(path: Path, tensors: Tensors | None = None) -> Path:
    """As LAION's .pth: the tensors at the top."""
    torch.save(tensors or head_tensors(EMBEDDING), path)
    return path


def write_image_reward(folder: Path, tensors: Tensors | None = None) -> Path:
    """ImageReward.pt and med_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(tensors or image_reward_tensors(), folder / "ImageReward.pt")
    config = {
        "architectures": ["BertModel"],
        "attention_probs_dropout_prob": 0.1,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": BERT_WIDTH,
        "initializer_range": 0.02,
        "intermediate_size": MLP_WIDTH,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": BERT_POSITIONS,
        "model_type": "bert",
        "num_attention_heads": 12,
        "num_hidden_layers": LAYERS,
        "pad_token_id": 0,
        "type_vocab_size": 2,
        "vocab_size": len(bert_vocabulary()) + 2,
        "encoder_width": BERT_WIDTH,
        "add_cross_attention": True,
    }
    (folder / "med_config.json").write_text(json.dumps(config))
    return folder


def clip_config() -> dict:
    """config.json of the folder below."""
    encoder = {
        "intermediate_size": MLP_WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": CLIP_HEADS,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "projection_dim": EMBEDDING,
    }
    text = {"vocab_size": VOCABULARY, "max_position_embeddings": POSITIONS}
    ids = {"bos_token_id": VOCABULARY - 2, "eos_token_id": VOCABULARY - 1, "pad_token_id": VOCABULARY - 1}
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": EMBEDDING,
        "logit_scale_init_value": 2.6592,
        "text_config": {"model_type": "clip_text_model", "hidden_size": TEXT_WIDTH, **encoder, **text, **ids},
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": WIDTH,
            **encoder,
            "image_size": SIDE,
            "patch_size": PATCH,
            "num_channels": 3,
        },
    }


def clip_folder_tensors(seed: int = 3) -> Tensors:
    """Tensors of a CLIP folder under the names of transformers."""
    draw = Draw(seed)
    found: Tensors = {
        "logit_scale": torch.tensor(4.6),
        "text_projection.weight": draw(EMBEDDING, TEXT_WIDTH),
        "visual_projection.weight": draw(EMBEDDING, WIDTH),
        "text_model.embeddings.token_embedding.weight": draw(VOCABULARY, TEXT_WIDTH, std=1.0),
        "text_model.embeddings.position_embedding.weight": draw(POSITIONS, TEXT_WIDTH),
        "vision_model.embeddings.class_embedding": draw(WIDTH, std=1.0),
        "vision_model.embeddings.position_embedding.weight": draw(GRID**2 + 1, WIDTH, std=1.0),
        "vision_model.embeddings.patch_embedding.weight": draw(
            WIDTH, 3, PATCH, PATCH, std=(3 * PATCH**2) ** -0.5
        ),
    }
    for name in ("vision_model.pre_layrnorm", "vision_model.post_layernorm"):
        found |= draw.norm(name, WIDTH)
    found |= draw.norm("text_model.final_layer_norm", TEXT_WIDTH)
    for part, width in (("text_model", TEXT_WIDTH), ("vision_model", WIDTH)):
        for i in range(LAYERS):
            layer = f"{part}.encoder.layers.{i}"
            found |= draw.norm(f"{layer}.layer_norm1", width) | draw.norm(f"{layer}.layer_norm2", width)
            for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
                found |= draw.linear(f"{layer}.self_attn.{name}", width, width)
            found |= draw.linear(f"{layer}.mlp.fc1", width, MLP_WIDTH)
            found |= draw.linear(f"{layer}.mlp.fc2", MLP_WIDTH, width)
    return found


def write_clip(folder: Path, tensors: Tensors | None = None) -> Path:
    """A CLIP folder of transformers with tokenizer and preprocessor_config.json."""
    write_clip_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(clip_config()))
    save_file(tensors or clip_folder_tensors(), folder / "model.safetensors", metadata={"format": "pt"})
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": SIDE},
        "do_center_crop": True,
        "crop_size": {"height": SIDE, "width": SIDE},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "do_convert_rgb": True,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


def change_json(path: Path, **changes: object) -> None:
    """Set fields of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
