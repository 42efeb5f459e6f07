"""Reads rows of named values out of files: JSON lines, JSON, CSV, Parquet, and what `datasets` saves.

Every row says where it stands, so that a message about it can be acted on.
"""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from cramjax.config import DataConfig
from cramjax.data.files import COMPRESSIONS, open_file, readable
from cramjax.data.sources import Source, load_hub, load_saved
from cramjax.errors import DataError

_LONGEST_VALUE = 1 << 28
"""Characters of a value in a CSV file; more mean a quote that is never closed."""


@dataclass(frozen=True)
class Record:
    """A row of a file.

    Args:
        values: By column.
        where: File and place in it, for messages: `a.jsonl, line 3`.
    """

    values: Mapping[str, Any]
    where: str

    def value(self, column: str) -> Any:
        """The value of a column.

        Raises:
            DataError: There is no such column, or it is empty here.
        """
        if column not in self.values:
            raise DataError(
                f"{self.where}: no field {column!r}. It has {', '.join(map(str, self.values)) or 'none'}: name the "
                f"one that is meant in `fields`, as in {{{column}: {next(iter(self.values), 'other')}}}."
            )
        if self.values[column] is None:
            raise DataError(f"{self.where}: field {column!r} is empty. Fill it in, or leave the row out.")
        return self.values[column]

    def text(self, column: str) -> str:
        """The text of a column. Halves of surrogate pairs, which are text in no encoding, become question marks.

        Raises:
            DataError: There is no such column, or it holds something else.
        """
        return as_text(self.value(column), f"{self.where}: field {column!r}")


def as_text(value: Any, what: str) -> str:
    """A value that must be a text; `what` begins the message if it is none."""
    if not isinstance(value, str):
        raise DataError(f"{what} holds {_kind(value)}, and must be a text.")
    return value.encode("utf-8", "replace").decode()


def read_records(sources: Iterable[Source], data: DataConfig) -> Iterator[Record]:
    """Rows of the sources in order, read lazily.

    Args:
        sources: From `cramjax.data.sources.find_sources`.
        data: Says which split of `datasets` is read.

    Raises:
        DataError: Something cannot be read, or holds no rows.
    """
    for source in sources:
        path = Path(source.name)
        match source.kind, _suffix(path):
            case "jsonl", _:
                yield from _json(path)
            case "parquet", _:
                yield from _parquet(path)
            case "saved", _:
                yield from _rows(load_saved(source.name, data), source.name)
            case "hub", _:
                yield from _rows(load_hub(source.name, data), f"hub:{source.name}")
            case _, ".csv" | ".tsv":
                yield from _table(path, "," if _suffix(path) == ".csv" else "\t")
            case _:
                raise DataError(
                    f"{path}: not a file of rows. Give .jsonl, .json, .csv, .tsv or .parquet (also .gz, .bz2, .xz, "
                    ".zst), or a directory saved by datasets."
                )


def _suffix(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix


def _json(path: Path) -> Iterator[Record]:
    """One object a line; or one array of objects, which is read whole."""
    with readable(path), open_file(path) as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            if line.lstrip().startswith(b"["):
                yield from _array(path, line, stream)
                return
            where = f"{path}, line {number}"
            yield Record(_object(_parsed(line, where), where), where)


def _array(path: Path, first: bytes, rest: IO[bytes]) -> Iterator[Record]:
    for number, row in enumerate(_parsed(first + rest.read(), str(path)), 1):
        where = f"{path}, item {number}"
        yield Record(_object(row, where), where)


def _parsed(text: bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error}). Give one object a line, or one array of objects.") from error


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{where}: got {_kind(row)}, and each row must be an object of named values.")
    return row


def _table(path: Path, delimiter: str) -> Iterator[Record]:
    """Comma-separated values as RFC 4180 has them, or tab-separated ones, in which quotes mean nothing."""
    csv.field_size_limit(_LONGEST_VALUE)
    with readable(path, csv.Error, UnicodeDecodeError), open_file(path) as stream:
        text = io.TextIOWrapper(stream, "utf-8-sig", newline="")
        quoting = csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE
        rows = csv.DictReader(text, delimiter=delimiter, quoting=quoting, strict=True)
        names = list(rows.fieldnames or ())
        if twice := [name for name in names if names.count(name) > 1]:
            raise DataError(f"{path}, line 1: two columns are called {twice[0]!r}. Rename one of them.")
        for row in rows:
            where = f"{path}, line {rows.line_num}"
            if None in row or None in row.values():
                wanted = f"{len(names)} values, as the first line names columns"
                raise DataError(f"{where}: it must have {wanted}. Put quotes around values that hold a comma.")
            yield Record(row, where)


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow.parquet  # Here, because pyarrow costs memory and time that other files do not need.

    with readable(path, pyarrow.ArrowException), pyarrow.parquet.ParquetFile(path) as table:
        number = 0
        for batch in table.iter_batches(batch_size=256, use_threads=False):
            for row in batch.to_pylist():
                number += 1
                yield Record(row, f"{path}, row {number}")


def _rows(rows: Any, where: str) -> Iterator[Record]:
    try:
        for number, row in enumerate(rows, 1):
            yield Record(row, f"{where}, row {number}")
    except Exception as error:  # The builders raise whatever they met in the files, the hub client the network's.
        raise DataError(f"{where}: reading stopped: {error} Try again, or save the data with save_to_disk.") from error


def _kind(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return names.get(type(value), f"a {type(value).__name__}")
