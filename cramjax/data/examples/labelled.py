"""Labelled texts and pairs: tokens, their types, and the class or number that a head is to give; one in each row."""

import hashlib
import json
import math
import reprlib
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Int32
from numpy.typing import NDArray

from cramjax.cache import cache_directory
from cramjax.config import DataConfig
from cramjax.data.examples.formats import check_fields
from cramjax.data.examples.frames import cut_longest, frame_of
from cramjax.data.once import Progress, prepared_once
from cramjax.data.records import Record, read_records
from cramjax.data.sources import Source, find_sources
from cramjax.data.tokenizer import Tokenizer
from cramjax.errors import ConfigError, DataError
from cramjax.examples import LabelsConfig
from cramjax.loading import check_ranges

FORMAT = 2
"""Version of what is on disk; raise it whenever the same configuration would be prepared differently."""

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")
_ELSEWHERE = ("source", "validation", "cache_dir", "head_width", "head_dropout")
"""Fields that say nothing of what is prepared, or are told by fingerprints."""
_LARGEST = float(np.finfo(np.float32).max)
"""Of labels that are numbers: rows hold them in float32."""


@dataclass(frozen=True)
class LabelledExample:
    """A text or a pair, framed, and its label.

    Args:
        ids: Token ids (tokens,).
        token_types: 1 for tokens of the second text where the tokenizer tells texts apart, else 0 (tokens,).
        label: Number of the class, or the number to be predicted.
    """

    ids: NDArray[np.int64]
    token_types: NDArray[np.uint8]
    label: float


@dataclass(frozen=True)
class LabelledFile:
    """The labelled examples of one split, each in a row of its own.

    Args:
        ids: Token ids of all, end to end (tokens,).
        token_types: Their types (tokens,).
        starts: Where each example begins, and where the last one ends (examples + 1,).
        labels: Their labels (examples,).
        length: Tokens that the model sees of a row.
        pad_id: Stands where there is no token.
        classes: How many there are; 0: labels are numbers to be predicted.
    """

    ids: NDArray[np.int64] = field(repr=False)
    token_types: NDArray[np.uint8] = field(repr=False)
    starts: NDArray[np.int64] = field(repr=False)
    labels: NDArray[np.float64] = field(repr=False)
    length: int
    pad_id: int
    classes: int

    def __len__(self) -> int:
        """Examples."""
        return len(self.labels)

    def example(self, number: int) -> LabelledExample:
        """One example."""
        place = slice(int(self.starts[number]), int(self.starts[number + 1]))
        return LabelledExample(self.ids[place], self.token_types[place], float(self.labels[number]))

    def row(self, number: int) -> Int32[np.ndarray, "3 tokens"]:
        """One row, int32 (3, length + 1): token ids, their types, and 1 where there is a token.

        Its last column is no token: the first entry is the number of the class, or the bits of a float32 label.
        """
        example = self.example(number)
        row, size = np.zeros((3, self.length + 1), np.int32), len(example.ids)
        row[0, :-1] = self.pad_id
        row[0, :size], row[1, :size], row[2, :size] = example.ids, example.token_types, 1
        label = np.float32(example.label)
        row[0, -1] = int(label) if self.classes else label.view(np.int32)
        return row

    def batches(
        self, numbers: Sequence[int] | NDArray[np.int64], batch: int
    ) -> Iterator[Int32[np.ndarray, "batch 3 tokens"]]:
        """Some rows, so many at a time; the last batch is filled up with padding, rows without a token."""
        for start in range(0, len(numbers), batch):
            rows = np.zeros((batch, 3, self.length + 1), np.int32)
            rows[:, 0, :-1] = self.pad_id
            for row, number in zip(rows, numbers[start : start + batch], strict=False):
                row[:] = self.row(int(number))
            yield rows

    @property
    def token_count(self) -> int:
        """Tokens of all examples."""
        return len(self.ids)

    @property
    def identity(self) -> str:
        """How much it is, and a checksum: what a resumed run must find again."""
        checksum = 0
        for part in (self.ids, self.token_types, self.starts, self.labels):
            checksum = zlib.crc32(part.tobytes(), checksum)
        return f"{len(self)} labelled examples of at most {self.length} tokens, checksum {checksum:08x}"


