"""What a row of preference data means. Decided here, once, for every kind of file (services/pairs/source.py).

Three shapes of rows: **pair** (``jpg_0``/``jpg_1`` with the share of the preference that each got in ``label_0``/``label_1``),
**chosen** (``chosen`` was preferred to ``rejected``) and **ranking** (``images`` with ``ranks``, 1 the best; without ranks the
list is best first). A row of any of them is one of

    decided   at least one pair of its images differs in preference; a ranking holds every such pair
    tie       equal labels or ranks, or the same image (uid) on both sides
    missing   a label or the ranks are null, or ``has_label`` is false; nothing else is looked at then
    bad       what stands there cannot be used; ``cause`` says why

and nothing that a row holds raises.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

from dde_core.latents.schema import pair_id

Shape = Literal["pair", "chosen", "ranking"]
Cells = Mapping[str, Any]
"""One row by the names that are read (contracts.Column). Text that is not UTF-8 is an empty bytes object."""

MAX_CAPTION_CHARS = 10_000
MAX_UID_CHARS = 1024
MAX_RANKED = 64
SLOTS: dict[Shape, tuple[tuple[str, str], ...]] = {
    "pair": (("jpg_0", "image_0_uid"), ("jpg_1", "image_1_uid")),
    "chosen": (("chosen", "chosen_uid"), ("rejected", "rejected_uid")),
}
"""Image and uid columns of each slot; a ranking has lists."""


@dataclass(frozen=True)
class Preference:
    """``winner`` and ``loser`` are slots of the row's images, ``label`` is the winner's share of the preference."""

    winner: int
    loser: int
    label: float
    pair_id: str


@dataclass(frozen=True, eq=False)
class Row:
    """One row. ``key`` is where it stands in its source, "file:group:row"; ``uids`` has one entry an image (none where the
    row is missing or bad). ``ties`` counts the pairs of a decided ranking that are equal. ``images`` are bytes, or a path
    from the dataset's folder or a URI, and are present only when requested.
    """

    key: str
    uids: tuple[str, ...] = ()
    caption: str = ""
    preferences: tuple[Preference, ...] = ()
    ties: int = 0
    cause: str = ""
    kind: Literal["decided", "tie", "missing", "bad"] = "decided"
    images: tuple[bytes | str | None, ...] = ()


class _Bad(ValueError):
    """A row that cannot be used; the message is the cause."""


def bad_row(key: str, cause: str, caption: str = "") -> Row:
    return Row(key, caption=caption, cause=cause, kind="bad")


def read_row(
    shape: Shape, key: str, cells: Cells, locate: Callable[[str], str], *, with_images: bool = False
) -> Row:
    """What one row says; ``locate`` turns the path of an image, as the file has it, into one from the dataset's folder."""
    caption = ""
    try:
        if _is_missing(shape, cells):
            return Row(key, kind="missing")
        caption = _caption(cells["caption"])
        images, uids = _images(shape, cells)
        found = [_locate(image, locate) for image in images]
        names = tuple(
            _uid(uid, image, f"{key}:{slot}")
            for slot, (uid, image) in enumerate(zip(uids, found, strict=True))
        )
        ordered = [pair for pair in _order(shape, cells, len(names)) if names[pair[0]] != names[pair[1]]]
        return Row(
            key,
            names,
            caption,
            _preferences(shape, key, cells, names, caption, ordered),
            ties=math.comb(len(names), 2) - len(ordered) if ordered else 0,
            kind="decided" if ordered else "tie",
            images=tuple(_content(image) for image in found) if with_images else (),
        )
    except _Bad as error:
        return bad_row(key, str(error), caption)


def _is_missing(shape: Shape, cells: Cells) -> bool:
    has_label = cells.get("has_label")
    if has_label is not None and not isinstance(has_label, bool | int):
        raise _Bad("wrong_type")
    labels = {"pair": ("label_0", "label_1"), "chosen": (), "ranking": ("ranks",)}[shape]
    return has_label in (False, 0) or any(name in cells and cells[name] is None for name in labels)


def _caption(value: Any) -> str:
    if value is None or value == "":
        raise _Bad("caption_missing")
    text = _text(value)
    if len(text) > MAX_CAPTION_CHARS:
        raise _Bad("caption_too_long")
    if "\0" in text:
        raise _Bad("caption_null_byte")
    if not text.strip():
        raise _Bad("caption_missing")
    return text


