"""Rows of labelled data, and texts made of their fields: JSON lines, CSV, Parquet, data saved by `datasets`, or made.

Every row knows where it stands, so that a message about it can say so.
"""

import csv
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cramjax.errors import DataError
from cramjax.evaluation.made import MADE
from cramjax.loading import did_you_mean

_MADE_PREFIX = "made:"
_FIELD = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")


@dataclass(frozen=True)
class Row:
    """One row of a data set."""

    where: str
    """Its file and number, from 1, for messages."""
    fields: Mapping[str, Any]


def read_rows(source: str | Path, split: str = "test") -> Iterator[Row]:
    """The rows of a data set, in order, read as they are asked for.

    Args:
        source: a file whose name ends in .jsonl, .ndjson, .json (an object a line), .csv, .tsv or .parquet; a directory
            saved by `datasets`; or `made:NAME`, a data set that the project makes itself.
        split: of a directory that holds several, which.

    Raises:
        DataError: it does not exist, is damaged or of another kind, or there is no such split.
    """
    if str(source).startswith(_MADE_PREFIX):
        yield from _made(str(source).removeprefix(_MADE_PREFIX))
        return
    path = Path(source).expanduser()
    if path.is_dir():
        yield from _saved(path, split)
        return
    if not path.is_file():
        raise DataError(f"{path}: no such file or directory (looked from {Path.cwd()}).")
    match path.suffix:
        case ".jsonl" | ".ndjson" | ".json":
            yield from _jsonl(path)
        case ".csv" | ".tsv":
            yield from _csv(path)
        case ".parquet" | ".pq":
            yield from _parquet(path)
        case _:
            raise DataError(
                f"{path}: rows are read from .jsonl, .csv, .tsv and .parquet files and from directories saved by "
                f"datasets, got {path.suffix or 'no ending'!r}: convert it."
            )


def fill(template: str, row: Row) -> str:
    """A text with `{field}` replaced by the row's field, `{{` and `}}` by braces.

    A dot goes on into what a field holds: `{choices.text}`, `{options.0}`. Numbers and true and false are written as in
    JSON.

    Raises:
        DataError: the row has no such field, or what it holds is no text.
    """

    def value(match: re.Match[str]) -> str:
        if match[1] is None:
            return match[0][0]
        found = lookup(match[1], row)
        if isinstance(found, str):
            return found
        if isinstance(found, bool | int | float):
            return json.dumps(found)
        raise DataError(
            f"{row.where}: {{{match[1]}}} must be a text or a number, got {json.dumps(found, default=str)}."
        )

    return _FIELD.sub(value, template)


def fill_list(templates: str | tuple[str, ...], row: Row) -> list[str]:
    """Several texts: one of each template, or those of the list that a field holds, given as `{field}` alone.

    Raises:
        DataError: as of `fill`; or the list holds something else than texts and numbers.
    """
    if not isinstance(templates, str):
        return [fill(template, row) for template in templates]
    match = _FIELD.fullmatch(templates)
    if match is None or match[1] is None:
        return [fill(templates, row)]
    found = lookup(match[1], row)
    if not isinstance(found, list | tuple):
        return [fill(templates, row)]
    return [fill(f"{{{match[1]}.{number}}}", row) for number in range(len(found))]


def lookup(name: str, row: Row) -> Any:
    """What a field holds, or with dots a part of what it holds.

    Raises:
        DataError: there is no such field.
    """
    found: Any = row.fields
    for part in [name] if name in row.fields else name.split("."):
        if isinstance(found, Mapping) and part in found:
            found = found[part]
        elif isinstance(found, list | tuple) and part.isdecimal() and int(part) < len(found):
            found = found[int(part)]
        else:
            raise DataError(f"{row.where}: there is no field {name!r}. Its fields: {', '.join(map(str, row.fields))}.")
    return found


def _made(name: str) -> Iterator[Row]:
    if name not in MADE:
        raise DataError(
            f"there is no data set {_MADE_PREFIX}{name}{did_you_mean(name, list(MADE))} There are: "
            f"{', '.join(_MADE_PREFIX + known for known in MADE)}."
        )
    for number, fields in enumerate(MADE[name](), start=1):
        yield Row(f"{_MADE_PREFIX}{name}, row {number}", fields)


def _jsonl(path: Path) -> Iterator[Row]:
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                where = f"{path}, line {number}"
                try:
                    fields = json.loads(line)
                except ValueError as error:
                    raise DataError(f"{where}: not JSON ({error}). Such a file must hold one object a line.") from None
                if not isinstance(fields, dict):
                    raise DataError(f"{where}: got a JSON {type(fields).__name__}, expected one object a line.")
                yield Row(where, fields)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason}). Convert it to UTF-8.") from None


def _csv(path: Path) -> Iterator[Row]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.reader(lines, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
            names = next(reader, [])
            if len(set(names)) < len(names):
                raise DataError(f"{path}, line 1: two columns have one name, in {', '.join(names)}: rename one.")
            for cells in filter(None, reader):
                where = f"{path}, line {reader.line_num}"
                if len(cells) != len(names):
                    raise DataError(f"{where}: {len(cells)} cells, and there are {len(names)} columns in line 1.")
                yield Row(where, dict(zip(names, cells, strict=True)))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason}). Convert it to UTF-8.") from None
    except csv.Error as error:
        raise DataError(f"{path}: not CSV ({error}).") from None


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow.parquet  # Here, because pyarrow costs memory and time that other files do not need.

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=256):
                for fields in batch.to_pylist():
                    number += 1
                    yield Row(f"{path}, row {number}", fields)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: cannot be read as Parquet ({error}). Is it whole?") from None


def _saved(path: Path, split: str) -> Iterator[Row]:
    if not any((path / mark).exists() for mark in ("state.json", "dataset_dict.json")):
        raise DataError(f"{path} is a directory, but not one saved by datasets (save_to_disk): give a file in it.")
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # The builders raise whatever they met in the files.
        raise DataError(f"{path}: cannot be read by datasets ({error}). Save it again with save_to_disk.") from None
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise DataError(f"{path}: there is no split {split!r}. Its splits: {', '.join(map(str, loaded))}.")
        loaded = loaded[split]
    for number, fields in enumerate(loaded, start=1):
        yield Row(f"{path}, row {number}", fields)  # pyright: ignore[reportArgumentType]
