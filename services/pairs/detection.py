"""Which files of a dataset are read, and by which reader: detected from their content and names."""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

from pyarrow import fs

from services.errors import BadRequest, NotFound
from services.pairs import formats, splits
from services.pairs.columnar import ArrowFiles, Format, ParquetFiles, Reader
from services.pairs.documents import CsvFiles, JsonLists
from services.pairs.path_based import (
    ALL_SIDES,
    IMAGE_SUFFIXES,
    JsonLines,
    WinLose,
    is_hidden,
    sides_among,
)
from services.pairs.tars import Tars
from services.storage import files, sources

READERS: dict[Format, Callable[[str, tuple[str, ...]], Reader]] = {
    "parquet": ParquetFiles,
    "arrow": ArrowFiles,
    "jsonl": JsonLines,
    "json": JsonLists,
    "csv": CsvFiles,
    "tar": Tars,
}
FORMAT_THREADS = 8
_METADATA = "metadata."
"""How the rows of an image folder are named: `metadata.jsonl`, `metadata.csv`, `metadata.parquet`."""
_STATE = "state.json"
_SPLITS = "dataset_dict.json"
_DESCRIPTIONS = frozenset((_STATE, _SPLITS, "dataset_info.json", "dataset_infos.json"))
"""What `datasets` writes about a dataset: no rows."""


@dataclass(frozen=True)
class Detected:
    """A reader, whether the URI is a folder, the split, and how many files are not read, by suffix.

    ``parts_missing`` counts files that the names of others tell of.
    """

    reader: Reader
    is_folder: bool
    split: str | None = None
    files_not_read: Counter[str] = field(default_factory=Counter)
    parts_missing: int = 0


def detect(uri: str, split: str | None) -> Detected:
    """Choose the files and the reader. Raises BadRequest that says what was found and what can be read."""
    _check_scheme(uri)
    filesystem, path = sources.resolve(uri)
    kind = filesystem.get_file_info(path).type
    if kind == fs.FileType.NotFound:
        message = f"uri {uri!r} does not exist; {_download('NAME')} downloads a dataset of the hub"
        raise NotFound(message, param="uri")
    if kind == fs.FileType.Directory:
        return _in_folder(uri, split)
    if kind != fs.FileType.File:
        raise BadRequest(f"uri {uri!r} is neither a file nor a folder", param="uri", code="no_file")
    if split is not None:
        message = f"split {split!r} is for a folder of several splits, but uri {uri!r} is one file"
        raise BadRequest(message, param="split", code="splits")
    found = formats.format_of(uri)
    return Detected(READERS[found](uri, ("",)), is_folder=False)


def _check_scheme(uri: str) -> None:
    """Refuse a dataset that must be downloaded first."""
    scheme, separator, rest = uri.partition("://")
    if separator and scheme not in files.SCHEMES:
        is_hub = scheme == "hf" or rest.startswith("huggingface.co/datasets/")
        name = "/".join(rest.removeprefix("huggingface.co/").removeprefix("datasets/").split("/")[:2])
        remedy = f"download it with {_download(name)}" if is_hub else "copy it there first"
        message = f"uri {uri!r} cannot be opened: use a path, file:// or s3://; {remedy}"
        raise BadRequest(message, param="uri", code="scheme")


def _download(name: str) -> str:
    return f"`hf download --repo-type dataset {name} --local-dir FOLDER`"


def _in_folder(uri: str, split: str | None) -> Detected:
    infos = sources.entries(uri)
    names = sorted(info.base_name for info in infos if info.is_file and not is_hidden(info.base_name))
    folders = {info.base_name for info in infos if info.type == fs.FileType.Directory}
    if _SPLITS in names:
        return _saved(uri, _splits_of_dict(uri), split)
    if _STATE in names:
        return _saved(uri, {"": None}, split)
    if any(map(_is_metadata, names)):
        return _rows(uri, names, split)
    if "_delta_log" in folders:
        message = f"uri {uri!r} is a Delta table, whose files also hold deleted rows; export it as Parquet"
        raise BadRequest(message, param="uri", code="unknown_format")
    sides = sides_among(folders)
    if sides:
        return _win_lose(uri, {"": sides}, split)
    visible = [name for name in sources.list_files(uri) if not is_hidden(name)]
    nested = _sides_in(visible)
    if nested and not any(_may_hold_rows(name) and not _is_in_sides(name) for name in visible):
        return _win_lose(uri, nested, split)
    return _rows(uri, visible, split)


def _splits_of_dict(uri: str) -> dict[str, str | None]:
    """Folder -> split of what `DatasetDict.save_to_disk` wrote. Raises BadRequest."""
    try:
        names = sources.read_json(files.join(uri, _SPLITS))["splits"]
        if names and all(isinstance(name, str) and "/" not in name for name in names):
            return {name: name for name in names}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    raise BadRequest(f"uri {uri!r} has a {_SPLITS} that names no splits", param="uri", code="splits")


def _saved(uri: str, folders: dict[str, str | None], split: str | None) -> Detected:
    """What `save_to_disk` wrote: ``folders`` with a state.json each, and their splits."""
    (folder, *more), chosen = splits.select(uri, folders, split)
    if more:
        splits.check_one_dataset(uri, [folder, *more], "datasets")
    names = tuple(
        posixpath.join(folder, name) for name in _data_files(files.join(uri, folder) if folder else uri)
    )
    return Detected(ArrowFiles(uri, names), True, chosen)