@dataclass(frozen=True)
class LabelCounts:
    """What became of the rows that were read.

    Args:
        length: Tokens that the model sees.
        read: Rows read.
        dropped: Those left out because they are longer.
        cut: Those of which the beginning was kept.
        repeated: Training examples left out because they are held out too.
        train: Examples to train on.
        validation: Held-out examples.
        classes: Training examples by class, in the order of their numbers.
    """

    length: int
    read: int
    dropped: int
    cut: int
    repeated: int
    train: int
    validation: int
    classes: dict[str, int]

    def __str__(self) -> str:
        """What was read, cut, dropped and kept, in one sentence."""
        parts = [f"labelled examples of at most {self.length:,} tokens: read {self.read:,}"]
        parts += [f"cut {self.cut:,} longer ones"] if self.cut else []
        parts += [f"dropped {self.dropped:,} longer ones"] if self.dropped else []
        parts += [f"dropped {self.repeated:,} that are held out too"] if self.repeated else []
        shares = ", ".join(f"{name} {count / self.train:.0%}" for name, count in self.classes.items())
        parts += [f"kept {self.train:,} to train on{f' ({shares})' if shares else ''} and {self.validation:,} held out"]
        return "; ".join(parts) + "."


@dataclass(frozen=True)
class PreparedLabels:
    """Everything that tuning and evaluation need of labelled examples.

    Args:
        path: Directory in the cache.
        tokenizer: The model's.
        labels: Names of the classes, in the order of their numbers; none where labels are numbers.
        train: Examples to train on.
        validation: Held-out examples.
        counts: What became of what was read.
        held_out: UTF-8 bytes of the held-out texts, and their and their labels' SHA-256, whatever the tokenizer.
    """

    path: Path
    tokenizer: Tokenizer = field(repr=False)
    labels: tuple[str, ...]
    train: LabelledFile
    validation: LabelledFile
    counts: LabelCounts
    held_out: dict[str, Any]

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


def prepare_labels(
    config: LabelsConfig, tokenizer: Tokenizer, length: int, *, progress: Progress | None = None
) -> PreparedLabels:
    """Prepared labelled examples for a configuration, from the cache if they are there.

    Texts are framed as the tokenizer's own template has it. Held-out examples that are also among those to train on are
    left out of these. Without `config.validation`, examples are held out by a hash of their tokens.

    Args:
        config: What to read, and what is in it.
        tokenizer: The model's.
        length: Tokens that the model sees.
        progress: Is told when another process prepares the same.

    Raises:
        DataError: A row cannot be used, there are too few, or the cache cannot be written.
        ConfigError: The configuration cannot be.
    """
    check_ranges(config, "labels.")
    if not config.source:
        raise ConfigError("labels.source must name labelled texts to tune on: JSONL files, say. It is not given.")
    check_fields(config.fields, "labels")
    job = _Job(config, tokenizer, length)
    try:
        directory = cache_directory(config.cache_dir) / "labels" / job.key()
        return prepared_once(directory, job.load, job.write, progress or (lambda sentence: None))
    except OSError as error:  # Trouble with sources is a DataError by now: this is the cache.
        raise DataError(
            f"prepared examples cannot be kept: {error.strerror} ({error.filename or config.cache_dir or 'the cache'})."
            " Make room there, or set labels.cache_dir or CRAMJAX_CACHE to another place."
        ) from error


def has_pairs(config: LabelsConfig) -> bool:
    """Whether rows are pairs: as the configuration says; else if its `fields` name a pair, or the first row has one.

    Args:
        config: What to read.

    Raises:
        DataError: The first row cannot be read.
        ConfigError: `fields` names a pair, and there are to be none.
    """
    named = config.fields.get("pair")
    if config.pairs is None:
        first = islice(_records(config), 1) if config.source else ()
        return named is not None or any("pair" in record.values for record in first)
    if named is not None and not config.pairs:
        raise ConfigError(
            f"fields names a pair, {named!r}, and labels.pairs is false, as of a model tuned on single texts: leave "
            "the pair out, or tune with labels.pairs=true."
        )
    return config.pairs


def _records(config: LabelsConfig, sources: list[Source] | None = None) -> Iterator[Record]:
    data = DataConfig(hub_config=config.hub_config, hub_split=config.hub_split)
    return read_records(find_sources(config.source) if sources is None else sources, data)


def labelled_rows(config: LabelsConfig, tokenizer: Tokenizer, length: int) -> LabelledFile:
    """All rows of a source, to score a model on; nothing is held out, and nothing kept in the cache.

    Args:
        config: What to read; its `names` are the model's.
        tokenizer: The model's.
        length: Tokens that the model sees.

    Raises:
        DataError: A row cannot be used, or there is none.
        ConfigError: The configuration cannot be.
    """
    check_fields(config.fields, "labels")
    job = _Job(config, tokenizer, length)
    rows = list(job.rows(job.sources))
    if not rows:
        gone = "it has none" if not job.read else f"of {job.read} read, all were too long"
        raise DataError(f"no labelled example is left of {config.source}: {gone}.")
    numbers = [job.number(row, list(config.names)) for row in rows]
    starts = np.concatenate([[0], np.cumsum([len(row.ids) for row in rows])]).astype(np.int64)
    ids, types = (np.concatenate([getattr(row, part) for row in rows]) for part in ("ids", "types"))
    options = {"length": length, "pad_id": tokenizer.pad_id, "classes": len(config.names)}
    return LabelledFile(ids, types, starts, np.asarray(numbers, np.float64), **options)


