"""Makes rounds: hands chunks of trajectories to actors, and commits what they have written."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Self

import ray
from ray.actor import ActorHandle
from torch import Tensor

from dde_core.errors import DataError
from dde_core.noise import permutation
from dde_core.rounds import Tally
from services.artifacts import ledgers
from services.artifacts.prompts import digest_of, read_prompts
from services.errors import BadRequest
from services.rollout import store
from services.rollout.actors import Chunk, RewardActor, RolloutActor
from services.rollout.store import RoundFile, RoundRecord
from services.settings import TrainingSettings
from services.stages.specs import TrainSpec
from services.storage import sources

log = logging.getLogger("dde")


def read_round_prompts(spec: TrainSpec) -> list[str]:
    """The prompts of the rollouts. Raises BadRequest if they have changed since the job was created."""
    assert spec.rollouts
    sources.hold_to(spec.sources)
    prompts = read_prompts(spec.rollouts.prompts_uri, spec.rollouts.num_prompts, 0, "rollouts.num_prompts")
    if spec.prompts_digest and digest_of(prompts) != spec.prompts_digest:
        message = f"{spec.rollouts.prompts_uri!r} has changed since the job was created: create it again"
        raise BadRequest(message, param="rollouts.prompts_uri", code="prompts_changed")
    return [prompt.text for prompt in prompts]


class RoundMaker:
    """Owns the actors of one process, and makes one round at a time.

    ``needs`` are the Ray resources of an actor. ``before_commit`` is called just before a round is committed,
    and may raise. The actors end with ``close``, or with the process.
    """

    def __init__(
        self,
        spec: TrainSpec,
        needs: Mapping[str, float],
        before_commit: Callable[[], None],
    ) -> None:
        assert spec.rollouts
        self._spec = spec
        self._rollouts = spec.rollouts
        self._prompts = read_round_prompts(spec)
        self._inputs = inputs_digest(spec, self._prompts)
        self._before_commit = before_commit
        self._event: Callable[[str], None] = log.info
        self._needs = needs
        self._starting: list[ray.ObjectRef] = []
        self._actors: list[ActorHandle] = []
        self._rewards: list[ActorHandle] = []
        self._round: _Round | None = None

    def begin(self, round: int, weights: Mapping[str, Tensor]) -> None:
        """Start a round with a policy's full weights on the host. One that is committed is taken as it is.

        With ``rollouts.lag`` the actors have a whole block's work at once: they need no ``poll`` within it.
        """
        digest = weights_digest(weights)
        record = store.read(self._spec.run, round)
        if record and (record.weights, record.inputs) == (digest, self._inputs):
            self._round = _Round(round, digest, record=record)
            return
        self._start_actors()
        arrays = {name: value.numpy() for name, value in weights.items()}
        self._round = _Round(round, digest, weights=ray.put(arrays))
        self._next_block(self._round)

    def poll(self, timeout_s: float) -> RoundRecord | None:
        """The round that was begun, once it is committed. Waits so long for an actor.

        Raises DataError if the reward does not tell enough candidates apart or too many rewards are not
        finite, and an actor's own error.
        """
        current = self._round
        assert current
        if current.record:
            return current.record
        done, _ = ray.wait(list(current.tasks), num_returns=1, timeout=timeout_s)
        for task in done:
            actor = current.tasks.pop(task)
            current.files.append(ray.get(task))
            self._give_chunk(current, actor)
        if current.tasks:
            return None
        self._check_bad(current)
        if current.pairs < self._needed:
            self._next_block(current)
            return None
        current.record = self._commit(current)
        return current.record

    def report_to(self, event: Callable[[str], None]) -> None:
        """Where messages for people go from now on."""
        self._event = event

    def missing_room(self) -> str | None:
        """What actors wait for that the cluster does not have free, or None."""
        if self._starting:
            _, self._starting = ray.wait(self._starting, num_returns=len(self._starting), timeout=0)
        free = ray.available_resources()
        lacking = [name for name, amount in self._needs.items() if amount > free.get(name, 0.0)]
        if not self._starting or not lacking:
            return None
        name = lacking[0]
        total = ray.cluster_resources().get(name, 0.0)
        what = f"{len(self._starting)} of {len(self._actors) + len(self._rewards)} rollout actors need"
        has = f"the cluster has {free.get(name, 0):g} free of {total:g}"
        return f"{what} {self._needs[name]:g} {name} each; {has}"

    def close(self) -> None:
        """End the actors, and what they are doing."""
        for actor in (*self._actors, *self._rewards):
            ray.kill(actor)
        self._actors, self._rewards = [], []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _needed(self) -> int:
        """The pairs of a round."""
        return self._rollouts.updates_per_round * self._spec.training.batch_size

    def _start_actors(self) -> None:
        if self._actors:
            return
        times = TrainingSettings().max_worker_failures
        options: dict[str, Any] = {
            "num_cpus": self._needs["CPU"],
            "num_gpus": self._needs["GPU"],
            "max_restarts": times,
            "max_task_retries": times,
        }
        spec_json = self._spec.model_dump_json()
        self._rewards = [
            ray.remote(RewardActor).options(**options).remote(spec_json)
            for _ in range(self._rollouts.reward_actors)
        ]
        roller = ray.remote(RolloutActor).options(**options)
        for number in range(self._rollouts.actors):
            reward = self._rewards[number % len(self._rewards)] if self._rewards else None
            self._actors.append(roller.remote(spec_json, reward))
        self._starting = [actor.ready.remote() for actor in (*self._rewards, *self._actors)]

    def _next_block(self, current: _Round) -> None:
        """Hand out the chunks of another block of trajectories."""
        if current.blocks == self._rollouts.max_blocks:
            raise DataError(self._too_few(current))
        size = self._rollouts.prompts_per_round
        first = current.blocks * size
        current.todo = [
            self._chunk(
                current, list(range(start, min(start + self._rollouts.prompts_per_call, first + size)))
            )
            for start in range(first, first + size, self._rollouts.prompts_per_call)
        ]
        current.blocks += 1
        turns = math.ceil(len(current.todo) / len(self._actors)) if self._rollouts.lag else 1
        for _ in range(turns):
            for actor in self._actors:
                self._give_chunk(current, actor)

    def _give_chunk(self, current: _Round, actor: ActorHandle) -> None:
        if current.todo:
            chunk = current.todo.pop(0)
            task = actor.draw.remote([current.weights], current.digest, chunk)
            current.tasks[task] = actor

    def _chunk(self, current: _Round, slots: list[int]) -> Chunk:
        captions = [self._prompt_of(current.number, slot) for slot in slots]
        return Chunk(
            round=current.number,
            name=f"{current.digest[:16]}-{slots[0]:08d}.parquet",
            slots=slots,
            captions=captions,
        )

    def _prompt_of(self, round: int, slot: int) -> str:
        """First blocks go through all prompts, in a new order each time; so do second ones, and so on."""
        block, place = divmod(slot, self._rollouts.prompts_per_round)
        visit = round * self._rollouts.prompts_per_round + place
        epoch, at = divmod(visit, len(self._prompts))
        number = epoch * self._rollouts.max_blocks + block
        return self._prompts[int(_order(self._spec.training.draw_seed, number, len(self._prompts))[at])]

    def _check_bad(self, current: _Round) -> None:
        tally = current.tally
        bad = sum(tally.bad.values())
        total = max(sum(tally.ranked.values()), 1)
        share = bad / total
        if share > self._rollouts.max_bad_fraction:
            message = (
                f"round {current.number}: {bad:g} of {total:g} rankings have a reward that "
                f"is not finite, more than rollouts.max_bad_fraction = {self._rollouts.max_bad_fraction:g}"
            )
            raise DataError(message)
        if bad and not current.has_warned:
            current.has_warned = True
            self._event(
                f"round {current.number}: {bad:g} rankings with a reward that is not finite are left out"
            )

    def _too_few(self, current: _Round) -> str:
        metrics = current.tally.metrics()
        return (
            f"round {current.number}: the reward cannot tell candidates apart: {current.pairs} of "
            f"{self._needed} pairs (rollouts.updates_per_round x training.batch_size) after "
            f"{current.slots} trajectories; the mean gap is {metrics['rollout_gap']:.3g} and "
            f"objective.min_gap {self._spec.objective.min_gap:g}. Lower min_gap, look further ahead "
            f"(objective.lookahead), or raise rollouts.prompts_per_round"
        )

    def _commit(self, current: _Round) -> RoundRecord:
        per_slot = len(current.tally.ranked) * self._spec.objective.candidates
        record = RoundRecord(
            round=current.number,
            weights=current.digest,
            inputs=self._inputs,
            files=sorted(current.files, key=lambda file: file.name),
            slots=current.slots,
            images=current.slots * per_slot,
            pairs=current.pairs,
            seconds=time.monotonic() - current.began,
            metrics=current.tally.metrics(),
        )
        self._before_commit()
        store.commit(self._spec.run, record)
        return record


class _Round:
    """The round that is being made."""

    def __init__(
        self,
        number: int,
        digest: str,
        weights: ray.ObjectRef | None = None,
        record: RoundRecord | None = None,
    ) -> None:
        self.number = number
        self.digest = digest
        self.weights = weights
        self.record = record
        self.began = time.monotonic()
        self.blocks = 0
        self.todo: list[Chunk] = []
        self.tasks: dict[ray.ObjectRef, ActorHandle] = {}
        self.files: list[RoundFile] = []
        self.has_warned = False

    @property
    def pairs(self) -> int:
        """Pairs that were kept so far."""
        return sum(file.pairs for file in self.files)

    @property
    def tally(self) -> Tally:
        """Of everything that was drawn so far."""
        return Tally.joined([file.tally for file in sorted(self.files, key=lambda file: file.name)])

    @property
    def slots(self) -> int:
        """Trajectories that were drawn so far."""
        ranked = self.tally.ranked
        return int(next(iter(ranked.values()), 0))


_order = lru_cache(maxsize=4)(permutation)
"""A chunk's prompts are of one order or two; a new one takes a draw for each of all prompts."""


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """blake2b over names and bytes of a policy's weights."""
    digest = hashlib.blake2b(digest_size=32)
    for name in sorted(weights):
        digest.update(name.encode() + b"\0")
        digest.update(weights[name].contiguous().numpy().data)
    return digest.hexdigest()


def inputs_digest(spec: TrainSpec, prompts: Sequence[str]) -> str:
    """Of everything that a round's pairs depend on beside the policy's weights, its number, and the seed."""
    assert spec.rollouts
    names = ("scorers", "prompts_per_round", "prompts_per_call", "max_blocks", "lag")
    values = {
        "rollouts": spec.rollouts.model_dump(include=set(names)),
        "prompts": prompts,
        "rewards": [record.digest for record in spec.rewards],
        "objective": spec.model_dump(mode="json")["objective"],
        "training": [spec.training.draw_seed, spec.training.precision],
        "model": ledgers.reference_digest(spec.model),
        "needed": spec.rollouts.updates_per_round * spec.training.batch_size,
    }
    return hashlib.blake2b(repr(sorted(values.items())).encode(), digest_size=32).hexdigest()