def _text(value: Any) -> str:
    """Text that can be written as UTF-8: JSON can hold half of a surrogate pair."""
    if isinstance(value, bytes):
        raise _Bad("not_unicode")
    if not isinstance(value, str):
        raise _Bad("wrong_type")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _Bad("not_unicode") from error
    return value


def _images(shape: Shape, cells: Cells) -> tuple[list[Any], list[Any]]:
    """The row's image cells and uid cells, one a slot."""
    if shape != "ranking":
        return [cells.get(image) for image, _ in SLOTS[shape]], [cells.get(uid) for _, uid in SLOTS[shape]]
    images = cells["images"]
    if images is None:
        raise _Bad("image_missing")
    if not isinstance(images, list):
        raise _Bad("wrong_type")
    if not 2 <= len(images) <= MAX_RANKED:
        raise _Bad("too_few_images" if len(images) < 2 else "too_many_images")
    uids = cells.get("image_uids")
    if uids is None:
        return images, [None] * len(images)
    if not isinstance(uids, list) or len(uids) != len(images):
        raise _Bad("uids_length")
    return images, uids


def _locate(image: Any, locate: Callable[[str], str]) -> Any:
    """The image cell; where its path is what is read, that from the dataset's folder. No path and no bytes is no image."""
    if isinstance(image, dict):
        content, path = image.get("bytes"), image.get("path")
        if not isinstance(content, bytes | None) or not isinstance(path, str | None):
            raise _Bad("wrong_type")
        return image if content is not None or not path else locate(_text(path))
    if isinstance(image, str):
        return locate(_text(image)) if image else None
    if not isinstance(image, bytes | None):
        raise _Bad("wrong_type")
    return image


def _content(image: Any) -> bytes | str | None:
    """Bytes of an image, or where it lies."""
    return image.get("bytes") if isinstance(image, dict) else image


def _uid(value: Any, image: Any, default: str) -> str:
    """The uid column, else the path that the image is read from, else where the image stands."""
    if value is None or value == "":
        value = image if isinstance(image, str) else default
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else _text(value)
    if "\0" in text:
        raise _Bad("uid_null_byte")
    if len(text) > MAX_UID_CHARS:
        raise _Bad("uid_too_long")
    return text


def _order(shape: Shape, cells: Cells, count: int) -> list[tuple[int, int, float]]:
    """(winner, loser, the winner's share) of every two slots that differ."""
    if shape == "chosen":
        return [(0, 1, 1.0)]
    if shape == "pair":
        first, second = _labels(cells)
        return [] if first == second else [(0, 1, first) if first > second else (1, 0, second)]
    ranks = _ranks(cells["ranks"], count) if "ranks" in cells else list(range(count))
    pairs = [(i, j) for i, j in combinations(range(count), 2) if ranks[i] != ranks[j]]
    return [(i, j, 1.0) if ranks[i] < ranks[j] else (j, i, 1.0) for i, j in pairs]


def _labels(cells: Cells) -> tuple[float, float]:
    first, second = _number(cells["label_0"]), _number(cells["label_1"])
    if math.isnan(first) or math.isnan(second):
        raise _Bad("label_nan")
    usable = all(math.isfinite(label) and label >= 0 for label in (first, second))
    if not usable or (first != second and not math.isclose(first + second, 1.0, rel_tol=0, abs_tol=1e-6)):
        raise _Bad("label_sum")
    return first, second


def _ranks(values: Any, count: int) -> list[float]:
    if not isinstance(values, list):
        raise _Bad("wrong_type")
    if len(values) != count:
        raise _Bad("ranks_length")
    ranks = [math.nan if value is None else _number(value) for value in values]
    if not all(map(math.isfinite, ranks)):
        raise _Bad("ranks_nan")
    return ranks


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _Bad("wrong_type")
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _preferences(
    shape: Shape,
    key: str,
    cells: Cells,
    uids: tuple[str, ...],
    caption: str,
    ordered: list[tuple[int, int, float]],
) -> tuple[Preference, ...]:
    """Pair ids are the mapped column, or the hash of what identifies the row; a ranking's are told apart by the slots."""
    given = cells.get("pair_id")
    row_id = None if given is None or given == "" else _uid(given, None, key)

    def identify(winner: int, loser: int) -> str:
        low, high = sorted((winner, loser))
        slots = f":{low}:{high}" if shape == "ranking" else ""
        return f"{row_id}{slots}" if row_id else pair_id(uids[low], uids[high], caption, key + slots)

    return tuple(
        Preference(winner, loser, label, identify(winner, loser)) for winner, loser, label in ordered
    )