def _data_files(uri: str) -> tuple[str, ...]:
    """The Arrow files of `save_to_disk`, in the order of its state.json. Raises BadRequest."""
    try:
        state = sources.read_json(files.join(uri, _STATE))
        names = tuple(str(entry["filename"]) for entry in state["_data_files"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadRequest(f"uri {uri!r} has no {_STATE} that names data files", param="uri") from error
    if state.get("_indices_data_files"):
        message = f"uri {uri!r} is a selection of its rows: save it again after `flatten_indices()`"
        raise BadRequest(message, param="uri", code="selection")
    if not names or any("/" in name for name in names):
        message = f"uri {uri!r} has a {_STATE} with unusable data files: {list(names)}"
        raise BadRequest(message, param="uri")
    return names


def _sides_in(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """The folders below the dataset's that hold win and lose, with the names of the two."""
    inside: dict[str, set[str]] = {}
    for name in names:
        *folders, _ = name.split("/")
        for depth, folder in enumerate(folders):
            inside.setdefault("/".join(folders[:depth]), set()).add(folder)
    found = {folder: sides_among(folders) for folder, folders in inside.items() if folder}
    return {folder: sides for folder, sides in found.items() if sides}


def _is_in_sides(name: str) -> bool:
    """Whether a file is in a folder of winners or losers."""
    return any(folder.lower() in ALL_SIDES for folder in name.split("/")[:-1])


def _win_lose(uri: str, folders: dict[str, tuple[str, str]], split: str | None) -> Detected:
    """One of the folders that hold win and lose."""
    split_of = {folder: splits.split_of_name(f"{folder}/win") for folder in sorted(folders)}
    (folder, *more), chosen = splits.select(uri, split_of, split)
    if more:
        splits.check_one_dataset(uri, [folder, *more], "folders of win and lose")
    reader = WinLose(uri, folders[folder], folder)
    return Detected(reader, True, chosen, reader.not_read())


def _is_metadata(name: str) -> bool:
    base = posixpath.basename(name)
    return base.startswith(_METADATA) and formats.format_of_name(base) is not None


def _rows(uri: str, visible: list[str], split: str | None) -> Detected:
    """Files of rows: those of the first format of which the folder has any."""
    saved = sorted(posixpath.dirname(name) for name in visible if posixpath.basename(name) == _STATE)
    if saved:
        return _saved(uri, {folder: splits.split_of_name(f"{folder}/x") for folder in saved}, split)
    candidates = [name for name in visible if _may_hold_rows(name)]
    candidates = [name for name in candidates if _is_metadata(name)] or candidates
    by_format = {
        each: tuple(name for name in candidates if formats.format_of_name(name) == each) for each in READERS
    }
    found: Format | None = next((each for each in formats.SUFFIXES if by_format[each]), None)
    if found is None:
        raise BadRequest(_nothing_readable(uri, visible), param="uri", code="unknown_format")
    names, chosen = splits.choose(uri, by_format[found], split)
    if found == "arrow" and chosen is None:
        splits.check_one_dataset(uri, map(posixpath.dirname, names), "datasets")
    with sources.in_threads(partial(formats.format_of, uri), names, FORMAT_THREADS) as found_formats:
        actual = dict(zip(names, found_formats, strict=True))
    different = next((name for name, each in actual.items() if each != actual[names[0]]), None)
    if different is not None:
        message = (
            f"uri {uri!r} holds files of several formats: {names[0]} is {actual[names[0]]}, "
            f"{different} is {actual[different]}; name one of them"
        )
        raise BadRequest(message, param="uri", code="several_formats")
    reader = READERS[actual[names[0]]](uri, names)
    return Detected(reader, True, chosen, _not_read(visible, names), splits.parts_missing(names))


def _may_hold_rows(name: str) -> bool:
    """Whether a file may be one of rows: `datasets` describes and caches results in files of its own."""
    base = posixpath.basename(name)
    is_cache = base.startswith(("cache-", "tmp")) and base.endswith(".arrow")
    return base not in _DESCRIPTIONS and not is_cache and formats.format_of_name(base) is not None


def _not_read(visible: Iterable[str], names: Iterable[str]) -> Counter[str]:
    """How many files are neither read as rows nor images, by suffix."""
    others = set(visible) - set(names)
    suffixes = map(formats.suffix_of, others)
    return Counter(suffix for suffix in suffixes if suffix.startswith(".") and suffix not in IMAGE_SUFFIXES)


def _nothing_readable(uri: str, visible: list[str]) -> str:
    """What a folder holds in place of rows."""
    if not visible:
        return f"uri {uri!r} holds no files; can be read: {formats.READABLE}"
    counts = Counter(map(formats.suffix_of, visible)).most_common(splits.MAX_NAMED)
    found = ", ".join(f"{count} {suffix}" for suffix, count in counts)
    example = next(name for name in visible if formats.suffix_of(name) == counts[0][0])
    kind = formats.describe(uri, example)
    what = f"found: {found}; {example} is {kind}"
    return f"uri {uri!r} holds no file of rows; {what}; can be read: {formats.READABLE}"
