"""Rounds of on-policy methods: what it costs to draw, rank and train pairs, and what actors hold.

Arithmetic is counted in forwards of the U-Net with one sample, F. A pass with guidance is two of them, with
the caption and without. A trajectory makes one pass at its start, one after each transition that is not
ranked, and one for each candidate of those that are: the chosen candidate's pass serves as the next step's.
Each further pass of lookahead takes one for each candidate. The frozen reference makes one pass for each
pair, and is stored as one number; the trainer makes one forward and backward for each pair. Every candidate
is decoded and scored. `tailorpo_g` repeats the winner's pass, decoding and score with gradients by the
sample; that backward pass costs as much as the forward one.

Sums are for one trajectory of which every pair is kept. Seconds are arithmetic at the MFU of training, which
a float32 decoder does not reach. Left out: captions, storage, start of actors, validation. Imports no
torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Le

from dde_core.config import ObjectiveConfig, TrainConfig, check
from dde_core.methods import METHODS
from dde_core.parallelism import FLOAT32
from dde_core.planning.estimate import Term, guided_rows, parameters_of, passes
from dde_core.planning.facts import PAGEABLE_GB_S, SCORER, VAE_PARAMETERS, Facts

TIMESTEPS = 1000
"""T of both families."""


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """How a job draws its pairs: the fields of the request's ``rollouts`` that cost something.

    Each actor has a GPU. With ``reward_actors`` 0 the actors that draw also decode and score.
    """

    prompts_per_round: Annotated[int, Ge(1)]
    updates_per_round: Annotated[int, Ge(1)]
    prompts_per_call: Annotated[int, Ge(1)]
    actors: Annotated[int, Ge(1)]
    reward_actors: Annotated[int, Ge(0)]
    lag: Annotated[int, Ge(0), Le(1)] = 0

    def __post_init__(self) -> None:
        check(self)

    @property
    def gpus(self) -> int:
        """GPUs beside those of the training workers."""
        return self.actors + self.reward_actors

    @property
    def gpus_text(self) -> str:
        scoring = f" + {self.reward_actors} reward actors" if self.reward_actors else ""
        return f"{self.actors} rollout actors{scoring}"


# ---- a trajectory


def prompt_terms(facts: Facts, objective: ObjectiveConfig, training: TrainConfig) -> Iterator[Term]:
    """The parts of one trajectory and the training of its pairs, in F. The last term is their sum."""
    starts = objective.ranked_starts(TIMESTEPS)
    every = objective.starts(TIMESTEPS)
    before = every.index(starts[0])
    ranked = len(starts)
    count = objective.candidates
    rows = guided_rows(objective)
    guidance = " x 2 with guidance" if rows == 2 else ""
    decode = facts.decode_flops / facts.forward_flops
    score = SCORER.flops / facts.forward_flops
    candidates = f"{ranked} transitions x {count} candidates"

    unranked = f" + {before} before them" if before else ""
    parts = [
        Term("rollout", f"(1 + {candidates}{unranked}){guidance}", rows * (1 + before + ranked * count), "F")
    ]
    further = [objective.lookahead_passes(t) - 1 for t in starts]
    formula = f"{sum(further)} further passes of {ranked} transitions x {count} candidates{guidance}"
    parts.append(Term("lookahead", formula, rows * count * sum(further), "F"))
    if objective.anchor == "base":
        parts.append(Term("reference", f"{ranked} pairs{guidance}", rows * ranked, "F"))
    else:
        parts.append(Term("reference", "none: the anchor is the policy that drew", 0, "F"))
    if METHODS[objective.method].reward_gradient:
        reward = f"{decode:.2f} F of decoding + {score:.2f} F of scoring"
        each = f"forward and backward x ({rows} F of the U-Net + {reward})"
        value = ranked * 2 * (rows + decode + score)
        parts.append(Term("gradient", f"{ranked} winners x {each}", value, "F"))
    parts.append(Term("decode", f"{candidates} x {decode:.2f} F", ranked * count * decode, "F"))
    scored = f"{candidates} x {score:.2f} F: {SCORER.title}"
    parts.append(Term("scorer", scored, ranked * count * score, "F"))
    of_pair = passes(objective, training)
    trained = " + ".join(f"{number} {name}" for name, number in of_pair.items())
    parts.append(
        Term(
            "training", f"{ranked} pairs x ({trained}){guidance}", ranked * rows * sum(of_pair.values()), "F"
        )
    )
    yield from parts
    total = sum(term.value for term in parts)
    flops = total * facts.forward_flops / 1e12
    yield Term(
        "prompt", f"the sum: {flops:.4g} TFLOP at {facts.forward_flops / 1e12:.3f} a forward", total, "F"
    )


# ---- a round


def round_terms(
    facts: Facts,
    objective: ObjectiveConfig,
    training: TrainConfig,
    rounds: Rounds,
    flops_per_s: float,
    step_s: float,
) -> Iterator[Term]:
    """Seconds of a round by part. Trainers and actors wait for each other, unless rounds are drawn early.

    ``flops_per_s`` is of one GPU.
    """
    ranked = len(objective.ranked_starts(TIMESTEPS))
    needed = rounds.updates_per_round * training.batch_size
    blocks = math.ceil(needed / (rounds.prompts_per_round * ranked))
    pairs = f"{rounds.prompts_per_round} trajectories x {ranked} pairs, if all are kept"
    batches = f"{rounds.updates_per_round} batches x {training.batch_size}"
    yield Term("blocks", f"({batches}) / ({pairs}), rounded up", blocks, "")

    calls = math.ceil(rounds.prompts_per_round / rounds.prompts_per_call)
    waves = math.ceil(calls / rounds.actors)
    calls_text = f"{calls} calls of {rounds.prompts_per_call} trajectories"
    yield Term("turns", f"blocks x ({calls_text} / {rounds.actors} actors), rounded up", blocks * waves, "")

    # Time of a part: what one actor does in its turns.
    f_seconds = facts.forward_flops / flops_per_s
    a_turn = f"turns x {rounds.prompts_per_call} trajectories"
    turns = blocks * waves * rounds.prompts_per_call
    queue = 1.0
    waiting = ""
    if rounds.reward_actors:
        queue = max(1.0, min(calls, rounds.actors) / rounds.reward_actors)
        waiting = f" x {queue:.3g} actors to a reward actor"
    parts = []
    for term in prompt_terms(facts, objective, training):
        if term.name in ("rollout", "lookahead", "reference", "gradient"):
            formula = f"{a_turn} x {term.value:.4g} F"
            parts.append(Term(term.name, formula, turns * term.value * f_seconds, "s"))
        elif term.name in ("decode", "scorer"):
            formula = f"{a_turn} x {term.value:.4g} F{waiting}"
            parts.append(Term(term.name, formula, turns * term.value * f_seconds * queue, "s"))
    trained = parameters_of(facts, training).trained
    sent = trained * FLOAT32 / 1e9
    parts.append(
        Term("weights", f"{sent:.4g} GB of them to the host and the actors", sent / PAGEABLE_GB_S, "s")
    )
    update = f"{rounds.updates_per_round} updates x {step_s:.4g} s"
    parts.append(Term("training", update, rounds.updates_per_round * step_s, "s"))
    yield from parts

    drawing_s = sum(term.value for term in parts[:-1])
    if rounds.lag:
        round_s = max(drawing_s, parts[-1].value)
        yield Term("round", "the longer of training and all other parts: at the same time", round_s, "s")
    else:
        round_s = drawing_s + parts[-1].value
        yield Term("round", "the sum: one after the other", round_s, "s")
    yield Term("pace", f"{needed} pairs / round", needed / round_s, "pairs/s")


def store_terms(facts: Facts, objective: ObjectiveConfig, rounds: Rounds) -> Iterator[Term]:
    """Bytes of the pairs that rounds store."""
    latents = math.prod(facts.latent_shape)
    pair = 2 * latents * FLOAT32
    yield Term("pair", f"x_t and z_w - z_l: 2 x {latents:,} latents x 4 bytes", pair, "bytes")
    ranked = len(objective.ranked_starts(TIMESTEPS))
    trajectory = ranked * pair
    yield Term("trajectory", f"{ranked} pairs x pair, if all are kept", trajectory / 1e6, "MB")
    block = rounds.prompts_per_round * trajectory
    yield Term("round store", f"{rounds.prompts_per_round} trajectories x trajectory, a block", block / 1e9)


# ---- actors


def actor_memory(
    facts: Facts, objective: ObjectiveConfig, training: TrainConfig, rounds: Rounds
) -> Mapping[str, tuple[Term, ...]]:
    """What each kind of actor holds on its GPU. A call's own tensors come on top, but for those that
    `tailorpo_g` keeps for its gradients."""
    held = {"rollout actor": tuple(_rollout_actor(facts, objective, training, rounds))}
    if rounds.reward_actors:
        held["reward actor"] = tuple(_reward())
    return held


def _rollout_actor(
    facts: Facts, objective: ObjectiveConfig, training: TrainConfig, rounds: Rounds
) -> Iterator[Term]:
    parameters = parameters_of(facts, training)
    yield _weights("policy", parameters.base, "U-Net parameters")
    if training.lora:
        yield _weights("adapters", parameters.trained, "LoRA parameters")
    elif objective.anchor == "base":
        yield _weights("reference", parameters.base, "frozen parameters")
    yield _weights("text encoders", facts.text_encoder_parameters, "parameters")
    if not rounds.reward_actors:
        yield from _reward()
    if METHODS[objective.method].reward_gradient:
        rows = guided_rows(objective)
        each = facts.activation_bytes[training.precision, training.gradient_checkpointing]
        calls = f"{rounds.prompts_per_call} winners"
        value = rounds.prompts_per_call * (rows * each + facts.decode_bytes) / 1e9
        unet = f"{rows} x {each / 1e9:.3f} GB of the U-Net"
        yield Term("gradient", f"{calls} x ({unet} + {facts.decode_bytes / 1e9:.2f} GB of decoding)", value)


def _reward() -> Iterator[Term]:
    yield _weights("VAE", VAE_PARAMETERS, "parameters")
    yield _weights("scorer", SCORER.parameters, f"parameters of {SCORER.title}")


def _weights(name: str, numbers: int, what: str) -> Term:
    return Term(name, f"{numbers / 1e6:,.1f}M {what} x 4 bytes (float32)", numbers * FLOAT32 / 1e9)
