"""Prepares examples: rows → pieces → tokens → packed rows, once, into a cache.

Tokens are written as they come, so memory grows with the number of examples, not with their length.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from cramjax.cache import cache_directory
from cramjax.config import DataConfig
from cramjax.data.examples.chat import read_template
from cramjax.data.examples.formats import Reader, reader_of
from cramjax.data.examples.pieces import Example, PieceEncoder
from cramjax.data.examples.rows import pack
from cramjax.data.examples.store import (
    FORMAT,
    ExampleCounts,
    ExampleWriter,
    PreparedExamples,
    load_examples,
    open_examples,
    save_description,
)
from cramjax.data.once import PROGRESS_SECONDS, Progress, prepared_once
from cramjax.data.records import read_records
from cramjax.data.sources import Source, find_sources
from cramjax.data.tokenizer import Tokenizer
from cramjax.errors import ConfigError, DataError
from cramjax.examples import ExamplesConfig
from cramjax.loading import check_ranges


def prepare_examples(
    config: ExamplesConfig,
    tokenizer: Tokenizer,
    template: str | None,
    length: int,
    *,
    progress: Progress | None = None,
) -> PreparedExamples:
    """Prepared examples for a configuration, from the cache if they are there.

    Held-out examples that are also among those to train on are left out of these. Without `config.validation`, examples
    are held out by a hash of their tokens, so that the split depends on nothing else.

    Args:
        config: What to read, and what is in it.
        tokenizer: The model's.
        template: The model's chat template; None if it has none.
        length: Tokens that the model sees of a row; a row has one more, which is only predicted.
        progress: Called now and then while preparing; not at all when the cache answers.

    Raises:
        DataError: A row cannot be used, there are too few, or the cache cannot be written.
        ConfigError: The configuration cannot be.
    """
    check_ranges(config, "examples.")
    if not config.source:
        raise ConfigError("examples.source must name the examples to tune on: JSONL files, say. It is not given.")
    used = read_template(config.template, template) if config.format in ("chat", "preference") else None
    reader = reader_of(config, tokenizer, template)
    sources = find_sources(config.source)
    validation = None if config.validation is None else find_sources(config.validation)
    job = _Job(config, tokenizer, used, length, reader, sources, validation, progress or (lambda sentence: None))
    try:
        directory = cache_directory(config.cache_dir) / "examples" / job.key
        return prepared_once(
            directory,
            lambda path: load_examples(path, tokenizer),
            lambda unfinished: _prepare_into(unfinished, job),
            job.progress,
        )
    except OSError as error:  # Trouble with sources is a DataError by now: this is the cache.
        raise DataError(
            f"prepared examples cannot be kept: {error.strerror} ({error.filename or config.cache_dir or 'the cache'})."
            " Make room there, or set examples.cache_dir or CRAMJAX_CACHE to another place."
        ) from error


@dataclass(frozen=True)
class _Job:
    config: ExamplesConfig
    tokenizer: Tokenizer
    template: str | None
    length: int
    reader: Reader
    sources: list[Source]
    validation: list[Source] | None
    progress: Progress

    @property
    def key(self) -> str:
        """Hash of everything that shapes what is prepared."""
        shape = {
            "format": FORMAT,
            "sources": [source.fingerprint for source in self.sources],
            "validation": self.validation and [source.fingerprint for source in self.validation],
            "config": {**asdict(self.config), "source": None, "validation": None, "cache_dir": None},
            "template": self.template,
            "length": self.length,
            "tokenizer": hashlib.sha256(self.tokenizer.to_json().encode()).hexdigest(),
        }
        return hashlib.sha256(json.dumps(shape).encode()).hexdigest()[:16]

    def examples(self, sources: list[Source]) -> Iterator[tuple[tuple[Example, ...], str]]:
        """Examples of some sources, those that stay together as one, and where each stands."""
        data = DataConfig(hub_config=self.config.hub_config, hub_split=self.config.hub_split)
        for record in read_records(sources, data):
            examples = self.reader(record)
            if not all(example.predicted.any() for example in examples):
                raise DataError(f"{record.where}: there is nothing to predict. Leave the row out.")
            yield examples, record.where


class _Writing:
    """Examples on their way into a store, and what becomes of them."""

    def __init__(self, job: _Job, writer: ExampleWriter):
        self._job, self._writer = job, writer
        self._encoder = PieceEncoder(job.tokenizer)
        self.read = self.cut = self.dropped = self.repeated = 0
        self.draws: list[float] = []
        """Of each kept example, uniform in [0, 1), decided by its tokens alone; below 0: given to be held out."""
        self._given: set[bytes] = set()
        self._report = _reporter(job.progress)

    def add(self, sources: list[Source], *, held_out: bool) -> None:
        """Write the examples of some sources; those given to be held out come first."""
        for examples, where in self._job.examples(sources):
            self.read += 1
            self._report(self.read)
            shown = b"".join(example.ids.tobytes() + example.predicted.tobytes() for example in examples)
            digest = hashlib.blake2b(shown, digest_size=16).digest()
            if held_out:
                self._given.add(digest)
            elif digest in self._given:
                self.repeated += 1
                continue
            kept = self._fitting(examples, where)
            for example in kept:
                self._writer.append(example)
            if kept:
                self.draws.append(-1.0 if held_out else int.from_bytes(digest[8:], "little") / 2**64)

    def _fitting(self, examples: tuple[Example, ...], where: str) -> tuple[Example, ...]:
        """What is kept of examples that stay together; empty if nothing is. It is counted."""
        length, policy = self._job.length, self._job.config.overlong
        total = sum(map(len, examples))
        if total <= length + 1:
            return examples
        if policy == "error":
            raise DataError(
                f"{where}: {total:,} tokens, and the model sees {length:,}. Shorten it, raise the sequence "
                "length, or set examples.overlong to cut or drop."
            )
        room = (length + 1) // len(examples)
        short = tuple(self._encoder.cut(example, room) for example in examples)
        if policy == "drop" or not all(example.predicted.any() for example in short):
            self.dropped += 1
            return ()
        self.cut += 1
        return short


def _prepare_into(directory: Path, job: _Job) -> None:
    with closing(ExampleWriter(directory)) as writer:
        writing = _Writing(job, writer)
        if job.validation is not None:
            writing.add(job.validation, held_out=True)
        writing.add(job.sources, held_out=False)
    held_out = _split(np.asarray(writing.draws), job, writing)
    together = job.config.together
    lengths = np.asarray(writer.lengths).reshape(-1, together).sum(axis=1)
    numbers = np.arange(len(lengths))
    packed = {
        name: _apart(pack(numbers[chosen], lengths[chosen], job.length + 1), together)
        for name, chosen in (("train", ~held_out), ("validation", held_out))
    }
    writer.save_index(packed)  # pyright: ignore[reportArgumentType]
    files = open_examples(directory, job.tokenizer.dtype, job.length)
    counts = ExampleCounts(
        length=job.length,
        read=writing.read,
        dropped=writing.dropped,
        cut=writing.cut,
        repeated=writing.repeated,
        train=files["train"].counts,
        validation=files["validation"].counts,
    )
    save_description(directory, job.template, job.tokenizer.dtype, counts)


def _apart(packing: tuple[np.ndarray, np.ndarray], together: int) -> tuple[np.ndarray, np.ndarray]:
    """A packing of examples, from that of so many of them together."""
    order, rows = packing
    return (order[:, None] * together + np.arange(together)).reshape(-1), rows * together


def _split(draws: np.ndarray, job: _Job, writing: _Writing) -> np.ndarray:
    """Which examples are held out: those given, or those that draw low; at least one, and not all."""
    gone = (
        f"of {writing.read} read, {writing.dropped} were dropped as too long, or with nothing to predict within "
        f"{job.length} tokens (data.sequence_length), and {writing.repeated} as held out"
    )
    if job.validation is not None:
        held_out = draws < 0
        for none_left, name in ((held_out.all(), "source"), (not held_out.any(), "validation")):
            if none_left:
                source = getattr(job.config, name)
                raise DataError(f"no example is left of examples.{name} ({source}): {gone}. Give more.")
        return held_out
    if len(draws) < 2:
        raise DataError(
            f"examples.source ({job.config.source}) leaves {len(draws)} example(s), too few to hold one out: {gone}. "
            "Give more, or examples.validation."
        )
    order = np.argsort(draws, kind="stable")
    count = int(np.clip((draws < job.config.validation_fraction).sum(), 1, len(draws) - 1))
    held_out = np.zeros(len(draws), bool)
    held_out[order[:count]] = True
    return held_out


def _reporter(progress: Progress) -> Callable[[int], None]:
    """A function of examples done that speaks up every few seconds."""
    said = time.monotonic()

    def report(done: int) -> None:
        nonlocal said
        if time.monotonic() - said >= PROGRESS_SECONDS:
            said = time.monotonic()
            progress(f"preparing examples: {done:,}")

    return report
