"""The scorers' arithmetic in plain torch, from the papers and the original layouts: no class of transformers.

``open_clip_embeddings`` reads tensors in open_clip's layout, ``image_reward`` those of ImageReward.pt. All
computes in float64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Activation = Callable[[Tensor], Tensor]


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / 2**0.5)) / 2


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def norm(x: Tensor, weights: Tensors, name: str, eps: float) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    scale = (centered**2).mean(-1, keepdim=True) + eps
    return centered / scale.sqrt() * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(x: Tensor, weights: Tensors, name: str) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, allowed: Tensor | None = None) -> Tensor:
    """Softmax attention of [n, tokens, width]; ``allowed`` [.., queries, keys] says who may see whom."""
    outputs = []
    for q_h, k_h, v_h in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
        logits = q_h @ k_h.transpose(1, 2) / q_h.shape[-1] ** 0.5
        if allowed is not None:
            logits = logits.masked_fill(~allowed, -torch.inf)
        outputs.append(logits.softmax(-1) @ v_h)
    return torch.cat(outputs, -1)


def patches(pixels: Tensor, kernel: Tensor) -> Tensor:
    """A convolution without overlap as a matrix product: [n, patches, width], rows first."""
    side = kernel.shape[-1]
    n, _, height, width = pixels.shape
    cut = pixels.reshape(n, 3, height // side, side, width // side, side)
    flat = cut.permute(0, 2, 4, 1, 3, 5).reshape(n, -1, 3 * side * side)
    return flat @ kernel.reshape(len(kernel), -1).T


def doubles(weights: Tensors) -> Tensors:
    return {name: each.double() if each.is_floating_point() else each for name, each in weights.items()}


def unit(x: Tensor) -> Tensor:
    return x / (x**2).sum(-1, keepdim=True).sqrt()


# ---- CLIP


def clip_blocks(
    x: Tensor, w: Tensors, prefix: str, heads: int, activation: Activation, allowed: Tensor | None
) -> Tensor:
    i = 0
    while f"{prefix}transformer.resblocks.{i}.ln_1.weight" in w:
        block = f"{prefix}transformer.resblocks.{i}"
        inputs = norm(x, w, f"{block}.ln_1", 1e-5)
        joint = inputs @ w[f"{block}.attn.in_proj_weight"].T + w[f"{block}.attn.in_proj_bias"]
        x = x + linear(attend(*joint.chunk(3, -1), heads, allowed), w, f"{block}.attn.out_proj")
        hidden = activation(linear(norm(x, w, f"{block}.ln_2", 1e-5), w, f"{block}.mlp.c_fc"))
        x = x + linear(hidden, w, f"{block}.mlp.c_proj")
        i += 1
    assert i > 0
    return x


def clip_images(w: Tensors, pixels: Tensor, heads: int, activation: Activation) -> Tensor:
    """Embeddings of images, of length 1."""
    w = doubles(w)
    tokens = patches(pixels.double(), w["visual.conv1.weight"])
    first = w["visual.class_embedding"].expand(len(tokens), 1, -1)
    x = torch.cat([first, tokens], 1) + w["visual.positional_embedding"]
    x = clip_blocks(norm(x, w, "visual.ln_pre", 1e-5), w, "visual.", heads, activation, None)
    return unit(norm(x[:, 0], w, "visual.ln_post", 1e-5) @ w["visual.proj"])


def clip_prompts(w: Tensors, ids: Tensor, heads: int, activation: Activation) -> Tensor:
    """Embeddings of prompts, of length 1, pooled where the first greatest id is."""
    w = doubles(w)
    x = w["token_embedding.weight"][ids] + w["positional_embedding"][: ids.shape[1]]
    earlier = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    x = norm(clip_blocks(x, w, "", heads, activation, earlier), w, "ln_final", 1e-5)
    return unit(x[torch.arange(len(ids)), ids.argmax(1)] @ w["text_projection"])


def as_open_clip(w: Tensors) -> Tensors:
    """The tensors of a CLIP folder of transformers in the layout that is computed above."""
    found: Tensors = {
        "visual.conv1.weight": w["vision_model.embeddings.patch_embedding.weight"],
        "visual.class_embedding": w["vision_model.embeddings.class_embedding"],
        "visual.positional_embedding": w["vision_model.embeddings.position_embedding.weight"],
        "visual.proj": w["visual_projection.weight"].T,
        "text_projection": w["text_projection.weight"].T,
        "token_embedding.weight": w["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": w["text_model.embeddings.position_embedding.weight"],
    }
    norms = {
        "visual.ln_pre": "vision_model.pre_layrnorm",
        "visual.ln_post": "vision_model.post_layernorm",
        "ln_final": "text_model.final_layer_norm",
    }
    blocks = {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "attn.out_proj": "self_attn.out_proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    for kind in ("weight", "bias"):
        found |= {f"{mine}.{kind}": w[f"{theirs}.{kind}"] for mine, theirs in norms.items()}
        for prefix, part in (("visual.", "vision_model"), ("", "text_model")):
            i = 0
            while f"{part}.encoder.layers.{i}.mlp.fc1.weight" in w:
                layer = f"{part}.encoder.layers.{i}"
                block = f"{prefix}transformer.resblocks.{i}"
                found |= {f"{block}.{m}.{kind}": w[f"{layer}.{t}.{kind}"] for m, t in blocks.items()}
                joint = [w[f"{layer}.self_attn.{each}_proj.{kind}"] for each in "qkv"]
                found[f"{block}.attn.in_proj_{kind}"] = torch.cat(joint)
                i += 1
    return found


# ---- heads and ImageReward


def head(x: Tensor, w: Tensors, prefix: str = "") -> Tensor:
    """LAION's layers one after the other."""
    w = doubles(w)
    for number in (0, 2, 4, 6, 7):
        x = linear(x, w, f"{prefix}layers.{number}")
    return x[:, 0]


