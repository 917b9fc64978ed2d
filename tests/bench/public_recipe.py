"""Diffusion-DPO as public trainers run it: the baseline of the training benchmarks.

Every step decodes images, encodes them by the VAE and their captions by the text encoders, and runs policy
and frozen reference on the same noisy latents.

From the published equations (Wallace et al., arXiv 2311.12908, Eq. 14, with the constants of the authors'
code): winner and loser have the same t and noise eps; m is a model's squared error on eps (or on v),
averaged over channels, height and width; and

    loss = mean over pairs of -log sigmoid(-0.5 beta ((m_theta^w - m_theta^l) - (m_ref^w - m_ref^l)))

Loading, compiling, gradient checkpointing and the optimizer are those of our own runs, so only the work of
a step differs. In bf16 the policy runs under autocast, as ours does. As in public scripts, the frozen
models (VAE, text encoders, reference) are cast to bf16 once and run without autocast.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from dde_core.conditioning import Conditioning, concatenated, predict
from dde_core.config import TrainConfig
from dde_core.models.policy import Policy, make_optimizer
from dde_core.models.text import TextEncoders
from dde_core.models.tokens import tokenize
from dde_core.schedule import Schedule, add_noise

Row = Mapping[str, Any]
"""A labelled pair: ``jpg_0``, ``jpg_1``, ``label_0``, ``caption``."""


class PublicRecipe:
    """``step`` is one optimizer step, in micro-batches. ``seconds`` adds up the time of each part."""

    def __init__(
        self,
        folder: Any,
        training: TrainConfig,
        device: torch.device,
        rows: Sequence[Row],
        size_px: int,
        beta: float,
        workers: int,
    ) -> None:
        """``workers`` processes decode ``rows`` ahead, in order, repeatedly. 0: the step decodes them."""
        self._training = training
        self._device = device
        self._size_px = size_px
        self._beta = beta
        self._schedule: Schedule = folder.schedule().to(device)
        self._frozen_dtype = torch.bfloat16 if training.precision == "bf16" else torch.float32
        self.text = TextEncoders(folder, device)
        self.vae = folder.vae().to(device, self._frozen_dtype)
        for encoder in self.text.encoders:
            encoder.to(self._frozen_dtype)
        self.policy = Policy(folder, training, device)
        self.reference = folder.unet().requires_grad_(False).to(device, self._frozen_dtype)
        if training.compile:
            self.reference.compile()
        self._optimizer = make_optimizer(self.policy.parameters(), training)
        self._micro = training.micro_batch_size or training.batch_size
        self.images = Images(rows, folder.tokenizers(), size_px)
        self._loader = DataLoader(
            self.images,
            self._micro,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
        )
        self._batches = self._repeat_batches()
        parts = ("images", "VAE", "text encoders", "policy", "reference", "optimizer")
        self.seconds = dict.fromkeys(parts, 0.0)

    def close(self) -> None:
        """End the decoding processes. The garbage collector would wait 5 s for each."""
        self._batches.close()
        del self._batches, self._loader

    def step(self) -> float:
        """One optimizer step. Returns the loss of its last micro-batch."""
        self._optimizer.zero_grad(set_to_none=True)
        for _ in range(0, self._training.batch_size, self._micro):
            with self._timed("images"):
                pixels_w, pixels_l, ids, sizes = next(self._batches)
            with self._timed("VAE"):
                latents = self._encode(torch.cat([pixels_w, pixels_l]).to(self._device, non_blocking=True))
            with self._timed("text encoders"):
                text = self.text(ids.numpy())
                target_size = (self._size_px, self._size_px)
                conditioning = self.text.with_sizes(text, sizes.numpy(), np.zeros_like(sizes), target_size)
            loss = self.loss(latents, conditioning)
            with self._timed("policy"):
                (loss * self._micro / self._training.batch_size).backward()
        with self._timed("optimizer"):
            self.policy.clip_gradients()
            self._optimizer.step()
        return loss.item()

    def loss(self, latents: Tensor, conditioning: Conditioning) -> Tensor:
        """Draw t and noise; the loss of float32 latents [2b c h w], winners first, with b conditionings."""
        noise = torch.randn_like(latents[: len(latents) // 2]).repeat(2, 1, 1, 1)
        t = torch.randint(1, self._schedule.T + 1, (len(latents) // 2,), device=self._device).repeat(2)
        both = concatenated(conditioning, conditioning)
        with self._timed("policy"), self.policy.autocast():
            theta = noise_errors(self.policy.trained, self._schedule, latents, noise, t, both)
        with self._timed("reference"), torch.no_grad():
            cast = {name: rows.to(self._frozen_dtype) for name, rows in both.items()}
            ref = noise_errors(self._run_reference, self._schedule, latents, noise, t, cast)
        return diffusion_dpo_loss(theta, ref, self._beta)

    def _run_reference(self, x_t: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.reference(x_t.to(self._frozen_dtype), *args, **kwargs)

    @torch.no_grad()
    def _encode(self, pixels: Tensor) -> Tensor:
        """Latents: a float32 sample of each image's posterior, winners first."""
        posterior = self.vae.encode(pixels.to(self._frozen_dtype)).latent_dist
        return posterior.sample().float() * self.vae.config.scaling_factor

    def _repeat_batches(self) -> Generator[list[Tensor], None, None]:
        while True:
            yield from self._loader

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        """Add to ``seconds``. On a GPU these are the seconds of the thread that launches its kernels."""
        began = time.monotonic()
        yield
        self.seconds[part] += time.monotonic() - began


