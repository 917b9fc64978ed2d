"""Prompt files: one prompt a line."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence

from services.errors import BadRequest
from services.storage import sources

MAX_BYTES = 1 << 26

_LINE_END = re.compile(r"\r\n|\r|\n")
"""What ends a line of a text file. Unicode's other separators, and form feeds, may be part of a prompt."""


def prompt_lines(uri: str) -> list[str]:
    """The non-blank lines of a file, unchanged. Raises BadRequest for a file that is not text in UTF-8."""
    try:
        text = sources.read_bytes(uri, MAX_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        message = f"{uri!r} is not UTF-8 text (byte {error.start}): save it as UTF-8"
        raise BadRequest(message, code="not_utf8") from error
    lines = _LINE_END.split(text)
    for number, line in enumerate(lines, 1):
        if "\0" in line:
            raise BadRequest(f"{uri!r} holds a null byte in line {number}: save it as UTF-8", code="not_utf8")
    return [line for line in lines if line.strip()]


def read_prompts(uri: str, num_prompts: int, skip: int = 0, param: str = "num_prompts") -> list[str]:
    """``num_prompts`` prompts of a file, after the first ``skip``. Raises BadRequest if it has too few."""
    lines = [line.strip() for line in prompt_lines(uri)]
    if len(lines) < skip + num_prompts:
        after = f" after the first {skip}" if skip else ""
        raise BadRequest(f"{param} is {num_prompts}{after}, {uri!r} holds {len(lines)}", param=param)
    return lines[skip : skip + num_prompts]


def digest_of(prompts: Sequence[str]) -> str:
    """sha256 of prompts in their order."""
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()
