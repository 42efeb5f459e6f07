"""Prepared examples on disk: their tokens end to end, memory-mapped, and which examples lie in which row.

`prepare_examples` writes a directory of these once; training and evaluation read rows of it.
"""

import json
import zipfile
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int32
from numpy.typing import NDArray

from cramjax.data.examples.pieces import Example
from cramjax.data.tokenizer import Tokenizer

FORMAT = 1
"""Version of what is on disk; raise it whenever the same configuration would be prepared differently."""

Split = Literal["train", "validation"]


@dataclass(frozen=True)
class SplitCounts:
    """What is trained on, or held out.

    Args:
        examples: How many.
        tokens: All of their tokens.
        predicted: Those to be predicted.
        text_bytes: UTF-8 bytes of the text these stand for.
        rows: Rows they are packed into.
    """

    examples: int
    tokens: int
    predicted: int
    text_bytes: int
    rows: int


@dataclass(frozen=True)
class ExampleCounts:
    """What became of the examples that were read.

    Args:
        length: Tokens that the model sees of a row.
        read: Examples read.
        dropped: Those left out because they are longer than a row, or have nothing to predict within it.
        cut: Those of which the beginning was kept.
        repeated: Training examples left out because they are held out too.
        train: What is trained on.
        validation: What is held out.
    """

    length: int
    read: int
    dropped: int
    cut: int
    repeated: int
    train: SplitCounts
    validation: SplitCounts

    def __str__(self) -> str:
        """What was read, cut, dropped and kept, in one sentence."""
        train, held_out = self.train, self.validation
        full = train.tokens / (train.rows * (self.length + 1))
        parts = [f"examples of at most {self.length:,} tokens: read {self.read:,}"]
        parts += [f"cut {self.cut:,} longer ones"] if self.cut else []
        parts += [f"dropped {self.dropped:,} longer ones"] if self.dropped else []
        parts += [f"dropped {self.repeated:,} that are held out too"] if self.repeated else []
        parts += [
            f"kept {train.examples:,} to train on ({train.tokens:,} tokens, {train.predicted:,} of them predicted; "
            f"{train.rows:,} rows, {full:.0%} full) and {held_out.examples:,} held out ({held_out.tokens:,} tokens, "
            f"{held_out.predicted:,} predicted)"
        ]
        return "; ".join(parts) + "."


@dataclass(frozen=True)
class ExampleStore:
    """All examples, end to end.

    Args:
        tokens: Token ids, memory-mapped (tokens,).
        predicted: True where the token is to be predicted (tokens,).
        starts: Where each example begins, and where the last one ends (examples + 1,).
        targets: Tokens to be predicted of each example (examples,).
        text_bytes: UTF-8 bytes of the text that these stand for (examples,).
    """

    tokens: NDArray[np.unsignedinteger] = field(repr=False)
    predicted: NDArray[np.bool_] = field(repr=False)
    starts: NDArray[np.int64] = field(repr=False)
    targets: NDArray[np.int64] = field(repr=False)
    text_bytes: NDArray[np.int64] = field(repr=False)

    def example(self, number: int) -> Example:
        """One example."""
        place = slice(int(self.starts[number]), int(self.starts[number + 1]))
        return Example(self.tokens[place], self.predicted[place], int(self.text_bytes[number]))