def noise_errors(
    unet: Callable[..., Any],
    schedule: Schedule,
    latents: Tensor,
    noise: Tensor,
    t: Tensor,
    conditioning: Conditioning,
) -> Tensor:
    """Squared error of each sample's prediction, averaged over channels, height and width: float32 [2b]."""
    output = predict(unet, add_noise(schedule, latents, noise, t), t, conditioning)
    target = noise
    if schedule.prediction_type == "v_prediction":
        alpha_bar = schedule.alpha_bar[t].float().view(-1, 1, 1, 1)
        target = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * latents
    return F.mse_loss(output.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))


def diffusion_dpo_loss(theta: Tensor, ref: Tensor, beta: float) -> Tensor:
    """Diffusion-DPO's loss, a scalar, from the errors of policy and reference: [2b] each, winners first."""
    theta_w, theta_l = theta.chunk(2)
    ref_w, ref_l = ref.chunk(2)
    return -F.logsigmoid(-0.5 * beta * ((theta_w - theta_l) - (ref_w - ref_l))).mean()


class Images(Dataset):
    """The rows, decoded and tokenized.

    An item holds the winner's and the loser's pixels [3 size size] in -1..1, token ids [k s], and the
    (height, width) of the winner's file.
    """

    def __init__(self, rows: Sequence[Row], tokenizers: Sequence[Any], size_px: int) -> None:
        self._rows = rows
        self._tokenizers = tokenizers
        self._size_px = size_px

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        row = self._rows[number]
        winner, loser = ("jpg_0", "jpg_1") if row["label_0"] > 0.5 else ("jpg_1", "jpg_0")
        pixels, size = self._pixels(row[winner])
        ids = torch.from_numpy(tokenize(self._tokenizers, [row["caption"]])[0])
        return pixels, self._pixels(row[loser])[0], ids, torch.tensor(size)

    def _pixels(self, data: bytes) -> tuple[Tensor, tuple[int, int]]:
        """Scale the shorter side to ``size_px``, crop the center; also returns the file's (height, width)."""
        size = self._size_px
        with Image.open(io.BytesIO(data)) as file:
            image = file.convert("RGB")
        width, height = image.size
        if min(width, height) != size:
            scale = size / min(width, height)
            image = image.resize((round(width * scale), round(height * scale)), Image.Resampling.BILINEAR)
        left, top = (image.width - size) // 2, (image.height - size) // 2
        pixels = np.asarray(image.crop((left, top, left + size, top + size)), np.float32) / 127.5 - 1
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), (height, width)
