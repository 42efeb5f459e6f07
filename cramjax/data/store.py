"""Prepared data on disk: token files that are memory-mapped, the tokenizer, the held-out text and a report.

`prepare` writes a directory of these once; the loader, the baselines and evaluation read it.
"""

import json
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cramjax.data.clean import CleanDocument
from cramjax.data.tokenizer import Tokenizer

FORMAT = 1
"""Version of what is on disk; raise it whenever the same configuration would be prepared differently."""
VALIDATION_TEXT_BYTES = 1 << 24
"""Most held-out text kept beside its tokens."""


@dataclass(frozen=True)
class TokenFile:
    """A stream of tokens: separator, document, separator, document, …, separator.

    Args:
        tokens: Token ids, one-dimensional, memory-mapped.
        text_bytes: UTF-8 bytes of the text they encode, which separators are no part of.
        documents: Documents in it; a block of a cut document counts as one.
        path: Its file; None for tokens that are only in memory.
        sentence_ends: Ids of the tokens that end a sentence.
    """

    tokens: NDArray[np.unsignedinteger] = field(repr=False)
    text_bytes: int
    documents: int = 0
    path: Path | None = None
    sentence_ends: tuple[int, ...] = field(default=(), repr=False)

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per token, separators counted: nats per token to bits per byte needs it."""
        return self.text_bytes / len(self.tokens)

    @property
    def identity(self) -> str:
        """The number of tokens, and a checksum of 64 blocks of them: what a resumed run must find again."""
        starts = np.linspace(0, max(0, len(self.tokens) - 4096), 64, dtype=np.int64)
        sample = np.concatenate([self.tokens[start : start + 4096] for start in starts])
        return f"{len(self.tokens)} tokens, checksum {zlib.crc32(sample.tobytes()):08x}"


@dataclass(frozen=True)
class PreparedData:
    """Everything training and evaluation need of a corpus.

    Args:
        path: Directory in the cache.
        tokenizer: As trained or loaded.
        train: Training tokens.
        validation: Held-out tokens.
        report: `stages`: documents, characters and bytes `read`, dropped as `short`, `duplicate` or `incompressible`,
            and kept for `train` and `validation` (with their tokens); `seconds` by phase; `tokenizer`.
    """

    path: Path
    tokenizer: Tokenizer = field(repr=False)
    train: TokenFile
    validation: TokenFile
    report: dict[str, Any] = field(repr=False)

    def __str__(self) -> str:
        """What was read, dropped at each stage, and kept, in one sentence."""
        stages: dict[str, dict[str, int]] = self.report["stages"]
        read = stages["read"]
        dropped = ", ".join(
            f"{stages[name]['documents']:,} {name}" for name in ("short", "duplicate", "incompressible")
        )
        kept = ", ".join(
            f"{stages[name]['documents']:,} documents ({stages[name]['tokens']:,} tokens) {purpose}"
            for name, purpose in (("train", "to train on"), ("validation", "held out"))
        )
        size = f"{read['documents']:,} documents ({read['bytes'] / 1e6:.1f} MB)"
        return f"data: read {size}; dropped {dropped}; kept {kept}."

    @property
    def validation_text(self) -> Path:
        """The held-out text that `validation` encodes, documents end to end; its first 16 MiB if there is more."""
        return self.path / "validation.txt"


class TokenWriter:
    """Appends documents to a token file, with separators between them, before the first and after the last."""

    def __init__(self, path: Path, tokenizer: Tokenizer, text_path: Path | None = None):
        """Create the file at `path`, and one with the text at `text_path` if given."""
        self.path = path
        self.text_bytes = self.tokens = self.documents = self.characters = 0
        self._file = open(path, "wb", buffering=1 << 20)
        self._text = open(text_path, "wb") if text_path else None
        self._separator = np.array([tokenizer.separator_id], tokenizer.dtype)
        self._last: int | None = None
        self._write(self._separator)

    def append(self, document: CleanDocument, ids: NDArray[np.unsignedinteger]) -> None:
        """Append one document, encoded as `ids`.

        A separator comes before it, unless it continues the very document that was appended last.
        """
        if self._last is not None and not (document.continues and self._last == document.number - 1):
            self._write(self._separator)
        self._write(ids)
        self._last = document.number
        if self._text and self.text_bytes < VALIDATION_TEXT_BYTES:
            self._text.write(document.utf8[: VALIDATION_TEXT_BYTES - self.text_bytes])
        self.documents += 1
        self.characters += len(document.text)
        self.text_bytes += len(document.utf8)

    def close(self) -> None:
        """End the last document and close the files."""
        if self._last is not None:
            self._write(self._separator)
        self._file.close()
        if self._text:
            self._text.close()

    def counts(self) -> dict[str, int]:
        """Documents, characters, bytes and tokens written so far."""
        return {
            "documents": self.documents,
            "characters": self.characters,
            "bytes": self.text_bytes,
            "tokens": self.tokens,
        }

    def _write(self, ids: NDArray[np.unsignedinteger]) -> None:
        self._file.write(ids.tobytes())
        self.tokens += len(ids)


def save_description(directory: Path, tokenizer: Tokenizer, sentence_ends: list[int], report: dict[str, Any]) -> None:
    """Write what `load_prepared` needs beside the token files; its presence says that they are complete."""
    tokenizer.save(directory / "tokenizer.json")
    description = {"format": FORMAT, "dtype": str(tokenizer.dtype), "sentence_ends": sentence_ends, "report": report}
    (directory / "prepared.json").write_text(json.dumps(description, indent=1), encoding="utf-8")


def load_prepared(directory: Path) -> PreparedData | None:
    """The prepared data in a directory; None when it is not there, not complete, or of another format."""
    try:
        description = json.loads((directory / "prepared.json").read_text(encoding="utf-8"))
        if description["format"] != FORMAT:
            return None
        dtype = np.dtype(description["dtype"])
        files = {}
        for name in ("train", "validation"):
            counts, path = description["report"]["stages"][name], directory / f"{name}.tokens"
            if path.stat().st_size != counts["tokens"] * dtype.itemsize:
                return None
            tokens = np.memmap(path, dtype, mode="r")
            files[name] = TokenFile(
                tokens, counts["bytes"], counts["documents"], path, tuple(description["sentence_ends"])
            )
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError):
        return None
    return PreparedData(directory, Tokenizer.load(directory / "tokenizer.json"), report=description["report"], **files)
