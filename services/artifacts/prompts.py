"""Prompt files: one prompt a line."""

from __future__ import annotations

from services.errors import BadRequest
from services.storage import sources

MAX_BYTES = 1 << 26


def prompt_lines(uri: str) -> list[str]:
    """The non-blank lines of a file, unchanged."""
    return [line for line in sources.read_bytes(uri, MAX_BYTES).decode().splitlines() if line.strip()]


def read_prompts(uri: str, num_prompts: int, skip: int = 0, param: str = "num_prompts") -> list[str]:
    """``num_prompts`` prompts of a file, after the first ``skip``. Raises BadRequest if it has too few."""
    lines = [line.strip() for line in prompt_lines(uri)]
    if len(lines) < skip + num_prompts:
        after = f" after the first {skip}" if skip else ""
        raise BadRequest(f"{param} is {num_prompts}{after}, {uri!r} holds {len(lines)}", param=param)
    return lines[skip : skip + num_prompts]
