"""Turns `data.source` into an ordered list of places text is read from, and reads documents from them.

Order is deterministic, and every source has a fingerprint, so that prepared data can be cached.
"""

import glob
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from cramjax.config import DataConfig
from cramjax.data.files import (
    COMPRESSIONS,
    Document,
    Format,
    cut,
    file_format,
    missing_column,
    read_jsonl,
    read_parquet,
    read_text,
    text_of,
)
from cramjax.errors import DataError

BLOCK_CHARS = 1 << 16
"""A text file longer than this is held out and deduplicated in blocks cut at line ends."""
RECORD_CHARS = 1 << 20
"""A record (of JSON lines, Parquet, `datasets`) longer than this is cut likewise."""

_NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Source:
    """One place that documents come from.

    Args:
        name: A file or directory, or the name of a hub data set.
        kind: How it is read.
        size: Bytes on disk; None when unknown.
        fingerprint: Changes when the contents do, as far as can be told without reading them.
    """

    name: str
    kind: Format | Literal["saved", "hub"]
    size: int | None
    fingerprint: tuple[str | int, ...]


def find_sources(source: str | Sequence[str]) -> list[Source]:
    """The places that `source` (as in `DataConfig.source`) names, in the order they are read.

    Raises:
        DataError: A file is missing, a pattern matches nothing, or a directory was not saved by `datasets`.
    """
    names = [source] if isinstance(source, str) else source
    if not names:
        raise DataError("data.source is an empty list. Give 'stdlib', a path, a glob or 'hub:NAME'.")
    return list(chain.from_iterable(_find(name) for name in names))


def read_documents(sources: Iterable[Source], data: DataConfig, block_chars: int = BLOCK_CHARS) -> Iterator[Document]:
    """Documents of the sources in order, read lazily.

    Args:
        sources: From `find_sources`.
        data: Says which field holds the text, what separates documents, and how hub data is read.
        block_chars: A text file's documents are cut into blocks of at most this many characters.

    Raises:
        DataError: Something cannot be read, is not text, or lacks the text field.
    """
    for source in sources:
        match source.kind:
            case "text":
                yield from read_text(Path(source.name), data.document_separator, block_chars)
            case "jsonl":
                yield from read_jsonl(Path(source.name), data.text_field, RECORD_CHARS)
            case "parquet":
                yield from read_parquet(Path(source.name), data.text_field, RECORD_CHARS)
            case "saved":
                yield from _read_rows(load_saved(source.name, data), source.name, data.text_field)
            case "hub":
                yield from _read_rows(load_hub(source.name, data), source.name, data.text_field)


def total_bytes(sources: Iterable[Source]) -> int | None:
    """Bytes of text in the sources; None when that cannot be told without reading them."""
    total = 0
    for source in sources:
        if source.kind not in ("text", "jsonl") or source.size is None or Path(source.name).suffix in COMPRESSIONS:
            return None
        total += source.size
    return total


def _find(name: str) -> list[Source]:
    if name == "stdlib":
        return [_file(path) for path in _standard_library()]
    if name.startswith("hub:"):
        return [Source(name.removeprefix("hub:"), "hub", None, (name,))]
    path = Path(name).expanduser()
    if path.is_file():
        return [_file(path)]
    if path.is_dir():
        return [_saved(path)]
    if glob.has_magic(name):
        matches = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
        if not matches:
            raise DataError(f"{name!r} matches no file (looked from {Path.cwd()}). Check the pattern.")
        return [_file(match) for match in matches]
    raise DataError(
        f"{name!r}: no such file or directory (looked from {Path.cwd()}). "
        "Give a file, a glob, a directory saved by datasets, 'hub:NAME', or, for text, 'stdlib'."
    )


def _standard_library() -> list[Path]:
    root = sysconfig.get_path("stdlib")
    found = []
    for directory, children, files in os.walk(root):
        children[:] = sorted(child for child in children if child not in _NOT_LIBRARY)
        found += [Path(directory, file) for file in sorted(files) if file.endswith(".py")]
    if not found:
        raise DataError(f"no Python source under {root}: this Python ships without it. Give data.source a path.")
    return found


def _file(path: Path) -> Source:
    path = path.resolve()
    stat = path.stat()
    return Source(str(path), file_format(path), stat.st_size, (str(path), stat.st_size, stat.st_mtime_ns))


def _saved(path: Path) -> Source:
    path = path.resolve()
    if not any((path / mark).exists() for mark in ("state.json", "dataset_dict.json")):
        raise DataError(
            f"{path} is a directory, but not one saved by datasets (save_to_disk). "
            f"Give a glob of its files, such as '{path}/*.txt'."
        )
    files = [_file(file) for file in sorted(path.rglob("*")) if file.is_file()]
    fingerprint = chain.from_iterable(file.fingerprint for file in files)
    return Source(str(path), "saved", sum(file.size or 0 for file in files), tuple(fingerprint))


def load_saved(path: str, data: DataConfig) -> Any:
    """The rows of a directory that `datasets` saved: the split that `data.hub_split` names, if it has several.

    Raises:
        DataError: It cannot be read, or has no such split.
    """
    import datasets

    try:
        loaded = datasets.load_from_disk(path)
    except Exception as error:  # The builders raise whatever they met in the files.
        raise DataError(f"{path}: cannot be read by datasets ({error}). Save it again with save_to_disk.") from error
    if isinstance(loaded, datasets.DatasetDict):
        if data.hub_split not in loaded:
            splits = ", ".join(str(split) for split in loaded)
            raise DataError(
                f"{path}: no split {data.hub_split!r}. Set hub_split (in a task: split) to one of: {splits}."
            )
        return loaded[data.hub_split]
    return loaded


def load_hub(name: str, data: DataConfig) -> Any:
    """The rows of a data set on the hub.

    Raises:
        DataError: It cannot be loaded.
    """
    import datasets

    try:
        return datasets.load_dataset(name, data.hub_config, split=data.hub_split, streaming=data.streaming)
    except Exception as error:  # The hub client raises its own, the network's and the builder's errors: all mean this.
        raise DataError(
            f"hub:{name} (configuration {data.hub_config}, split {data.hub_split!r}) cannot be loaded: {error} "
            "Check the name, data.hub_config, data.hub_split and the network."
        ) from error


def _read_rows(rows: Any, where: str, field: str) -> Iterator[Document]:
    if rows.column_names is not None:
        if field not in rows.column_names:
            raise missing_column(field, rows.column_names, where)
        rows = rows.select_columns([field])
    iterator = iter(rows)
    while True:
        try:
            row = next(iterator)
        except StopIteration:
            return
        except Exception as error:  # As above; for streams the network's trouble comes here.
            raise DataError(f"{where}: reading stopped: {error} Try again, or set data.streaming=false.") from error
        yield from cut(text_of(row, field, where), RECORD_CHARS)