@dataclass(frozen=True)
class ExampleFile:
    """The examples of one split, packed into rows.

    Args:
        store: Holds them.
        order: Numbers of the examples, row by row (examples,).
        rows: Where each row begins in `order`, and where the last one ends (rows + 1,).
        length: Tokens that the model sees of a row; a row has one more, which is only predicted.
    """

    store: ExampleStore = field(repr=False)
    order: NDArray[np.int64] = field(repr=False)
    rows: NDArray[np.int64] = field(repr=False)
    length: int

    def __len__(self) -> int:
        """Rows."""
        return len(self.rows) - 1

    def row(self, number: int) -> Int32[np.ndarray, "3 tokens"]:
        """One row, int32 (3, length + 1): token ids (0 at padding), the number of the example within the row from 1
        (0 at padding), and 1 where the token is to be predicted.
        """
        row, at = np.zeros((3, self.length + 1), np.int32), 0
        for place, index in enumerate(self.members(number), 1):
            example = self.store.example(int(index))
            to = at + len(example)
            row[0, at:to], row[1, at:to], row[2, at:to] = example.ids, place, example.predicted
            at = to
        return row

    def members(self, number: int) -> NDArray[np.int64]:
        """Numbers of the examples in a row."""
        return self.order[self.rows[number] : self.rows[number + 1]]

    @property
    def counts(self) -> SplitCounts:
        """How much it is."""
        store = self.store
        lengths = np.diff(store.starts)[self.order]
        return SplitCounts(
            examples=len(self.order),
            tokens=int(lengths.sum()),
            predicted=int(store.targets[self.order].sum()),
            text_bytes=int(store.text_bytes[self.order].sum()),
            rows=len(self),
        )

    @property
    def token_count(self) -> int:
        """Tokens of all examples."""
        return self.counts.tokens

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of predicted text per predicted token: nats per token to bits per byte needs it."""
        counts = self.counts
        return counts.text_bytes / counts.predicted

    @property
    def identity(self) -> str:
        """How much it is, and a checksum of the packing and of 64 blocks of tokens: what a resumed run must find."""
        tokens = self.store.tokens
        starts = np.linspace(0, max(0, len(tokens) - 4096), 64, dtype=np.int64)
        checksum = zlib.crc32(np.concatenate([tokens[start : start + 4096] for start in starts]).tobytes())
        for part in (self.store.starts, self.store.targets, self.order, self.rows):
            checksum = zlib.crc32(part.tobytes(), checksum)
        return f"{len(self.order)} examples in {len(self)} rows of {self.length}, checksum {checksum:08x}"


@dataclass(frozen=True)
class PreparedExamples:
    """Everything that tuning and its evaluation need of a set of examples.

    Args:
        path: Directory in the cache.
        tokenizer: The model's.
        template: The chat template that was used; None if none was.
        train: Rows to train on.
        validation: Held-out rows.
        counts: What became of what was read.
    """

    path: Path
    tokenizer: Tokenizer = field(repr=False)
    template: str | None = field(repr=False)
    train: ExampleFile
    validation: ExampleFile
    counts: ExampleCounts

    def __str__(self) -> str:
        """What was read, cut, dropped and kept, in one sentence."""
        return str(self.counts)

    @property
    def identity(self) -> str:
        """What a resumed run must find again."""
        return self.train.identity

    @property
    def report(self) -> dict[str, Any]:
        """The counts as plain values, under `stages`."""
        return {"stages": asdict(self.counts)}


class ExampleWriter:
    """Appends examples to a store."""

    def __init__(self, directory: Path):
        """Create its files in a directory."""
        self._directory = directory
        self._tokens = open(directory / "tokens", "wb", buffering=1 << 20)
        self._predicted = open(directory / "predicted", "wb", buffering=1 << 20)
        self.lengths: list[int] = []
        self._targets: list[int] = []
        self._text_bytes: list[int] = []

    def append(self, example: Example) -> None:
        """Append an example."""
        self._tokens.write(example.ids.tobytes())
        self._predicted.write(example.predicted.astype(np.uint8).tobytes())
        self.lengths.append(len(example))
        self._targets.append(int(example.predicted.sum()))
        self._text_bytes.append(example.text_bytes)

    def close(self) -> None:
        """Close the files."""
        self._tokens.close()
        self._predicted.close()

    def save_index(self, packings: dict[Split, tuple[NDArray[np.int64], NDArray[np.int64]]]) -> None:
        """Write where examples lie, and `(order, rows)` of each split."""
        starts = np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)
        arrays = {"starts": starts, "targets": np.asarray(self._targets), "text_bytes": np.asarray(self._text_bytes)}
        for split, (order, rows) in packings.items():
            arrays |= {f"{split}_order": order, f"{split}_rows": rows}
        np.savez(self._directory / "index.npz", **arrays)  # pyright: ignore[reportArgumentType]


def open_examples(directory: Path, dtype: np.dtype, length: int) -> dict[Split, ExampleFile]:
    """Both splits of a directory that an `ExampleWriter` has filled."""
    with open(directory / "index.npz", "rb") as file, np.load(file) as index:
        arrays = {name: index[name].astype(np.int64) for name in index.files}
    store = ExampleStore(
        np.memmap(directory / "tokens", dtype, mode="r"),
        np.memmap(directory / "predicted", np.bool_, mode="r"),
        arrays["starts"],
        arrays["targets"],
        arrays["text_bytes"],
    )
    splits: tuple[Split, ...] = ("train", "validation")
    return {split: ExampleFile(store, arrays[f"{split}_order"], arrays[f"{split}_rows"], length) for split in splits}


def save_description(directory: Path, template: str | None, dtype: np.dtype, counts: ExampleCounts) -> None:
    """Write what `load_examples` needs beside the arrays; its presence says that they are complete."""
    description = {"format": FORMAT, "template": template, "dtype": str(dtype), "counts": asdict(counts)}
    (directory / "examples.json").write_text(json.dumps(description, indent=1), encoding="utf-8")


def load_examples(directory: Path, tokenizer: Tokenizer) -> PreparedExamples | None:
    """The prepared examples in a directory; None when they are not there, not complete, or of another format."""
    try:
        description = json.loads((directory / "examples.json").read_text(encoding="utf-8"))
        if description["format"] != FORMAT:
            return None
        said = description["counts"]
        counts = ExampleCounts(**said | {name: SplitCounts(**said[name]) for name in ("train", "validation")})
        files = open_examples(directory, np.dtype(description["dtype"]), counts.length)
        store = files["train"].store
        if not len(store.tokens) == len(store.predicted) == store.starts[-1]:
            return None
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None
    return PreparedExamples(directory, tokenizer, description["template"], counts=counts, **files)
