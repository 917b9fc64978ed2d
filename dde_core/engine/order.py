"""Which samples take the next turn.

Work is counted in pixel-steps: pixels x U-Net rows x steps. A request's *due* is the work that the engine had
done when the request arrived, plus ``PATIENCE`` times the work of the request. The earliest due goes first:

- Requests of equal work go in the order of arrival. They do not take turns, which would end all of them late.
- A short request passes a long one that arrived before it, unless that one has waited for long.
- No request starves. Its due never changes, and the engine's work only grows: a request with due D is passed
  only by requests that arrive before the engine has done D, so by a bounded amount of work.

The samples of one turn have one base model and one size. Turns belong to the group of the earliest due; other
samples of that group fill the call, in order of their due.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Protocol, TypeVar, runtime_checkable

PATIENCE = 4
"""A request may be passed until the engine has done this many times the request's own work."""


@runtime_checkable
class Candidate(Protocol):
    """A sample that waits for its next turn."""

    @property
    def group(self) -> Hashable: ...
    @property
    def due(self) -> float: ...
    @property
    def rows(self) -> int: ...


Sampled = TypeVar("Sampled", bound=Candidate)


def due_of(clock: float, work: float) -> float:
    """The due of a request of ``work`` that arrives when the engine has done ``clock``."""
    return clock + PATIENCE * work


def choose(candidates: Iterable[Sampled], max_rows: Callable[[Sampled], int]) -> list[Sampled]:
    """The samples of the next turn, by due; those of one due keep their order. Empty if there are none.

    ``max_rows`` of the first is the size of the call; at least the first sample goes, whatever its rows.
    """
    ordered = sorted(candidates, key=lambda candidate: candidate.due)
    if not ordered:
        return []
    chosen = ordered[:1]
    room = max_rows(chosen[0]) - chosen[0].rows
    for candidate in ordered[1:]:
        if candidate.group == chosen[0].group and candidate.rows <= room:
            chosen.append(candidate)
            room -= candidate.rows
    return chosen
