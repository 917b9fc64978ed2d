"""Which split of a dataset each file belongs to, by its name: train, validation or test.

Several splits are never read together: a model would be trained on the pairs that are to judge it.
"""

from __future__ import annotations

import fnmatch
import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa
import yaml

from services.errors import BadRequest
from services.pairs.column_types import is_text
from services.storage import files, sources

MAX_README_BYTES = 1 << 20
MAX_NAMED = 5
COLUMNS = ("split", "subset", "partition")
"""Names of columns that say of which split a row is."""
_WORDS = {
    "train": ("train", "training", "trainset"),
    "validation": ("validation", "valid", "val", "valset", "dev", "devset"),
    "test": ("test", "testing", "testset", "eval", "evaluation", "holdout", "heldout"),
}
_SPLIT_OF_WORD = {word: split for split, words in _WORDS.items() for word in words}
_PART_FILE = re.compile(r"(.+?)-\d{5}-of-(\d{5})(-[0-9a-f]+)?\.\w+(\.\w+)?")
_TOKENS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")
_HELD_OUT = re.compile(r"(held|hold)[-_ ]out", re.IGNORECASE)
_REVISION = re.compile(r"(?:^|/)snapshots/([0-9a-f]{40})/")


def choose(uri: str, names: tuple[str, ...], wanted: str | None) -> tuple[tuple[str, ...], str | None]:
    """The files of the wanted split, and its name; without one, all files where they are of one split.

    Raises BadRequest that names the splits found.
    """
    _check_revisions(uri, names)
    declared = _declared(uri)
    split_of = {name: _declared_split(declared, name) or split_of_name(name) for name in names}
    unknown = {split for split in split_of.values() if split and split not in declared and not _word(split)}
    if len(unknown) == 1:  # `pairs-00000-of-00002.parquet` alone tells nothing
        split_of = {name: None if split in unknown else split for name, split in split_of.items()}
    return select(uri, split_of, wanted)


def select(
    uri: str, split_of: Mapping[str, str | None], wanted: str | None
) -> tuple[tuple[str, ...], str | None]:
    """``choose`` for files whose splits are known."""
    splits = sorted({split for split in split_of.values() if split})
    others = [name for name, split in split_of.items() if split is None]
    if wanted is not None:
        split = wanted if wanted in splits else _SPLIT_OF_WORD.get(wanted.lower(), wanted)
        names = tuple(name for name, each in split_of.items() if each == split)
        if not names:
            message = f"split {wanted!r} is not in uri {uri!r}; found: {', '.join(splits) or 'no splits'}"
            raise BadRequest(message, param="split", code="splits")
        return names, split
    if len(splits) > 1 or (splits and others):
        found = ", ".join(splits)
        if others:
            found += f", and files of no split ({_few(others)})"
        remedy = f"name one of them as split (--split {_preferred(splits)}), or its folder or file as uri"
        raise BadRequest(f"uri {uri!r} holds several splits: {found}; {remedy}", param="uri", code="splits")
    return tuple(split_of), splits[0] if splits else None


def split_of_name(name: str) -> str | None:
    """The split that a path names; None for none. A file's name counts before its folders' names.

    ``train-00000-of-00003.parquet`` and any other name before the numbers is a split of that name.
    """
    base = posixpath.basename(name)
    part = _PART_FILE.fullmatch(base)
    if part and _word(part[1]) is None:
        split = posixpath.basename(part[1]).rpartition("-")[2]
        return _folder_split(name) or split
    if part:
        split = part[1].rpartition("-")[2]
        return _SPLIT_OF_WORD.get(split, split if _word(split) else _word(part[1]))
    return _word(posixpath.splitext(base)[0]) or _folder_split(name)


def _folder_split(name: str) -> str | None:
    folders = posixpath.dirname(name).split("/")
    return next((split for folder in reversed(folders) if (split := _word(folder))), None)


