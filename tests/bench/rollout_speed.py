"""How fast is a round? The rollout stage against a bare loop, its parts, and training on its pairs."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dde_core.conditioning import guided_noise
from dde_core.config import ObjectiveConfig, TrainConfig
from dde_core.models.folder import ModelFolder
from dde_core.models.policy import Policy, use_deterministic_kernels
from dde_core.objectives import preference_loss
from dde_core.reward import Reward
from dde_core.rollouts import Roller
from dde_core.rounds import RoundBatches, RoundRows, kept_pairs
from dde_core.shapes import MODEL_DIR, PROMPTS_FILE
from dde_core.shapes.scorers import ShapesScorer
from dde_core.train_step import errors_of, step_losses
from dde_core.transitions import all_transitions
from services.api.requests import Rollouts
from services.artifacts.scorers import BUILT_IN
from services.rollout.maker import RoundMaker
from services.stages.specs import TrainSpec
from services.storage import files
from tests.bench.measure import Result, in_turn, ratio, result
from tests.support.stage_runs import StageRuns, shapes_record

OBJECTIVE = ObjectiveConfig(
    method="tailorpo", beta=100.0, guidance_scale=3.0, candidates=2, lookahead=1, t_min=602, t_max=902
)
SLOTS = 24
A_CALL = 8
TRANSITIONS = 7
PAIRS = 16
UPDATES = 6
ROUNDS = 3


def rollout_speed(scratch: Path, rounds: int = 3) -> dict[str, Result]:
    """``rollout_vs_bare``: candidates/s of a round on Ray, with keyed noise, ranking, storage and commit,
    against a loop that does nothing but call the same models. ``rollout_reward_share``: decoding and scoring.
    """
    bench = Bench(scratch)
    sides = {"stage": bench.stage, "bare": bench.bare}
    with bench.maker:
        bench.stage()  # starts the actor
        found = in_turn(rounds, sides)
    what = f"a bare loop, {SLOTS} prompts, {TRANSITIONS} transitions, 2 candidates, 32 px"
    parts = bench.parts()
    listed = ", ".join(f"{name} {share:.2f}" for name, share in parts.items())
    return {
        "rollout_vs_bare": ratio(found, "stage", "bare", "candidates/s", what),
        "rollout_reward_share": result(
            parts["reward"], 100 * parts["reward"], "% of a round", f"all of it: {listed}"
        ),
    }


def early_rounds(scratch: Path, rounds: int = 3) -> dict[str, Result]:
    """``lag_vs_strict``: rounds/s with ``rollouts.lag`` 1, where an actor draws while the trainer trains,
    against rounds one after the other. Each side has one core for its actor and one for its trainer."""
    bench = Bench(scratch)
    training = Training(bench.rows())

    def train() -> None:
        for _ in range(UPDATES):
            training.step(training.ours)

    with bench.maker_of(lag=0) as strict, bench.maker_of(lag=1) as early:
        sides = {
            "early": lambda: bench.rounds(early, train, 1),
            "strict": lambda: bench.rounds(strict, train, 0),
        }
        bench.rounds(early, train, 1)
        bench.rounds(strict, train, 0)
        found = in_turn(rounds, sides)
    what = f"rounds one after the other, {SLOTS} prompts and {UPDATES} updates of {PAIRS} pairs each"
    return {"lag_vs_strict": ratio(found, "early", "strict", "rounds/s", what)}


def wait(maker: RoundMaker) -> None:
    while maker.poll(1.0) is None:
        pass


class Bench:
    """Both sides on the shapes model, reward ``taste``."""

    def __init__(self, scratch: Path) -> None:
        use_deterministic_kernels()
        self._folder = ModelFolder(MODEL_DIR)
        self._captions = [line for line in PROMPTS_FILE.read_text().splitlines() if line][:SLOTS]
        runs = StageRuns(scratch, {})
        rollouts = Rollouts(
            prompts_uri=PROMPTS_FILE.as_uri(),
            num_prompts=SLOTS,
            scorers={"taste": 1.0},
            prompts_per_round=SLOTS,
            prompts_per_call=A_CALL,
        )
        self._spec = TrainSpec(
            **runs.frame("rollouts"),
            rollouts=rollouts,
            rewards=[BUILT_IN["taste"]],
            model=shapes_record(),
            model_id="m",
            name="m",
            objective=OBJECTIVE,
            training=TrainConfig(batch_size=PAIRS, steps=100),
            workers=1,
            run=files.join(runs.root, "run"),
            output=files.join(runs.root, "model"),
        )
        self.maker = self.maker_of(lag=0)
        self._weights = {
            name: value.clone() for name, value in Policy(self._folder, TrainConfig()).weights().items()
        }
        self._numbers = itertools.count()
        self._unet = self._folder.unet().requires_grad_(False)
        self._reference = self._folder.unet().requires_grad_(False)
        self._reward = Reward(self._folder.vae(), {"taste": (ShapesScorer("taste"), 1.0)})
        self._roller = Roller(self._folder, OBJECTIVE, TrainConfig())

    def maker_of(self, lag: int) -> RoundMaker:
        assert self._spec.rollouts
        rollouts = self._spec.rollouts.model_copy(update={"lag": lag})
        spec = self._spec.model_copy(update={"rollouts": rollouts})
        return RoundMaker(spec, {"CPU": 1.0, "GPU": 0.0}, lambda: None)

    def rounds(self, maker: RoundMaker, train: Callable[[], None], lag: int) -> float:
        """Rounds/s of drawing and training: one after the other, or at the same time with ``lag`` 1."""
        numbers = [next(self._numbers) for _ in range(ROUNDS + lag)]
        if lag:
            maker.begin(numbers[0], self._weights)
            wait(maker)
        began = time.monotonic()
        for number in numbers[lag:]:
            maker.begin(number, self._weights)
            if not lag:
                wait(maker)
            train()
            if lag:
                wait(maker)
        return ROUNDS / (time.monotonic() - began)

    def stage(self) -> float:
        """Candidates/s of one round of one actor."""
        began = time.monotonic()
        self.maker.begin(next(self._numbers), self._weights)
        wait(self.maker)
        return SLOTS * TRANSITIONS * OBJECTIVE.candidates / (time.monotonic() - began)

    @torch.no_grad()
    def bare(self) -> float:
        """The same calls of U-Net, frozen U-Net, VAE and scorer, on noise that is drawn at once."""
        began = time.monotonic()
        for first in range(0, SLOTS, A_CALL):
            self._bare_call(self._captions[first : first + A_CALL])
        return SLOTS * TRANSITIONS * OBJECTIVE.candidates / (time.monotonic() - began)

    def _bare_call(self, captions: Sequence[str]) -> None:
        roller = self._roller
        schedule = roller.schedule
        steps = all_transitions(OBJECTIVE, schedule)
        count = OBJECTIVE.candidates
        conditioning = roller.text_encoders.of_captions(captions, *roller.size_px)
        empty = roller.text_encoders.of_captions([None], *roller.size_px)

        def noises(unet: Callable[..., Any], x: Tensor, t: int, times: int) -> Tensor:
            cond = {name: rows.repeat_interleave(times, 0) for name, rows in conditioning.items()}
            none = {name: row.expand(len(x), *row.shape[1:]) for name, row in empty.items()}
            return guided_noise(unet, schedule, x, torch.full((len(x),), t), cond, none, 3.0)

        x = torch.randn(len(captions), *roller.shape)
        noise = noises(self._unet, x, int(steps.t[0]), 1)
        for number in range(roller.ranked[-1] + 1):
            rows = torch.full((len(x),), number)
            mean = steps.mean(rows, x, noise)
            t_next = int(steps.t_next[number])
            if number not in roller.ranked:
                x = steps.candidates(rows, mean, torch.randn(len(x), 1, *roller.shape))[:, 0]
                noise = noises(self._unet, x, t_next, 1)
                continue
            drawn = steps.candidates(rows, mean, torch.randn(len(x), count, *roller.shape)).flatten(0, 1)
            of_drawn = noises(self._unet, drawn, t_next, count)
            signal = float(schedule.alpha_bar[t_next])
            clean = (drawn - (1 - signal) ** 0.5 * of_drawn) / signal**0.5
            self._reward(clean, [caption for caption in captions for _ in range(count)])
            noises(self._reference, x, int(steps.t[number]), 1)
            x = drawn[::count]
            noise = of_drawn[::count]

    def rows(self) -> RoundRows:
        """A few pairs."""
        captions = self._captions[:A_CALL]
        rankings = self._roller((0, 0), range(A_CALL), captions, self._reward)
        return kept_pairs(rankings, range(A_CALL), captions, replace(OBJECTIVE, min_gap=0.0))[0]

    def parts(self) -> dict[str, float]:
        """Shares of a call's time: the policy's U-Net, the reference, decoding and scoring, the rest."""
        seconds = {"policy": 0.0, "reference": 0.0, "reward": 0.0}

        def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                began = time.monotonic()
                found = call(*args, **kwargs)
                seconds[name] += time.monotonic() - began
                return found

            return run

        roller = Roller(self._folder, OBJECTIVE, TrainConfig())
        policy = roller.policy
        policy.unet.forward = timed("policy", policy.unet.forward)
        policy.reference = timed("reference", policy.reference)  # type: ignore[method-assign]
        reward = timed("reward", self._reward)
        began = time.monotonic()
        captions = self._captions[:A_CALL]
        rankings = roller((0, 0), range(A_CALL), captions, _Timed(reward))
        kept_pairs(rankings, range(A_CALL), captions, OBJECTIVE)
        total = time.monotonic() - began
        shares = {name: each / total for name, each in seconds.items()}
        return shares | {"rest": 1 - sum(shares.values())}


class Training:
    """Forward and backward of one batch of these pairs, with either loss."""

    def __init__(self, rows: RoundRows) -> None:
        folder = ModelFolder(MODEL_DIR)
        training = TrainConfig(batch_size=PAIRS, steps=1)
        self._batches = RoundBatches(folder, OBJECTIVE, training, torch.device("cpu"))
        self._batches.enter(0, rows)
        self._part = self._batches.rows(0, 0, 1)
        self._batch = self._batches.make(self._part)
        self._schedule = folder.schedule()
        self._policy = Policy(folder, training)
        self._measure = errors_of(OBJECTIVE)

    def step(self, loss_of: Callable[[], Tensor]) -> float:
        """Pairs/s."""
        began = time.monotonic()
        self._policy.unet.zero_grad(set_to_none=True)
        loss_of().mean().backward()  # type: ignore[no-untyped-call]
        return PAIRS / (time.monotonic() - began)

    def ours(self) -> Tensor:
        batch = self._batch
        theta = self._measure(self._policy.unet, self._schedule, batch)
        ref = self._batches.anchors(self._part)
        return step_losses(theta, ref, batch.t, OBJECTIVE, self._schedule, None, batch.share).loss

    def four_forwards(self) -> Tensor:
        with torch.no_grad():
            ref = [self._measure(self._policy.reference, self._schedule, self._batch).w for _ in "wl"]
        theta = [self._measure(self._policy.unet, self._schedule, self._batch).w for _ in "wl"]
        margin = sum((r - e) / 2 for r, e in zip(ref, theta, strict=True))
        return preference_loss(100.0 * margin)


class _Timed:
    """A reward whose calls are timed."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, latents: Tensor, captions: Sequence[str]) -> np.ndarray:
        found: np.ndarray = self._call(latents, captions)
        return found

    def differentiable(self, latents: Tensor, captions: Sequence[str]) -> Tensor:
        raise NotImplementedError("this benchmark has no gradients")


def transition_training(scratch: Path, rounds: int = 5) -> dict[str, Result]:
    """``transition_vs_four_forwards``: pairs/s of the one-forward loss with its stored reference, against
    both models on both samples, as SPO's published code has it. By FLOPs alone 16 / 6 = 2.67."""
    training = Training(Bench(scratch).rows())
    training.step(training.ours)
    training.step(training.four_forwards)
    sides = {
        "ours": lambda: training.step(training.ours),
        "four forwards": lambda: training.step(training.four_forwards),
    }
    found = in_turn(rounds, sides)
    what = f"four guided forwards a pair, {PAIRS} pairs; by FLOPs alone the ratio is 2.67"
    return {"transition_vs_four_forwards": ratio(found, "ours", "four forwards", "pairs/s", what)}
