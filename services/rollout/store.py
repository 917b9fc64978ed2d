"""A run's rounds in storage: files of pairs, committed by a record.

    {run}/rounds/00000003/{weights}-{block}-{chunk}.parquet     pairs of a few trajectories
                         /round.json                            RoundRecord, written last to commit them

Imports no torch and no Ray.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress

from pydantic import ValidationError

from dde_core.errors import DataError
from services.api.requests import Strict
from services.stages import layout
from services.storage import files


class RoundFile(Strict):
    """Pairs of a few trajectories, and their tally (``dde_core.rounds.Tally``): counts and sums by t."""

    name: str
    sha256: str
    pairs: int
    tally: dict[str, dict[int, float]]


class RoundRecord(Strict):
    """A round that the policy with these ``weights`` (their digest) has drawn.

    ``inputs`` is what else its pairs depend on. ``slots`` counts trajectories, ``images`` the candidates.
    """

    round: int
    weights: str
    inputs: str
    files: list[RoundFile]
    slots: int
    images: int
    pairs: int
    seconds: float
    metrics: dict[str, float]


def write_pairs(run: str, round: int, name: str, data: bytes) -> str:
    """Write a file of pairs, and return its digest. Written again it has the same bytes."""
    files.write_bytes(layout.round_file_uri(run, round, name), data)
    return hashlib.sha256(data).hexdigest()


def read_pairs(run: str, round: int, file: RoundFile) -> bytes:
    """A file of pairs. Raises DataError if it is not the one that was committed."""
    uri = layout.round_file_uri(run, round, file.name)
    data = files.read_bytes(uri)
    if hashlib.sha256(data).hexdigest() != file.sha256:
        raise DataError(f"{uri!r} has changed since its round was committed")
    return data


def commit(run: str, record: RoundRecord) -> None:
    """Make a round visible. Its files are written already."""
    files.write_json(layout.round_record_uri(run, record.round), json.loads(record.model_dump_json()))


def read(run: str, round: int) -> RoundRecord | None:
    """The record of a committed round. Raises DataError for one of another version of this code."""
    uri = layout.round_record_uri(run, round)
    try:
        return RoundRecord.model_validate_json(files.read_bytes(uri))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise DataError(
            f"the round at {uri!r} was written by another version of this code: {error}"
        ) from error


def prune(run: str, first_kept: int) -> None:
    """Delete all rounds before ``first_kept``: no checkpoint needs them."""
    names = files.list_files(layout.rounds_folder(run), recursive=True)
    rounds = {layout.round_number(name) for name in names}
    for number in sorted(each for each in rounds if each is not None and each < first_kept):
        with suppress(FileNotFoundError):
            files.delete_file(layout.round_record_uri(run, number))  # first: half a round is none
        files.delete_folder(layout.round_folder(run, number))
