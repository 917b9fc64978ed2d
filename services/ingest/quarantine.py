"""Unusable rows and images: counted by cause during encoding, then written row by row for people to read."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.ingest.plan import Plan
from services.pairs.source import Source
from services.pairs.validation import check_bad
from services.stages import layout
from services.storage import files

MAX_CAPTION_CHARS = 200


class Quarantine:
    """The bad rows of a plan, and its bad images as they are found."""

    def __init__(self, plan: Plan, max_bad_fraction: float) -> None:
        self._plan = plan
        self._max_bad_fraction = max_bad_fraction
        self._causes: dict[int, str] = {}
        """By the image's number."""

    def add(self, block: int, bad: str) -> None:
        """Record a block's bad images. ``bad`` is JSON: slot in the block -> cause."""
        first_slot = self._plan.blocks[block].slots.start
        for slot, cause in json.loads(bad).items():
            self._causes[int(self._plan.images[first_slot + int(slot)])] = cause

    @property
    def num_rows(self) -> int:
        """Rows that are bad or hold a bad image."""
        return self._plan.counts.bad.total() + int(self._plan.rows_with(self._bad_images).sum())

    @property
    def num_bad_images(self) -> int:
        """Distinct images that cannot be used."""
        return len(self._causes)

    def of_slots(self, slots: slice) -> NDArray[np.bool_]:
        """bool [slots]: whether the slot's image is bad."""
        return np.isin(self._plan.images[slots], self._bad_images)

    @property
    def by_cause(self) -> dict[str, int]:
        """Rows by cause: a bad row's own, and that of each bad image that a row holds."""
        rows = Counter(self._plan.counts.bad)
        causes = np.array(list(self._causes.values()))
        for cause in np.unique(causes):
            rows[str(cause)] += int(self._plan.rows_with(self._bad_images[causes == cause]).sum())
        return dict(sorted(rows.items()))

    @property
    def _bad_images(self) -> NDArray[np.int32]:
        return np.array(list(self._causes), np.int32)

    def check(self) -> int:
        """The number of bad rows. Raises BadRequest with the counts where it is more than the job allows."""
        bad_rows = self.num_rows
        check_bad(bad_rows, self._plan.counts.rows, self.by_cause, self._max_bad_fraction)
        return bad_rows

    def write(self, source: Source, folder: str) -> str | None:
        """Write ``quarantine.jsonl``: one line for each bad row, in the order of the source.

        Returns its URI, or None where no row is bad.
        """
        if not self._causes and not self._plan.counts.bad:
            return None
        uri = layout.quarantine_uri(folder)
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "rows.jsonl"
            with path.open("w") as file:
                file.writelines(json.dumps(line) + "\n" for line in self._lines(source))
            files.upload(path, uri)
        return uri

    def _lines(self, source: Source) -> Iterator[dict[str, Any]]:
        first_slot = 0
        for row in (row for unit in self._plan.units for row in source.rows(unit)):
            line = {"row": row.key, "cause": row.cause, "caption": row.caption[:MAX_CAPTION_CHARS]}
            if row.kind == "bad":
                yield {**line, "detail": row.detail}
            elif row.kind == "decided":
                numbers = self._plan.images[first_slot : first_slot + len(row.uids)].tolist()
                first_slot += len(row.uids)
                bad_images = {
                    uid: self._causes[number]
                    for uid, number in zip(row.uids, numbers, strict=True)
                    if number in self._causes
                }
                if bad_images:
                    yield {**line, "cause": next(iter(bad_images.values())), "pictures": bad_images}
