"""What the labels of rounds bring on the shapes world: the reward's own raise it, a coin's do not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from dde_core.config import ObjectiveConfig, SampleConfig, TrainConfig
from dde_core.generation import TextToImage
from dde_core.models.folder import ModelFolder
from dde_core.models.policy import Policy
from dde_core.reward import Reward
from dde_core.rollouts import Roller
from dde_core.rounds import RoundBatches, RoundRows, kept_pairs
from dde_core.shapes import MODEL_DIR, PAIRS_FILE, PROMPTS_FILE
from dde_core.shapes.scorers import ShapesScorer, score
from dde_core.train_step import errors_of, step_losses

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

OBJECTIVE = ObjectiveConfig(
    method="tailorpo",
    beta=100.0,
    guidance_scale=3.0,
    t_min=602,
    t_max=902,
    candidates=4,
    lookahead=2,
    min_gap=0.05,
)
TRAINING = TrainConfig(batch_size=48, steps=20, learning_rate=2e-5)
PROMPTS = 400


def prompts() -> tuple[list[str], list[str]]:
    """For rollouts: captions of the world's pairs; and for the evaluation."""
    held_out = PROMPTS_FILE.read_text().splitlines()
    captions = pq.read_table(PAIRS_FILE, columns=["caption"])["caption"].to_pylist()
    return [text for text in dict.fromkeys(captions) if text not in held_out][:PROMPTS], held_out


def taste_of(folder: ModelFolder, unet: nn.Module | None = None) -> np.ndarray:
    """Taste of an image for each of the evaluation's prompts, with the same seeds for every model."""
    texts = prompts()[1]
    sample = SampleConfig(steps=20, guidance_scale=3.0)
    return score(TextToImage(folder, unet=unet)(texts, range(len(texts)), sample), texts)["taste"]


def trained(folder: ModelFolder, coin: bool) -> nn.Module:
    """A policy after as many rounds as updates, with labels of the reward, or of a coin."""
    roller = Roller(folder, OBJECTIVE, TRAINING)
    reward = Reward(folder.vae(), {"taste": (ShapesScorer("taste"), 1.0)})
    batches = RoundBatches(folder, OBJECTIVE, TRAINING, torch.device("cpu"))
    policy, schedule = Policy(folder, TRAINING), folder.schedule()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=TRAINING.learning_rate)
    texts, random = prompts()[0], np.random.default_rng(0)
    for round in range(TRAINING.steps):
        roller.load(policy.weights())
        parts: list[RoundRows] = []
        while sum(map(len, parts)) < TRAINING.batch_size:
            slots = range(16 * len(parts), 16 * len(parts) + 16)
            captions = [texts[(16 * round + slot) % len(texts)] for slot in slots]
            rankings = roller((0, round), slots, captions, reward)
            parts.append(kept_pairs(rankings, slots, captions, OBJECTIVE)[0])
        rows = RoundRows.joined(parts)
        if coin:
            sign = random.choice(np.array([-1, 1], np.float32), len(rows))
            rows = replace(rows, ref=rows.ref * sign, dz=rows.dz * sign[:, None, None, None])
        batches.enter(round, rows)
        part = batches.rows(0, 0, 1)
        batch = batches.make(part)
        theta = errors_of(OBJECTIVE)(policy.unet, schedule, batch)
        terms = step_losses(theta, batches.anchors(part), batch.t, OBJECTIVE, schedule, None, batch.share)
        terms.loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return policy.unet


def test_a_coins_labels_bring_nothing_and_the_rewards_own_do():
    torch.set_num_threads(1)
    folder = ModelFolder(MODEL_DIR)
    base = taste_of(folder)
    gains = {}
    for name, coin in (("reward", False), ("coin", True)):
        gain = taste_of(folder, trained(folder, coin)) - base
        error = gain.std(ddof=1) / len(gain) ** 0.5
        gains[name] = (gain.mean() - 1.96 * error, gain.mean() + 1.96 * error)
        print(f"{name}: taste {gain.mean():+.4f} +- {error:.4f}, 95% {gains[name]}")
    assert gains["reward"][0] > 0
    assert gains["coin"][0] <= 0
    assert gains["coin"][1] < gains["reward"][0]
