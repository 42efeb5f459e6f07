"""Prepares a corpus: sources → clean → tokenize → token files, once, into a cache.

Everything is streamed, so memory does not grow with the corpus. The directory appears in the cache by one rename: an
interrupted preparation leaves nothing that looks finished, and the next one starts over.
"""

import hashlib
import json
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cramjax.cache import cache_directory
from cramjax.config import DataConfig, TokenizerConfig
from cramjax.data.clean import CleanDocument, DigestSet, Tally, clean
from cramjax.data.files import Document
from cramjax.data.once import PROGRESS_SECONDS, Progress, prepared_once
from cramjax.data.sources import BLOCK_CHARS, Source, find_sources, read_documents, total_bytes
from cramjax.data.store import FORMAT, PreparedData, TokenWriter, load_prepared, save_description
from cramjax.data.tokenizer import Tokenizer, make_tokenizer, parts_beside, sentence_ends
from cramjax.errors import ConfigError, DataError

BATCH_BYTES = 1 << 20
FEW_DOCUMENTS = 16
"""With fewer documents than this and none held out, text files are cut into blocks of SMALL_BLOCK_CHARS."""
SMALL_BLOCK_CHARS = 1 << 12


def prepare(data: DataConfig, tokenizer: TokenizerConfig, *, progress: Progress | None = None) -> PreparedData:
    """Prepared data for a configuration, from the cache if it is there.

    Held-out text given as `data.validation` is normalised and otherwise kept whole and in order. Without it, documents
    are held out by a hash of their text, so that the split depends on nothing else.

    Args:
        data: What to read and how to clean it.
        tokenizer: The tokenizer to train or load.
        progress: Called now and then while preparing; not at all when the cache answers.

    Raises:
        DataError: The corpus or the tokenizer cannot be used, or the cache cannot be written.
        ConfigError: The held-out share is not between 0 and 1.
    """
    if data.validation is None and not 0 < data.validation_fraction < 1:
        raise ConfigError(f"data.validation_fraction is {data.validation_fraction}; it must be between 0 and 1.")
    sources = find_sources(data.source)
    validation = None if data.validation is None else find_sources(data.validation)
    job = _Job(data, tokenizer, sources, validation, progress or (lambda sentence: None))
    try:
        directory = cache_directory(data.cache_dir) / "data" / _key(data, tokenizer, sources, validation)
        return prepared_once(directory, load_prepared, lambda unfinished: _prepare_into(unfinished, job), job.progress)
    except OSError as error:  # Trouble with sources is a DataError by now: this is the cache.
        raise DataError(
            f"prepared data cannot be kept: {error.strerror} ({error.filename or data.cache_dir or 'the cache'}). "
            "Make room there, or set data.cache_dir or CRAMJAX_CACHE to another place."
        ) from error


def prepared_already(data: DataConfig, tokenizer: TokenizerConfig) -> PreparedData | None:
    """Prepared data of local sources if the cache has it; nothing is read, and no hub is asked."""
    named = [data.source] if isinstance(data.source, str) else data.source
    named = [*named, *([data.validation] if isinstance(data.validation, str) else data.validation or [])]
    if any(source.startswith("hub:") for source in named):
        return None
    try:
        sources = find_sources(data.source)
        validation = None if data.validation is None else find_sources(data.validation)
        return load_prepared(cache_directory(data.cache_dir) / "data" / _key(data, tokenizer, sources, validation))
    except (DataError, OSError):  # preparing will say what is wrong
        return None


@dataclass(frozen=True)
class _Job:
    data: DataConfig
    tokenizer: TokenizerConfig
    sources: list[Source]
    validation: list[Source] | None
    progress: Progress


def _key(data: DataConfig, tokenizer: TokenizerConfig, sources: list[Source], validation: list[Source] | None) -> str:
    """Hash of everything that shapes the token files. Sequence length and order do not: they are applied on reading."""
    trained = tokenizer.kind in ("bpe", "wordpiece")
    shape = {
        "format": FORMAT,
        "sources": [source.fingerprint for source in sources],
        "validation": data.validation_fraction if validation is None else [s.fingerprint for s in validation],
        "read": [data.text_field, data.document_separator, data.hub_config, data.hub_split, data.limit_bytes],
        "clean": [data.normalize, data.max_tokens_per_char, data.min_chars, data.deduplicate],
        "tokenizer": [tokenizer.kind, *([tokenizer.vocab_size, tokenizer.train_bytes] if trained else [])],
    }
    if tokenizer.kind == "file" and tokenizer.path and Path(tokenizer.path).expanduser().is_file():
        path = Path(tokenizer.path).expanduser()
        shape["tokenizer"] += [hashlib.sha256(path.read_bytes()).hexdigest()]
        if parts := parts_beside(path):
            shape["tokenizer"] += [parts]
    return hashlib.sha256(json.dumps(shape).encode()).hexdigest()[:16]


def _prepare_into(directory: Path, job: _Job) -> None:
    start = time.perf_counter()
    tokenizer = make_tokenizer(job.tokenizer, _sample(job), job.data.normalize)
    trained = time.perf_counter()
    split = _Split(job.data.validation_fraction if job.validation is None else 0.0, BLOCK_CHARS)
    while True:
        stages, lowest = _write_tokens(directory, job, tokenizer, split)
        better = _better_split(job, split, stages, lowest)
        if better is None:
            break
        split = better
    report = {
        "stages": stages,
        "seconds": {"tokenizer": trained - start, "tokens": time.perf_counter() - trained},
        "tokenizer": {"kind": job.tokenizer.kind, "vocab_size": tokenizer.vocab_size},
    }
    save_description(directory, tokenizer, sentence_ends(tokenizer), report)


