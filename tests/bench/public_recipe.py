"""Diffusion-DPO as public trainers run it, written out: every step decodes the pictures, encodes them by the VAE and the
captions by the text encoders, and runs policy and frozen reference on the same noisy latents.

From the published equations (Wallace et al., arXiv 2311.12908, Eq. 14, with the constants of the authors' code): winner and
loser share t and the noise eps, m is a model's squared error on eps (or on v), averaged over channels, height and width, and

    loss = mean over pairs of -log sigmoid(-0.5 beta ((m_theta^w - m_theta^l) - (m_ref^w - m_ref^l)))

How the policy is loaded, compiled and checkpointed, and its optimizer, are those of our own runs, so that the two differ by
what a step does alone. In bf16 the policy runs under autocast, as ours does; what is frozen (VAE, text encoders, the copy that
is the reference) is cast to bf16 once and runs without it, as public scripts have it.
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
    """``step`` is one optimizer step of ``training.batch_size`` pairs in micro-batches. ``seconds`` adds up where they went."""

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
        """``rows`` are gone through in order, over and over, by ``workers`` processes that decode ahead (0: in line)."""
        self._training, self._device, self._size_px, self._beta = training, device, size_px, beta
        self._schedule: Schedule = folder.schedule().to(device)
        self._frozen = torch.bfloat16 if training.precision == "bf16" else torch.float32
        self.text, self.vae = TextEncoders(folder, device), folder.vae().to(device, self._frozen)
        for encoder in self.text.encoders:
            encoder.to(self._frozen)
        self.policy = Policy(folder, training, device)
        self.reference = folder.unet().requires_grad_(False).to(device, self._frozen)
        if training.compile:
            self.reference.compile()
        self._optimizer = make_optimizer(self.policy.parameters(), training)
        self._micro = training.micro_batch_size or training.batch_size
        self.pictures = Pictures(rows, folder.tokenizers(), size_px)
        ahead = {
            "num_workers": workers,
            "persistent_workers": workers > 0,
            "pin_memory": device.type == "cuda",
        }
        self._loader = DataLoader(self.pictures, self._micro, **ahead)
        self._batches = self._endless()
        self.seconds = dict.fromkeys(
            ("pictures", "VAE", "text encoders", "policy", "reference", "optimizer"), 0.0
        )

    def close(self) -> None:
        """End the processes that decode. Left to the garbage collector, each is waited for 5 s."""
        self._batches.close()
        del self._batches, self._loader

    def step(self) -> float:
        """The loss of its last micro-batch."""
        self._optimizer.zero_grad(set_to_none=True)
        for _ in range(0, self._training.batch_size, self._micro):
            with self._timed("pictures"):
                pixels_w, pixels_l, ids, sizes = next(self._batches)
            with self._timed("VAE"):
                latents = self._encoded(torch.cat([pixels_w, pixels_l]).to(self._device, non_blocking=True))
            with self._timed("text encoders"):
                told = self.text.with_sizes(
                    self.text(ids.numpy()), sizes.numpy(), np.zeros_like(sizes), (self._size_px,) * 2
                )
            loss = self.loss(latents, told)
            with self._timed("policy"):
                (loss * self._micro / self._training.batch_size).backward()
        with self._timed("optimizer"):
            self.policy.clip_gradients()
            self._optimizer.step()
        return loss.item()

    def loss(self, latents: Tensor, told: Conditioning) -> Tensor:
        """Of float32 latents [2b c h w], winners first, and what the U-Net is told of each pair. Draws t and noise."""
        noise = torch.randn_like(latents[: len(latents) // 2]).repeat(2, 1, 1, 1)
        t = torch.randint(1, self._schedule.T + 1, (len(latents) // 2,), device=self._device).repeat(2)
        told = concatenated(told, told)
        with self._timed("policy"), self.policy.autocast():
            theta = noise_errors(self.policy.trained, self._schedule, latents, noise, t, told)
        with self._timed("reference"), torch.no_grad():
            told = {name: rows.to(self._frozen) for name, rows in told.items()}
            ref = noise_errors(self._reference, self._schedule, latents, noise, t, told)
        return diffusion_dpo_loss(theta, ref, self._beta)

    def _reference(self, x_t: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.reference(x_t.to(self._frozen), *args, **kwargs)

    @torch.no_grad()
    def _encoded(self, pixels: Tensor) -> Tensor:
        """A sample of the posterior of each picture, winners first: float32, whatever the VAE computes in."""
        return (
            self.vae.encode(pixels.to(self._frozen)).latent_dist.sample().float()
            * self.vae.config.scaling_factor
        )

    def _endless(self) -> Generator[list[Tensor], None, None]:
        while True:
            yield from self._loader

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        """Without waiting for a GPU: there the parts are those of the thread that feeds it."""
        began = time.monotonic()
        yield
        self.seconds[part] += time.monotonic() - began


def noise_errors(
    unet: Callable[..., Any],
    schedule: Schedule,
    latents: Tensor,
    noise: Tensor,
    t: Tensor,
    told: Conditioning,
) -> Tensor:
    """Squared error of the model's prediction for each sample, mean over channels, height and width: float32 [2b]."""
    output = predict(unet, add_noise(schedule, latents, noise, t), t, told)
    target = noise
    if schedule.prediction_type == "v_prediction":
        alpha_bar = schedule.alpha_bar[t].float().view(-1, 1, 1, 1)
        target = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * latents
    return F.mse_loss(output.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))


def diffusion_dpo_loss(theta: Tensor, ref: Tensor, beta: float) -> Tensor:
    """Diffusion-DPO's loss from the errors of policy and reference, winners first: [2b] each, to a scalar."""
    theta_w, theta_l = theta.chunk(2)
    ref_w, ref_l = ref.chunk(2)
    return -F.logsigmoid(-0.5 * beta * ((theta_w - theta_l) - (ref_w - ref_l))).mean()


class Pictures(Dataset):
    """For each row: pixels of winner and loser, [3 size size] in -1..1, token ids [k s], the winner's (height, width)."""

    def __init__(self, rows: Sequence[Row], tokenizers: Sequence[Any], size_px: int) -> None:
        self._rows, self._tokenizers, self._size_px = rows, tokenizers, size_px

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        row = self._rows[number]
        winner, loser = ("jpg_0", "jpg_1") if row["label_0"] > 0.5 else ("jpg_1", "jpg_0")
        pixels, size = self._pixels(row[winner])
        ids = torch.from_numpy(tokenize(self._tokenizers, [row["caption"]])[0])
        return pixels, self._pixels(row[loser])[0], ids, torch.tensor(size)

    def _pixels(self, data: bytes) -> tuple[Tensor, tuple[int, int]]:
        """Scaled until the shorter side is ``size_px``, then the centre square."""
        size = self._size_px
        with Image.open(io.BytesIO(data)) as file:
            picture = file.convert("RGB")
        width, height = picture.size
        if min(width, height) != size:
            scale = size / min(width, height)
            picture = picture.resize((round(width * scale), round(height * scale)), Image.Resampling.BILINEAR)
        left, top = (picture.width - size) // 2, (picture.height - size) // 2
        pixels = np.asarray(picture.crop((left, top, left + size, top + size)), np.float32) / 127.5 - 1
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), (height, width)
