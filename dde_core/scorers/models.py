"""The differentiable part of every scorer: from pixels and token ids to scores or features.

``Cosine``, ``Features``, ``Rating`` and ``Reward`` are called with pixels [n, 3, side, side] and text, and
give one number, or one vector, for each image. Encoders run in the dtype of their weights; norms, products
and heads in float32, features in float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor, nn
from transformers import BlipTextModel, BlipVisionModel, CLIPModel

from dde_core.errors import DataError
from dde_core.scorers.prompts import Text
from dde_core.scorers.weights import shape_at

REWARD_MEAN = 0.16717362830052426
REWARD_STD = 1.0333394966054072
"""ImageReward's constants: mean and deviation of the head's output on its training data."""

LAYERS = (0, 2, 4, 6, 7)
"""Numbers of the linear layers in LAION's and ImageReward's head; those between are dropout."""


class Cosine(nn.Module):
    """Cosine of the angle between an image's and its prompt's embedding; ``logit_scale`` has no part."""

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, pixels: Float[Tensor, "n 3 side side"], text: Text) -> Float32[Tensor, " n"]:
        images = _unit(self.clip.get_image_features(pixel_values=pixels).pooler_output.float())
        prompts = _unit(self.clip.get_text_features(**text).pooler_output.float())
        return (images * prompts).sum(dim=1)


class Features(nn.Module):
    """Embeddings of images, of length 1."""

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, pixels: Float[Tensor, "n 3 side side"], text: Text) -> Float64[Tensor, "n d"]:
        return _unit(self.clip.get_image_features(pixel_values=pixels).pooler_output.double())


class Affine(nn.Module):
    """A head without activations: one weight for each feature, and a bias, in float32."""

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Float64[Tensor, " d"], bias: Float64[Tensor, ""]) -> None:
        super().__init__()
        self.register_buffer("weight", weight.float())
        self.register_buffer("bias", bias.float())

    def forward(self, features: Float32[Tensor, "n d"]) -> Float32[Tensor, " n"]:
        return features @ self.weight + self.bias


class Rating(nn.Module):
    """LAION's aesthetic rating: an affine map of the image's embedding of length 1."""

    def __init__(self, clip: CLIPModel, head: Affine) -> None:
        super().__init__()
        self.clip = clip
        self.head = head

    def forward(self, pixels: Float[Tensor, "n 3 side side"], text: Text) -> Float32[Tensor, " n"]:
        embedded: Tensor = self.clip.get_image_features(pixel_values=pixels).pooler_output
        scores: Tensor = self.head(_unit(embedded.float()))
        return scores


class Reward(nn.Module):
    """ImageReward (arXiv 2304.05977): BLIP's text encoder attends to the image; a head reads its first state.

    The text encoder is no decoder: every token attends to every other.
    """

    def __init__(self, vision: BlipVisionModel, text: BlipTextModel, head: Affine) -> None:
        super().__init__()
        self.vision = vision
        self.text = text
        self.head = head

    def forward(self, pixels: Float[Tensor, "n 3 side side"], text: Text) -> Float32[Tensor, " n"]:
        states = self.text(
            **text,
            encoder_hidden_states=self.vision(pixel_values=pixels).last_hidden_state,
            is_decoder=False,
        )
        scores: Tensor = self.head(states.last_hidden_state[:, 0].float())
        return (scores - REWARD_MEAN) / REWARD_STD


def head_shapes(name: str, owner: str, found: Mapping[str, Tensor], width: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a head of linear layers ``layers.{0,2,4,6,7}`` that reads ``width`` features.

    The widths between are derived from the tensors. Raises DataError.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    keys = [f"layers.{number}" for number in LAYERS]
    between = [shape_at(name, owner, dict(found), f"{key}.weight", 2)[0] for key in keys[:-1]]
    widths = [width, *between, 1]
    for key, (inputs, outputs) in zip(keys, pairwise(widths), strict=True):
        shapes[f"{key}.weight"] = (outputs, inputs)
        shapes[f"{key}.bias"] = (outputs,)
    return shapes


def affine(layers: list[tuple[Tensor, Tensor]]) -> Affine:
    """Linear layers without activations as one map, composed in float64."""
    weight, bias = (each.double() for each in layers[0])
    for next_weight, next_bias in layers[1:]:
        bias = next_weight.double() @ bias + next_bias.double()
        weight = next_weight.double() @ weight
    if not torch.isfinite(weight).all() or not torch.isfinite(bias).all():
        raise DataError("the head's weights must be finite, got an infinite or NaN value")
    return Affine(weight[0], bias[0])


def _unit(features: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    length: Tensor = features.norm(dim=1, keepdim=True)
    return features / length