@dataclass(frozen=True)
class _Split:
    """How documents are held out: those that draw less than `share`, of a corpus cut into blocks."""

    share: float
    block_chars: int


def _better_split(job: _Job, split: _Split, stages: dict[str, dict[str, int]], lowest: float) -> _Split | None:
    """Another split to try when this one left a side empty; None when it did not.

    Only corpora of a few documents come here: they are cut finer, or give up the document that drew lowest.
    """
    train, held_out = stages["train"]["documents"], stages["validation"]["documents"]
    if job.validation is not None and not held_out:
        raise DataError(f"data.validation ({job.data.validation}) holds no text. Give another, or none.")
    if not train + held_out or (job.validation is not None and not train):
        dropped = ", ".join(f"{stages[s]['documents']} {s}" for s in ("short", "duplicate", "incompressible"))
        raise DataError(
            f"no training text is left of data.source ({job.data.source}): of {stages['read']['documents']} documents "
            f"read, dropped were {dropped}. Give more text, or relax data.min_chars, data.deduplicate (which also "
            "drops what data.validation holds) or data.max_tokens_per_char."
        )
    if train and held_out:
        return None
    if train + held_out < FEW_DOCUMENTS and split.block_chars > SMALL_BLOCK_CHARS:
        return _Split(split.share, SMALL_BLOCK_CHARS)
    if train > 1:
        return _Split(math.nextafter(lowest, 1.0), split.block_chars)
    raise DataError(
        f"data.source ({job.data.source}) has {train + held_out} document(s), too few to hold some out at "
        f"data.validation_fraction {job.data.validation_fraction}. Give more text, data.validation or "
        "data.document_separator."
    )


def _sample(job: _Job) -> Iterator[str]:
    """Text to train a tokenizer on: the beginning of every source, in proportion to its size, nothing held out."""
    limit, data = job.tokenizer.train_bytes, job.data
    share = data.validation_fraction if job.validation is None else 0.0
    sizes = [source.size for source in job.sources]
    if data.limit_bytes is None and all(sizes):
        total = sum(size or 0 for size in sizes)
        portions = [([source], limit * (source.size or 0) / total) for source in job.sources]
    else:
        portions = [(job.sources, min(limit, data.limit_bytes or limit))]
    report = _reporter(job.progress, "reading text to train the tokenizer", limit)
    seen, tally, owed, done = DigestSet(), Tally(), 0.0, 0
    for sources, portion in portions:
        owed += portion  # What one source is too short for, the next ones give.
        if owed <= 0:
            continue
        for document in clean(read_documents(sources, data), data, seen, tally):
            if document.draw >= share:
                owed -= len(document.utf8)
                done += len(document.utf8)
                report(done)
                yield document.text
            if owed <= 0:
                break


def _write_tokens(
    directory: Path, job: _Job, tokenizer: Tokenizer, split: _Split
) -> tuple[dict[str, dict[str, int]], float]:
    """Write both token files; returns what every stage counted, and the lowest draw among kept documents."""
    data, seen, tally, lowest = job.data, DigestSet(), Tally(), 1.0
    with (
        closing(TokenWriter(directory / "train.tokens", tokenizer)) as train,
        closing(TokenWriter(directory / "validation.tokens", tokenizer, directory / "validation.txt")) as validation,
    ):
        if job.validation is not None:
            given = clean(read_documents(job.validation, data), data, seen, Tally(), filtered=False)
            report = _reporter(job.progress, "tokenizing the held-out text", total_bytes(job.validation))
            for document, ids in _encoded(given, tokenizer, report):
                validation.append(document, ids)
        read = _first_bytes(read_documents(job.sources, data, split.block_chars), data.limit_bytes)
        kept = clean(read, data, seen, tally)
        report = _reporter(job.progress, "tokenizing", total_bytes(job.sources))
        for document, ids in _encoded(kept, tokenizer, report):
            if data.max_tokens_per_char is not None and len(ids) >= data.max_tokens_per_char * len(document.text):
                tally.add("incompressible", document.text, document.utf8)
                continue
            lowest = min(lowest, document.draw)
            (validation if document.draw < split.share else train).append(document, ids)
    if seen.full:
        warnings.warn("data.deduplicate: more documents than fit its memory; later duplicates were kept", stacklevel=2)
    return tally.stages | {"train": train.counts(), "validation": validation.counts()}, lowest


def _first_bytes(documents: Iterable[Document], limit: int | None) -> Iterator[Document]:
    left = math.inf if limit is None else limit
    for document in documents:
        yield document
        left -= len(document.text.encode("utf-8", "replace"))
        if left <= 0:
            return


def _encoded(
    documents: Iterable[CleanDocument], tokenizer: Tokenizer, report: Callable[[int], None]
) -> Iterator[tuple[CleanDocument, NDArray[np.unsignedinteger]]]:
    done = 0
    for batch in _batches(documents):
        yield from zip(batch, tokenizer.encode_batch([document.text for document in batch]), strict=True)
        done += sum(len(document.utf8) for document in batch)
        report(done)


def _batches(documents: Iterable[CleanDocument]) -> Iterator[list[CleanDocument]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.utf8)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _reporter(progress: Progress, phase: str, total: int | None) -> Callable[[int], None]:
    """A function of bytes done that speaks up every few seconds."""
    said = time.monotonic()

    def report(done: int) -> None:
        nonlocal said
        if time.monotonic() - said >= PROGRESS_SECONDS:
            said = time.monotonic()
            progress(f"{phase}: {done / 1e6:.0f} MB" + (f" of {total / 1e6:.0f}" if total else ""))

    return report
