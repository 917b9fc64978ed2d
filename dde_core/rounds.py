"""A round's pairs of an on-policy method: as rows of Parquet, in global batches, as batches for the U-Net.

A round is drawn by one version of the policy's weights. Its kept pairs, in the order of their slots and
transitions, are shuffled by the run's seed, and update u of the round trains on the u-th part of them.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float, Float64, Int

from dde_core.config import ObjectiveConfig, TrainConfig
from dde_core.errors import DataError
from dde_core.models.folder import ModelFolder
from dde_core.models.text import TextEncoders
from dde_core.noise import permutation
from dde_core.rollouts import Ranking
from dde_core.train_step import PairErrors, RankedBatch
from dde_core.transitions import soft_share

_COLUMNS = {"slot": pa.int32(), "t": pa.int32(), "caption": pa.string(), "ref": pa.float32()}
_COLUMNS |= {"gap": pa.float64(), "share": pa.float64(), "x_t": pa.binary(), "dz": pa.binary()}
_SHAPE = b"latent_shape"


@dataclass(frozen=True, eq=False)
class RoundRows:
    """b pairs of a round. ``positions`` are their places in the global batch, or in the round.

    ``slots`` are the trajectories, ``t`` where the transition starts. ``ref`` is the anchor's projection,
    ``gap`` the winner's reward minus the loser's, ``share`` the winner's share of the preference.
    """

    positions: Int[np.ndarray, " b"]
    slots: Int[np.ndarray, " b"]
    t: Int[np.ndarray, " b"]
    captions: Sequence[str]
    ref: Float[np.ndarray, " b"]
    gap: Float64[np.ndarray, " b"]
    share: Float64[np.ndarray, " b"]
    x_t: Float[np.ndarray, "b c h w"]
    dz: Float[np.ndarray, "b c h w"]

    def __len__(self) -> int:
        return len(self.slots)

    def rows(self, keep: slice) -> RoundRows:
        """Some of the rows."""
        return RoundRows(**{field.name: getattr(self, field.name)[keep] for field in fields(self)})

    def take(self, places: Int[np.ndarray, " n"]) -> RoundRows:
        """The rows at these places, in this order."""
        captions = [self.captions[place] for place in places.tolist()]
        arrays = {f.name: getattr(self, f.name)[places] for f in fields(self) if f.name != "captions"}
        return RoundRows(captions=captions, **arrays)

    @classmethod
    def joined(cls, parts: Sequence[RoundRows]) -> RoundRows:
        """The rows of several, sorted by slot, then by falling t."""
        captions = [caption for part in parts for caption in part.captions]
        names = [field.name for field in fields(cls) if field.name != "captions"]
        arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
        rows = cls(captions=captions, **arrays)
        ordered = rows.take(np.lexsort((-rows.t, rows.slots)))
        return replace(ordered, positions=np.arange(len(ordered)))

    def to_parquet(self) -> bytes:
        """The rows as a Parquet file."""
        columns = {
            "slot": self.slots,
            "t": self.t,
            "caption": list(self.captions),
            "ref": self.ref,
            "gap": self.gap,
            "share": self.share,
            "x_t": [row.tobytes() for row in self.x_t],
            "dz": [row.tobytes() for row in self.dz],
        }
        shape = ",".join(map(str, self.x_t.shape[1:]))
        schema = pa.schema(list(_COLUMNS.items()), metadata={_SHAPE: shape.encode()})
        sink = io.BytesIO()
        pq.write_table(pa.table(columns, schema=schema), sink, compression="zstd")
        return sink.getvalue()

    @classmethod
    def from_parquet(cls, data: bytes) -> RoundRows:
        """The inverse of ``to_parquet``. Raises DataError for a file with other columns."""
        table = pq.read_table(io.BytesIO(data))
        if dict(zip(table.schema.names, table.schema.types, strict=True)) != _COLUMNS:
            raise DataError(f"a round's file must have the columns {', '.join(_COLUMNS)}, got {table.schema}")
        shape = tuple(int(side) for side in table.schema.metadata[_SHAPE].decode().split(","))
        arrays = {name: table[name].to_numpy() for name in ("t", "ref", "gap", "share")}
        tensors = {
            name: np.frombuffer(b"".join(table[name].to_pylist()), np.float32).reshape(-1, *shape)
            for name in ("x_t", "dz")
        }
        return cls(
            positions=np.arange(len(table)),
            slots=table["slot"].to_numpy(),
            captions=table["caption"].to_pylist(),
            **arrays,
            **tensors,
        )


@dataclass(frozen=True, eq=False)
class Tally:
    """Counts and sums over the rankings of some trajectories, by the t where their transitions start.

    ``bad`` rows have a reward that is not finite; ``gap`` and ``reward`` are sums over the others, of the gap
    and of the mean over candidates.
    """

    ranked: dict[int, float]
    kept: dict[int, float]
    bad: dict[int, float]
    gap: dict[int, float]
    reward: dict[int, float]

    @classmethod
    def joined(cls, parts: Sequence[Mapping[str, Mapping[int, float]]]) -> Tally:
        """The sums of several, each as of ``by_name``."""
        totals = cls({}, {}, {}, {}, {}).by_name()
        for part in parts:
            for name, values in part.items():
                for t, value in values.items():
                    totals[name][t] = totals[name].get(t, 0.0) + value
        return cls(**totals)

    def by_name(self) -> dict[str, dict[int, float]]:
        """The fields by their names."""
        return {field.name: dict(getattr(self, field.name)) for field in fields(self)}

    def metrics(self) -> dict[str, float]:
        """Means over all transitions, and at each t."""
        everywhere = {"": list(self.ranked)} | {f"_t{t:04d}": [t] for t in self.ranked}
        found: dict[str, float] = {}
        for suffix, times in everywhere.items():
            total = {name: sum(of_t[t] for t in times) for name, of_t in self.by_name().items()}
            good = max(total["ranked"] - total["bad"], 1.0)
            found |= {
                f"rollout_kept_share{suffix}": total["kept"] / max(total["ranked"], 1.0),
                f"rollout_gap{suffix}": total["gap"] / good,
                f"rollout_reward{suffix}": total["reward"] / good,
            }
        return found | {"rollout_bad": sum(self.bad.values())}


def kept_pairs(
    rankings: Sequence[Ranking], slots: Sequence[int], captions: Sequence[str], objective: ObjectiveConfig
) -> tuple[RoundRows, Tally]:
    """The pairs whose rewards differ by more than ``min_gap``, and the tally of all."""
    parts = []
    tally = Tally({}, {}, {}, {}, {})
    for ranking in rankings:
        keep = np.flatnonzero(ranking.finite & (ranking.gap > objective.min_gap))
        gap = ranking.gap[keep]
        share = np.ones(len(keep))
        if objective.label == "soft":
            share = soft_share(torch.from_numpy(gap), objective.temperature).numpy()
        parts.append(
            RoundRows(
                positions=np.arange(len(keep)),
                slots=np.array(slots, np.int32)[keep],
                t=np.full(len(keep), ranking.t, np.int32),
                captions=[captions[i] for i in keep.tolist()],
                ref=ranking.ref.float().cpu().numpy()[keep],
                gap=gap,
                share=share,
                x_t=ranking.x_t.float().cpu().numpy()[keep],
                dz=ranking.dz.float().cpu().numpy()[keep],
            )
        )
        good = ranking.finite
        tally.ranked[ranking.t] = float(len(slots))
        tally.kept[ranking.t] = float(len(keep))
        tally.bad[ranking.t] = float((~good).sum())
        tally.gap[ranking.t] = float(ranking.gap[good].sum())
        tally.reward[ranking.t] = float(ranking.rewards[good].mean(axis=1).sum())
    return RoundRows.joined(parts), tally


class RoundBatches:
    """Makes batches from the pairs of the current round."""

    def __init__(
        self, folder: ModelFolder, objective: ObjectiveConfig, training: TrainConfig, device: torch.device
    ) -> None:
        self._training = training
        self._device = device
        self._size_px = folder.image_size()
        self._text_encoders = TextEncoders(folder, device)
        self._no_caption = self._text_encoders.of_captions([None], *self._size_px)
        self._pairs: RoundRows | None = None
        self._order = np.empty(0, np.int64)

    def enter(self, round: int, pairs: RoundRows) -> None:
        """Make the round with these pairs the current one."""
        self._pairs = pairs
        self._order = permutation(self._training.seed, round, len(pairs))

    def rows(self, update: int, rank: int, world_size: int) -> RoundRows:
        """A worker's rows of the round's global batch ``update``."""
        assert self._pairs is not None
        size = self._training.batch_size
        positions = np.arange(rank, size, world_size)
        rows = self._pairs.take(self._order[update * size + positions])
        return replace(rows, positions=positions)

    def make(self, rows: RoundRows) -> RankedBatch:
        """The batch of a worker's rows, or of a micro-batch of them."""
        no_caption = {name: row.expand(len(rows), *row.shape[1:]) for name, row in self._no_caption.items()}
        return RankedBatch(
            pair_ids=tuple(f"{slot}/{t}" for slot, t in zip(rows.slots, rows.t, strict=True)),
            t=torch.tensor(rows.t, dtype=torch.int64, device=self._device),
            share=torch.tensor(rows.share, dtype=torch.float32, device=self._device),
            x_t=torch.tensor(rows.x_t, device=self._device),
            dz=torch.tensor(rows.dz, device=self._device),
            conditioning=self._text_encoders.of_captions(rows.captions, *self._size_px),
            no_caption=no_caption,
        )

    def anchors(self, rows: RoundRows) -> PairErrors:
        """The anchor's projections, as they were stored when the round was drawn."""
        return PairErrors(torch.tensor(rows.ref, device=self._device))
