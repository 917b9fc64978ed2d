"""What cannot be used: counted by cause while images are encoded, and written row by row for people to read."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from services.ingest.plan import Plan
from services.pairs.source import Source
from services.pairs.validation import check_bad
from services.stages import layout
from services.storage import files

CAPTION_CHARACTERS = 200


class Quarantine:
    """Bad rows of a plan, and bad images as they are found."""

    def __init__(self, plan: Plan, max_bad_fraction: float) -> None:
        self._plan, self._max_bad_fraction = plan, max_bad_fraction
        self._causes: dict[int, str] = {}  # by number of the image

    def add(self, block: int, bad: str) -> None:
        """The bad images of a block: JSON, by slot."""
        start = self._plan.blocks[block].slots.start
        self._causes |= {
            int(self._plan.images[start + int(slot)]): cause for slot, cause in json.loads(bad).items()
        }

    @property
    def num_rows(self) -> int:
        """Rows that are bad or hold a bad image."""
        return self._plan.counts.bad.total() + int(self._plan.rows_with(self._bad_images).sum())

    @property
    def num_bad_images(self) -> int:
        """Images that cannot be used."""
        return len(self._causes)

    def of_slots(self, slots: slice) -> np.ndarray:
        """bool [slots]: whose image is bad."""
        return np.isin(self._plan.images[slots], self._bad_images)

    @property
    def by_cause(self) -> dict[str, int]:
        """Bad rows by their cause, and rows by the cause of each bad image that they hold."""
        found, causes = Counter(self._plan.counts.bad), np.array(list(self._causes.values()))
        for cause in np.unique(causes):
            found[str(cause)] += int(self._plan.rows_with(self._bad_images[causes == cause]).sum())
        return dict(sorted(found.items()))

    @property
    def _bad_images(self) -> np.ndarray:
        return np.array(list(self._causes), np.int32)

    def check(self) -> int:
        """How many rows are bad. Raises BadRequest with the counts where they are more than the job allows."""
        check_bad(bad := self.num_rows, self._plan.counts.rows, self.by_cause, self._max_bad_fraction)
        return bad

    def write(self, source: Source, folder: str) -> str | None:
        """One line a row, in the order of the source, as ``quarantine.jsonl``. Its URI, or None where no row is bad."""
        if not self._causes and not self._plan.counts.bad:
            return None
        target = layout.quarantine_uri(folder)
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "rows.jsonl"
            with path.open("w") as file:
                file.writelines(json.dumps(line) + "\n" for line in self._lines(source))
            files.upload(path, target)
        return target

    def _lines(self, source: Source) -> Iterator[dict[str, Any]]:
        slot = 0
        for row in (row for unit in self._plan.units for row in source.rows(unit)):
            about = {"row": row.key, "cause": row.cause, "caption": row.caption[:CAPTION_CHARACTERS]}
            if row.kind == "bad":
                yield about
            elif row.kind == "decided":
                numbers = self._plan.images[slot : slot + len(row.uids)].tolist()
                slot += len(row.uids)
                images = {
                    uid: self._causes[n]
                    for uid, n in zip(row.uids, numbers, strict=True)
                    if n in self._causes
                }
                if images:
                    yield {**about, "cause": next(iter(images.values())), "pictures": images}