def image_reward(
    w: Tensors, pixels: Tensor, ids: Tensor, mask: Tensor, vision_heads: int = 16, text_heads: int = 12
) -> Tensor:
    """ImageReward's score of each image for its prompt."""
    w = doubles(w)
    image = blip_image(w, pixels.double(), vision_heads)
    name = "blip.text_encoder.embeddings"
    x = w[f"{name}.word_embeddings.weight"][ids] + w[f"{name}.position_embeddings.weight"][: ids.shape[1]]
    x = norm(x, w, f"{name}.LayerNorm", 1e-12)
    seen = mask.bool()[:, None, :]
    i = 0
    while f"blip.text_encoder.encoder.layer.{i}.output.dense.weight" in w:
        layer = f"blip.text_encoder.encoder.layer.{i}"
        x = bert_attention(x, x, w, f"{layer}.attention", text_heads, seen)
        x = bert_attention(x, image, w, f"{layer}.crossattention", text_heads, None)
        hidden = gelu(linear(x, w, f"{layer}.intermediate.dense"))
        x = norm(x + linear(hidden, w, f"{layer}.output.dense"), w, f"{layer}.output.LayerNorm", 1e-12)
        i += 1
    assert i > 0
    return (head(x[:, 0], w, "mlp.") - 0.16717362830052426) / 1.0333394966054072


def bert_attention(x: Tensor, over: Tensor, w: Tensors, name: str, heads: int, seen: Tensor | None) -> Tensor:
    q = linear(x, w, f"{name}.self.query")
    k = linear(over, w, f"{name}.self.key")
    v = linear(over, w, f"{name}.self.value")
    out = linear(attend(q, k, v, heads, seen), w, f"{name}.output.dense")
    return norm(x + out, w, f"{name}.output.LayerNorm", 1e-12)


def blip_image(w: Tensors, pixels: Tensor, heads: int) -> Tensor:
    """States of all tokens of BLIP's vision encoder."""
    name = "blip.visual_encoder"
    kernel = w[f"{name}.patch_embed.proj.weight"]
    tokens = patches(pixels, kernel) + w[f"{name}.patch_embed.proj.bias"]
    x = torch.cat([w[f"{name}.cls_token"].expand(len(tokens), 1, -1), tokens], 1) + w[f"{name}.pos_embed"]
    i = 0
    while f"{name}.blocks.{i}.norm1.weight" in w:
        block = f"{name}.blocks.{i}"
        joint = linear(norm(x, w, f"{block}.norm1", 1e-6), w, f"{block}.attn.qkv")
        x = x + linear(attend(*joint.chunk(3, -1), heads), w, f"{block}.attn.proj")
        hidden = gelu(linear(norm(x, w, f"{block}.norm2", 1e-6), w, f"{block}.mlp.fc1"))
        x = x + linear(hidden, w, f"{block}.mlp.fc2")
        i += 1
    assert i > 0
    return norm(x, w, f"{name}.norm", 1e-6)
