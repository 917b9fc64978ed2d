"""Train the shapes pipeline from scratch: tokenizer, VAE, text encoder and U-Net, saved as a diffusers
folder.

    python -m dde_core.shapes.train --out FOLDER

This command with its defaults made the shipped weights: in about 6 minutes for the VAE and 65 for the rest,
on one core of a 2-core x86-64 machine (float32). The same seed, thread count and library versions give the
same weights.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from jaxtyping import Float32, UInt8
from torch import Tensor
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from dde_core.shapes.scenes import SIZE_PX, all_captions, all_scenes, caption, omit_attributes, render

MAX_TOKENS = 16
JITTERED_COPIES = 8
OMIT_PROBABILITY = 0.4
EMPTY_CAPTION = 0.1


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP byte-pair tokenizer whose merges spell the words of the world: one token a word.

    Later merges rank behind earlier ones, so finished words stay one token when the next word adds its
    merges.
    """
    words = sorted({word for text in all_captions() for word in text.split()})
    letters = sorted({letter for word in words for letter in word})
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    for word in words:
        parts = _byte_pairs([*word[:-1], f"{word[-1]}</w>"], merges)
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts = ["".join(parts[:2]), *parts[2:]]
            vocabulary.append(parts[0])
    vocabulary = [*dict.fromkeys(vocabulary), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text(
        "\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)]) + "\n"
    )
    return CLIPTokenizer.from_pretrained(str(folder), model_max_length=MAX_TOKENS)


def _byte_pairs(parts: list[str], merges: list[tuple[str, str]]) -> list[str]:
    """Apply the merges to a word's parts."""
    while True:
        pairs = list(pairwise(parts))
        mergeable = [pair for pair in pairs if pair in merges]
        if not mergeable:
            return parts
        best = min(mergeable, key=merges.index)
        at = pairs.index(best)
        parts = [*parts[:at], "".join(best), *parts[at + 2 :]]


def train_vae(steps: int, rng: np.random.Generator) -> AutoencoderKL:
    """Train an autoencoder with f = 4 and four latent channels on jittered scenes: L1 + L2 and a small KL
    term."""
    vae = AutoencoderKL(
        sample_size=SIZE_PX,
        block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=16,
        latent_channels=4,
        mid_block_add_attention=False,
    )
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.05)
    scenes = all_scenes()
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    began = time.monotonic()
    for step in range(steps):
        images = np.stack([render(scenes[i], rng) for i in rng.integers(len(scenes), size=32)])
        pixels = to_pixels(images)
        posterior = vae.encode(pixels).latent_dist
        restored = vae.decode(posterior.sample(generator=generator)).sample
        error = functional.l1_loss(restored, pixels) + functional.mse_loss(restored, pixels)
        loss = error + 1e-4 * posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"vae {step}/{steps} error {error.item():.4f} {time.monotonic() - began:.0f} s", flush=True)
    return vae.eval().requires_grad_(False)


def to_pixels(images: UInt8[np.ndarray, "n h w 3"]) -> Float32[Tensor, "n 3 h w"]:
    """Pixels in -1..1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def encode_scenes(vae: AutoencoderKL, rng: np.random.Generator) -> Float32[Tensor, "scenes copies 4 8 8"]:
    """Posterior means of JITTERED_COPIES of every scene, scaled to unit deviation. Sets the VAE's
    scaling_factor."""
    latents = []
    for scene in all_scenes():
        images = np.stack([render(scene, rng) for _ in range(JITTERED_COPIES)])
        latents.append(vae.encode(to_pixels(images)).latent_dist.mean)
    stacked = torch.stack(latents)
    scaling_factor: float = round(1 / stacked.std().item(), 5)
    vae.register_to_config(scaling_factor=scaling_factor)
    return stacked * scaling_factor


def build_denoiser(tokenizer: CLIPTokenizer) -> tuple[CLIPTextModel, UNet2DConditionModel]:
    """An untrained two-layer text encoder and 2.5M-parameter U-Net."""
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            projection_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=SIZE_PX // 4,
        block_out_channels=(64, 96),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    return text_encoder, unet


def train_denoiser(
    latents: Tensor,
    tokenizer: CLIPTokenizer,
    scheduler: DDIMScheduler,
    *,
    steps: int,
    rng: np.random.Generator,
    on_snapshot: Callable[[CLIPTextModel, UNet2DConditionModel], None],
) -> tuple[CLIPTextModel, UNet2DConditionModel]:
    """Train text encoder and U-Net on the noise-prediction loss, with attributes omitted at random. Returns
    their EMA."""
    online = torch.nn.ModuleList(build_denoiser(tokenizer))
    average = copy.deepcopy(online).requires_grad_(False)
    text_encoder, unet = online
    optimizer = torch.optim.AdamW(online.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.05)
    scenes = all_scenes()
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    began = time.monotonic()
    for step in range(steps):
        rows = rng.integers(len(scenes), size=128)
        x0 = latents[rows, rng.integers(JITTERED_COPIES, size=128)]
        texts = [
            caption(omit_attributes(scenes[i], rng, OMIT_PROBABILITY))
            if rng.random() >= EMPTY_CAPTION
            else ""
            for i in rows
        ]
        t = torch.from_numpy(rng.integers(scheduler.config.num_train_timesteps, size=128))
        noise = torch.randn(x0.shape, generator=generator)
        tokens = tokenizer(texts, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt").input_ids
        predicted = unet(scheduler.add_noise(x0, noise, t), t, text_encoder(tokens).last_hidden_state).sample
        loss = functional.mse_loss(predicted, noise)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch has no types here
        torch.nn.utils.clip_grad_norm_(online.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        decay = min(0.999, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(average.parameters()), list(online.parameters()), 1 - decay)
        if step % 100 == 0 or step == steps - 1:
            print(
                f"denoiser {step}/{steps} loss {loss.item():.4f} {time.monotonic() - began:.0f} s", flush=True
            )
        if step and step % 1000 == 0:
            on_snapshot(*average)
    return average[0], average[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae-steps", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=9000)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    tokenizer = build_tokenizer(options.out / "tokenizer")
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    vae = train_vae(options.vae_steps, rng)
    latents = encode_scenes(vae, rng)

    def save(text_encoder: CLIPTextModel, unet: UNet2DConditionModel) -> None:
        StableDiffusionPipeline(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(options.out)

    save(*train_denoiser(latents, tokenizer, scheduler, steps=options.steps, rng=rng, on_snapshot=save))


if __name__ == "__main__":
    main()