def _word(text: str) -> str | None:
    """The split that a word of the text names."""
    words = (_SPLIT_OF_WORD.get(word.lower()) for word in _TOKENS.findall(_HELD_OUT.sub("heldout", text)))
    return next((split for split in words if split), None)


def parts_missing(names: Iterable[str]) -> int:
    """How many parts are absent, by names as `train-00001-of-00003.parquet`: a download may be partial."""
    present = Counter((match[1], int(match[2])) for match in map(_PART_FILE.fullmatch, names) if match)
    return sum(max(0, total - count) for (_, total), count in present.items())


def is_column(name: str, kind: pa.DataType | None) -> bool:
    """Whether a column may say of which split a row is."""
    return name.lower() in COLUMNS and (kind is None or is_text(kind))


def check_column(uri: str, column: str, values: Iterable[object]) -> None:
    """Raises BadRequest where the values of a column are several splits; other values mean something else."""
    found = {_word(str(value)) or "others" for value in values if value is not None}
    if len(found) > 1:
        names = ", ".join(sorted(found))
        message = (
            f"uri {uri!r} holds rows of several splits, by its column {column!r}: {names}; "
            "write a file of each, or rename the column"
        )
        raise BadRequest(message, param="uri", code="splits")


def _preferred(splits: list[str]) -> str:
    return "train" if "train" in splits else splits[0]


def _few(names: Iterable[str]) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - MAX_NAMED} more" if len(listed) > MAX_NAMED else ""
    return ", ".join(listed[:MAX_NAMED]) + more


def check_one_dataset(uri: str, folders: Iterable[str], what: str) -> None:
    """Raises BadRequest where the folder holds several datasets, or one several times."""
    found = sorted(set(folders))
    if len(found) > 1:
        message = f"uri {uri!r} holds several {what}: {_few(found)}; name the folder of one of them"
        raise BadRequest(message, param="uri", code="several_datasets")


def _check_revisions(uri: str, names: Iterable[str]) -> None:
    """A cache of the hub holds a dataset once for each revision that was downloaded."""
    matches = (_REVISION.search(name) for name in names)
    folders = (f"snapshots/{match[1]}" for match in matches if match)
    check_one_dataset(uri, folders, "revisions of a dataset")


def _declared(uri: str) -> dict[str, list[str]]:
    """Patterns of file names by split, where the folder's README.md declares them as the hub does.

    Raises BadRequest where it declares several configurations: their rows may be of different kinds.
    """
    configs = _front_matter(uri).get("configs")
    configs = [each for each in configs if isinstance(each, dict)] if isinstance(configs, list) else []
    check_one_dataset(
        uri,
        (str(each.get("data_dir") or each.get("config_name", "default")) for each in configs),
        "configurations, by its README.md",
    )
    entries = configs[0].get("data_files") if configs else None
    declared: dict[str, list[str]] = {}
    for entry in entries if isinstance(entries, list) else []:
        if isinstance(entry, dict):
            paths = entry.get("path")
            patterns = paths if isinstance(paths, list) else [paths]
            declared.setdefault(str(entry.get("split", "train")), []).extend(map(str, patterns))
    return declared


def _declared_split(declared: Mapping[str, list[str]], name: str) -> str | None:
    """The split whose patterns match a file's name."""
    for split, patterns in declared.items():
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            return split
    return None


def _front_matter(uri: str) -> dict[str, Any]:
    """The YAML at the start of a folder's README.md; empty where there is none that can be read."""
    if not any(info.base_name == "README.md" and info.is_file for info in sources.entries(uri)):
        return {}
    with sources.open_file(files.join(uri, "README.md")) as stream:
        text = bytes(stream.read(MAX_README_BYTES)).decode(errors="replace")
    match = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    try:
        value = yaml.safe_load(match[1]) if match else None
    except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: a date that does not exist
        return {}
    return value if isinstance(value, dict) else {}
