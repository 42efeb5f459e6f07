"""Reads documents out of files: plain text, JSON lines and Parquet, compressed or not, in bounded memory.

The first stage of preparing data; `sources` decides which files to read, `clean` sees the documents next.
"""

import bz2
import codecs
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, cast

from cramjax.errors import DataError

Format = Literal["text", "jsonl", "parquet"]

COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
READ_BYTES = 1 << 18


@dataclass(frozen=True)
class Document:
    """A document, or one block of a document too long to hold at once.

    Args:
        text: The text as read.
        continues: Whether the text goes on from the document before it, with no boundary between them.
    """

    text: str
    continues: bool = False


def file_format(path: Path) -> Format:
    """Format of a file, told from its name with any compression suffix removed."""
    suffix = Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix
    if suffix in (".jsonl", ".json", ".ndjson"):
        return "jsonl"
    return "parquet" if suffix in (".parquet", ".pq") else "text"


def read_text(path: Path, separator: str | None, block_chars: int) -> Iterator[Document]:
    """Documents of a UTF-8 text file.

    Args:
        path: The file, possibly compressed.
        separator: String that divides documents; without it the file is one document.
        block_chars: Longest text yielded, in characters; longer documents are cut at line ends.

    Raises:
        DataError: The file is missing, damaged or not text.
    """
    return _split(_characters(path), separator, block_chars)


def read_jsonl(path: Path, field: str, block_chars: int) -> Iterator[Document]:
    """Documents of a file with one JSON object a line, taken from its key `field`; nulls are skipped.

    Raises:
        DataError: The file is missing or damaged, a line is not a JSON object, or it has no such key.
    """
    with readable(path), open_file(path) as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{where}: not JSON ({error}). Such a file must hold one object a line.") from error
            if not isinstance(row, dict):
                raise DataError(f"{where}: got a JSON {type(row).__name__}, expected one object a line.")
            yield from cut(text_of(row, field, where), block_chars)


def read_parquet(path: Path, field: str, block_chars: int) -> Iterator[Document]:
    """Documents of a Parquet file, taken from its column `field`; nulls are skipped.

    Raises:
        DataError: The file is missing or damaged, or has no such column of strings.
    """
    import pyarrow.parquet  # Here, because pyarrow costs memory and time that plain text does not need.

    with readable(path, pyarrow.ArrowException):
        with pyarrow.parquet.ParquetFile(path, buffer_size=READ_BYTES, pre_buffer=False) as table:
            if field not in table.schema_arrow.names:
                raise missing_column(field, table.schema_arrow.names, str(path))
            for batch in table.iter_batches(batch_size=64, columns=[field], use_threads=False):
                for text in batch.column(0).to_pylist():
                    yield from cut(text_of({field: text}, field, str(path)), block_chars)


def text_of(row: dict[str, Any], field: str, where: str) -> str:
    """The text of one record; null reads as empty.

    Raises:
        DataError: The record has no such field, or it is not a string.
    """
    if field not in row:
        raise missing_column(field, row, where)
    text = row[field]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise DataError(
            f"{where}: column {field!r} holds {type(text).__name__}, not text. Set data.text_field to one of text."
        )
    return text


def missing_column(field: str, columns: Iterable[str], where: str) -> DataError:
    """The error for a column that is not there, listing those that are."""
    return DataError(f"{where}: no column {field!r}. Set data.text_field to one of: {', '.join(sorted(columns))}.")


def cut(text: str, block_chars: int) -> Iterator[Document]:
    """A text as one document, or as blocks of at most `block_chars` characters that end at line ends where they can."""
    return _split([text], None, block_chars)


def _split(chunks: Iterable[str], separator: str | None, block_chars: int) -> Iterator[Document]:
    buffer, start, continues = "", 0, False
    for chunk in chunks:
        buffer, start = buffer[start:] + chunk, 0
        while True:
            end = buffer.find(separator, start) if separator else -1
            last = end < 0
            # What follows the last separator may hold the first half of the next one: keep a block back.
            while (end if not last else len(buffer) - len(separator or "")) - start > block_chars:
                middle = _line_end(buffer, start, start + block_chars)
                yield Document(buffer[start:middle], continues)
                start, continues = middle, True
            if last:
                break
            if end > start:
                yield Document(buffer[start:end], continues)
            start, continues = end + len(cast(str, separator)), False
    if len(buffer) > start:
        yield Document(buffer[start:], continues)


def _line_end(text: str, start: int, limit: int) -> int:
    for mark in ("\n", " "):
        if (found := text.rfind(mark, start, limit)) >= 0:
            return found + 1
    return limit


def _characters(path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    offset = 0
    with readable(path), open_file(path) as stream:
        while True:
            raw = stream.read(READ_BYTES)
            if (nul := raw.find(0)) >= 0:
                raise DataError(f"{path}: binary, not text (NUL byte at offset {offset + nul}). Give UTF-8 text files.")
            try:
                yield decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                where = f"{error.reason} near byte {offset + error.start}"
                raise DataError(f"{path}: not UTF-8 text ({where}). Convert it to UTF-8.") from error
            if not raw:
                return
            offset += len(raw)


def open_file(path: Path) -> IO[bytes]:
    """The bytes of a file, which may be compressed."""
    match COMPRESSIONS.get(path.suffix):
        case "gzip":
            return cast(IO[bytes], gzip.open(path, "rb"))
        case "bz2":
            return bz2.open(path, "rb")
        case "xz":
            return lzma.open(path, "rb")
        case "zstd":
            import pyarrow  # The one zstd reader among the dependencies on every supported Python.

            # Buffered, because Arrow's files do not iterate over lines.
            return io.BufferedReader(cast(Any, pyarrow.input_stream(str(path), compression="zstd")))
        case _:
            return open(path, "rb")


@contextmanager
def readable(path: Path, *damage: type[Exception]) -> Iterator[None]:
    """Turn what goes wrong while a file is read into a DataError that names it.

    Args:
        path: The file.
        damage: Errors, beside those of files and compression, that say that it is damaged.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file. Check data.source and data.validation.") from error
    except (OSError, EOFError, lzma.LZMAError, zlib.error, *damage) as error:
        raise DataError(f"{path}: cannot be read ({error}). Is it whole, and of the kind its name says?") from error
