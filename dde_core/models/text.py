"""From captions and image sizes to the U-Net's conditioning, as in the family's diffusers pipeline."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dde_core.conditioning import Conditioning
from dde_core.models.folder import ModelFolder
from dde_core.models.tokens import tokenize


class TextEncoders:
    """A folder's text encoders, with their outputs combined as the family needs them.

    sd15 takes the last hidden state. sdxl concatenates the last but one of both encoders, and takes the
    second's pooled output. "No caption" is the empty caption, or zeros if the pipeline uses zeros (SDXL's
    ``force_zeros_for_empty_prompt``).
    """

    def __init__(
        self, folder: ModelFolder, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        self.encoders = [encoder.to(device, dtype) for encoder in folder.text_encoders()]
        self._device = device
        self._is_sdxl = folder.family == "sdxl"
        self._zeros = folder.no_caption_is_zeros
        self.tokenizers = folder.tokenizers()
        self.empty_ids = tokenize(self.tokenizers, [""])

    @torch.no_grad()
    def __call__(
        self, token_ids: Int[np.ndarray, "b k s"], no_caption: Bool[np.ndarray, " b"] | None = None
    ) -> Conditioning:
        """The conditioning of captions. It is complete for sd15; sdxl needs ``with_sizes`` as well.

        ``no_caption`` marks rows without a caption; by default those with the ids of the empty one.
        """
        ids = torch.from_numpy(np.asarray(token_ids, dtype=np.int64)).to(self._device)
        if not self._is_sdxl:
            return {"encoder_hidden_states": self.encoders[0](ids[:, 0]).last_hidden_state}
        outputs = [encoder(ids[:, k], output_hidden_states=True) for k, encoder in enumerate(self.encoders)]
        text = {
            "encoder_hidden_states": torch.cat([output.hidden_states[-2] for output in outputs], dim=-1),
            "text_embeds": outputs[-1].text_embeds,
        }
        if self._zeros:
            marked = (token_ids == self.empty_ids).all(axis=(1, 2)) if no_caption is None else no_caption
            is_empty = torch.from_numpy(marked).to(self._device)
            for name, rows in text.items():
                text[name] = rows.masked_fill(is_empty.view(-1, *[1] * (rows.ndim - 1)), 0.0)
        return text

    def of_captions(self, captions: Sequence[str | None], height_px: int, width_px: int) -> Conditioning:
        """The conditioning of uncropped images of this size, as in the diffusers pipelines. None is no
        caption; "" is a caption, which is encoded."""
        token_ids = tokenize(self.tokenizers, [caption or "" for caption in captions])
        text = self(token_ids, np.array([caption is None for caption in captions]))
        sizes = np.tile([[height_px, width_px]], (len(captions), 1))
        return self.with_sizes(text, sizes, np.zeros_like(sizes), (height_px, width_px))

    def with_sizes(
        self,
        text: Conditioning,
        sizes: Int[np.ndarray, "b 2"],
        crops: Int[np.ndarray, "b 2"],
        target_px: tuple[int, int],
    ) -> Conditioning:
        """``text`` with the images' sizes, for the family that is conditioned on them (SDXL; see
        ``time_ids``)."""
        if not self._is_sdxl:
            return text
        return {**text, "time_ids": time_ids(sizes, crops, target_px).to(self._device)}


def time_ids(
    sizes: Int[np.ndarray, "b 2"], crops: Int[np.ndarray, "b 2"], target_px: tuple[int, int]
) -> Float[Tensor, "b 6"]:
    """SDXL's micro-conditioning (arXiv 2307.01952, section 2.2): original (height, width), crop (top, left),
    target.

    ``crops`` are in pixels of the original. The model counts them after the shorter side is scaled to the
    target's.
    """
    scale = min(target_px) / np.maximum(sizes.min(axis=1, keepdims=True), 1)
    targets = np.broadcast_to(np.array(target_px), sizes.shape)
    columns = [sizes, np.rint(crops * scale), targets]
    return torch.from_numpy(np.concatenate(columns, axis=1).astype(np.float32))