class _Read(NamedTuple):
    """A row whose label is not a number yet."""

    ids: NDArray[np.int64]
    types: NDArray[np.uint8]
    label: Any
    where: str
    digest: bytes
    """Of tokens and label."""
    text: bytes
    """SHA-256 of texts and label."""
    text_bytes: int


class _Job:
    """Reads, judges and stores the rows of a configuration."""

    def __init__(self, config: LabelsConfig, tokenizer: Tokenizer, length: int):
        self.pairs = has_pairs(config)
        self.config, self.tokenizer, self.length = replace(config, pairs=self.pairs), tokenizer, length
        self.frame = frame_of(tokenizer, pairs=self.pairs)
        self.room = length - self.frame.tokens
        if self.room < 2:
            raise ConfigError(
                f"a sequence of {length} tokens leaves no room beside {self.frame.tokens} special ones: make it longer."
            )
        self.sources = find_sources(config.source)
        self.validation = None if config.validation is None else find_sources(config.validation)
        self.read = self.cut = self.dropped = 0

    def key(self) -> str:
        """Hash of everything that shapes what is prepared."""
        shape = {
            "format": FORMAT,
            "sources": [source.fingerprint for source in self.sources],
            "validation": self.validation and [source.fingerprint for source in self.validation],
            "config": {**asdict(self.config), **dict.fromkeys(_ELSEWHERE)},
            "length": self.length,
            "tokenizer": hashlib.sha256(self.tokenizer.to_json().encode()).hexdigest(),
        }
        return hashlib.sha256(json.dumps(shape).encode()).hexdigest()[:16]

    def write(self, directory: Path) -> None:
        """Prepare the rows into a directory."""
        given = None if self.validation is None else list(self.rows(self.validation))
        rows, repeated = list(self.rows(self.sources)), 0
        for row in rows if self.config.target == "number" else ():
            self.number(row, [])  # in order, so that the first that is none is named
        if given is not None:
            held_out = {row.digest for row in given}
            kept = [row for row in rows if row.digest not in held_out]
            splits, repeated = {"train": kept, "validation": given}, len(rows) - len(kept)
        else:
            rows.sort(key=lambda row: row.digest[8:])
            share = sum(int.from_bytes(row.digest[8:]) / 2**64 < self.config.validation_fraction for row in rows)
            count = min(max(share, 1), max(len(rows) - 1, 0))
            splits = {"train": rows[count:], "validation": rows[:count]}
        for name, split in splits.items():
            if not split:
                purpose = "to train on" if name == "train" else "to hold out"
                raise DataError(
                    f"no labelled example is left {purpose} of {self.config.source}: of {self.read} read, "
                    f"{self.dropped} were dropped as too long, and {repeated} as held out. Give more."
                )
        labels = self._labels(splits["train"])
        arrays: dict[str, NDArray] = {}
        for name, split in splits.items():
            numbers = [self.number(row, labels) for row in split]
            starts = np.concatenate([[0], np.cumsum([len(row.ids) for row in split])]).astype(np.int64)
            arrays |= {f"{name}_ids": np.concatenate([row.ids for row in split]), f"{name}_starts": starts}
            arrays |= {f"{name}_types": np.concatenate([row.types for row in split])}
            arrays |= {f"{name}_labels": np.asarray(numbers, np.float64)}
        np.savez(directory / "examples.npz", **arrays)  # pyright: ignore[reportArgumentType]
        classes = {label: int((arrays["train_labels"] == n).sum()) for n, label in enumerate(labels)}
        sizes = {name: len(split) for name, split in splits.items()}
        counts = LabelCounts(self.length, self.read, self.dropped, self.cut, repeated, **sizes, classes=classes)
        texts = b"".join(sorted(row.text for row in splits["validation"]))
        held_out = {
            "bytes": sum(row.text_bytes for row in splits["validation"]),
            "sha256": hashlib.sha256(texts).hexdigest(),
        }
        description = {"format": FORMAT, "labels": labels, "counts": asdict(counts), "held_out": held_out}
        (directory / "labels.json").write_text(json.dumps(description, indent=1), encoding="utf-8")

    def load(self, directory: Path) -> PreparedLabels | None:
        """What is in a directory; None where it is not there, not complete, or of another format."""
        try:
            description = json.loads((directory / "labels.json").read_text(encoding="utf-8"))
            if description["format"] != FORMAT:
                return None
            labels = tuple(description["labels"])
            with open(directory / "examples.npz", "rb") as file, np.load(file) as arrays:
                files = {name: self._file(arrays, name, len(labels)) for name in SPLITS}
            counts, held_out = LabelCounts(**description["counts"]), dict(description["held_out"])
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
            return None
        return PreparedLabels(directory, self.tokenizer, labels, counts=counts, held_out=held_out, **files)

    def _file(self, arrays: Any, split: Split, classes: int) -> LabelledFile:
        parts = (arrays[f"{split}_{part}"] for part in ("ids", "types", "starts", "labels"))
        return LabelledFile(*parts, length=self.length, pad_id=self.tokenizer.pad_id, classes=classes)

    def rows(self, sources: list[Source]) -> Iterator[_Read]:
        """Rows of some sources, as far as they are kept."""
        for record in _records(self.config, sources):
            self.read += 1
            texts = [self._text(record, name) for name in (("text", "pair") if self.pairs else ("text",))]
            label = record.value(self.config.fields.get("label", "label"))
            tokens = [self.tokenizer.encode(text) for text in texts]
            kept = self._fitting(tokens, record.where)
            if kept is not None:
                ids, types = self.frame.around(*kept)
                yield _Read(
                    ids,
                    types,
                    label,
                    record.where,
                    digest=hashlib.blake2b(json.dumps([tokens, str(label)]).encode(), digest_size=16).digest(),
                    text=hashlib.sha256(json.dumps([texts, str(label)]).encode()).digest(),
                    text_bytes=sum(len(text.encode()) for text in texts),
                )

    def _text(self, record: Record, name: str) -> str:
        column = self.config.fields.get(name, name)
        text = record.text(column)
        if not text.strip():
            raise DataError(f"{record.where}: field {column!r} is empty, so there is nothing to judge. Leave it out.")
        return text

    def _fitting(self, tokens: list[list[int]], where: str) -> list[list[int]] | None:
        """The texts as far as they fit; None if they are dropped. It is counted."""
        size = sum(map(len, tokens))
        if size <= self.room:
            return tokens
        if self.config.overlong == "error":
            raise DataError(
                f"{where}: {size + self.frame.tokens:,} tokens, and the model sees {self.length:,}. Shorten it, raise "
                "the sequence length, or set labels.overlong to cut or drop."
            )
        if self.config.overlong == "drop":
            self.dropped += 1
            return None
        self.cut += 1
        if len(tokens) == 1:
            return [tokens[0][: self.room]]
        sizes = cut_longest(len(tokens[0]), len(tokens[1]), self.room)
        return [text[:kept] for text, kept in zip(tokens, sizes, strict=True)]

    def _labels(self, rows: list[_Read]) -> list[str]:
        """Names of the classes, in the order of their numbers."""
        if self.config.target == "number":
            return []
        found = {self._name(row) for row in rows}
        labels = list(self.config.names) or sorted(found, key=lambda name: (*_as_integer(name), name))
        if len(labels) < 2:
            raise DataError(
                f"labels.source ({self.config.source}) has one label, {labels[0]!r}, and classes are at least two: "
                "give more rows, or set labels.target=number."
            )
        return labels

    def number(self, row: _Read, labels: list[str]) -> float:
        """The number of a label's class, or that it is."""
        if self.config.target == "number":
            try:
                value = float(row.label)
            except (TypeError, ValueError, OverflowError):
                value = math.nan
            if not abs(value) <= _LARGEST or isinstance(row.label, bool):
                raise DataError(
                    f"{row.where}: label {reprlib.repr(row.label)} is no finite number of float32. For names set "
                    "labels.target=class."
                )
            return value
        name = self._name(row)
        if name in labels:
            return labels.index(name)
        if self.config.names and isinstance(row.label, int) and 0 <= row.label < len(labels):
            return row.label
        known = ", ".join(labels[:20]) + (", …" if len(labels) > 20 else "")
        raise DataError(f"{row.where}: label {row.label!r} is not one of {known}. Correct it, or set labels.names.")

    def _name(self, row: _Read) -> str:
        if not isinstance(row.label, str | int) or row.label == "":
            raise DataError(
                f"{row.where}: label {row.label!r} is no name or integer of a class. Correct it, or set "
                "labels.target=number."
            )
        return str(row.label)


def _as_integer(name: str) -> tuple[int, int]:
    """Sorts numbers by their value, before names."""
    try:
        return 0, int(name)
    except ValueError:
        return 1, 0
