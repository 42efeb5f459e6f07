"""Deals sequences out of a token file: any position of a run, in any batch split, without state.

The order is a function of (seed, epoch, index), so resuming a run needs one integer: the position.
"""

import os
import queue
import tempfile
import threading
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from jaxtyping import Int32
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from cramjax.data.permutation import permute
from cramjax.data.store import TokenFile
from cramjax.errors import DataError

CHUNK_SEQUENCES = 1 << 14


class Dealer(Protocol):
    """Rows of training data over epochs without end, each at a position that one integer gives."""

    @property
    def sequence_length(self) -> int:
        """Tokens that the model sees of a row."""
        ...

    @property
    def tokens(self) -> int:
        """Tokens in the data."""
        ...

    def __len__(self) -> int:
        """Rows per epoch."""
        ...

    def take(self, position: int, count: int) -> Int32[np.ndarray, "batch *row"]:
        """The rows at `position` to `position + count - 1`, counted from the start of the run."""
        ...


@dataclass(frozen=True)
class Sequences:
    """The sequences of a token file, over epochs without end.

    Sequence i of the file is `tokens[i·L : i·L + L + extra]`. Of n sequences, position p of a run is in epoch p // n.

    Args:
        token_file: Where tokens come from.
        sequence_length: L, in tokens.
        extra: Tokens read beyond each sequence: 1 for next-token targets.
        seed: Of the shuffles.
        order: `shuffled`: a new permutation every epoch. `sentence_length`: always the curriculum of Geiping &
            Goldstein (2022, section 4.4), from sequences of short sentences to those of long ones.
    """

    token_file: TokenFile
    sequence_length: int
    extra: Literal[0, 1] = 0
    seed: int = 0
    order: Literal["shuffled", "sentence_length"] = "shuffled"

    def __len__(self) -> int:
        """Sequences per epoch."""
        return max(0, (len(self.token_file.tokens) - self.extra) // self.sequence_length)

    @property
    def tokens(self) -> int:
        """Tokens in the file."""
        return len(self.token_file.tokens)

    def take(self, position: int, count: int) -> Int32[np.ndarray, "batch seq"]:
        """The sequences at `position` to `position + count - 1`, counted from the start of the run.

        Returns:
            Token ids, int32 of shape (count, sequence_length + extra).

        Raises:
            DataError: The file is shorter than one sequence.
        """
        require_sequences(self, 1)
        epochs, indices = np.divmod(np.arange(position, position + count, dtype=np.int64), len(self))
        if self.order == "sentence_length":
            rows = self._curriculum[indices]
        else:
            rows = permute(indices, len(self), self.seed, epochs)
        return _rows(self.token_file.tokens, len(self), self.sequence_length, self.extra)[rows].astype(np.int32)

    @cached_property
    def _curriculum(self) -> NDArray[np.integer]:
        tokens, length, path = self.token_file.tokens, self.sequence_length, self.token_file.path
        if path is None:
            order = np.empty(len(self), np.int64)
            _sort_by_sentence_length(tokens, length, self.token_file.sentence_ends, order)
            return order
        stored = path.with_name(f"{path.stem}.order-{len(self)}x{length}.npy")
        if not stored.exists():
            _store_curriculum(stored, tokens, length, len(self), self.token_file.sentence_ends)
        return np.load(stored, mmap_mode="r")


def require_sequences(sequences: Dealer, batch: int) -> None:
    """Check that the data fills at least one batch.

    Args:
        sequences: The training data.
        batch: Sequences per optimizer step.

    Raises:
        DataError: It does not.
    """
    if len(sequences) < batch:
        raise DataError(
            f"the data makes {len(sequences)} sequences of {sequences.sequence_length} tokens "
            f"({sequences.tokens} tokens), fewer than the {batch} of one batch. "
            "Give more text, or lower batch.size or data.sequence_length."
        )


class Prefetcher:
    """Reads microbatches ahead in a thread: an endless iterator, whose item k starts at `start + k · microbatch`.

    An error in the thread is raised by the next `next()`. Close it when done, or use it in a `with` statement.
    """

    def __init__(self, sequences: Dealer, start: int, microbatch: int, depth: int = 2):
        """Start reading.

        Args:
            sequences: What to read.
            start: Position of the first sequence.
            microbatch: Sequences per item.
            depth: Items kept ready.
        """
        self._ready: queue.Queue[NDArray[np.int32] | BaseException] = queue.Queue(max(1, depth))
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._read, args=(sequences, start, microbatch), daemon=True)
        self._thread.start()

    def __iter__(self) -> "Prefetcher":
        """Itself."""
        return self

    def __next__(self) -> Int32[np.ndarray, "batch *row"]:
        """The next microbatch, int32 of shape (microbatch, …)."""
        if self._closing.is_set():
            raise StopIteration
        item = self._ready.get()
        if isinstance(item, BaseException):
            self.close()
            raise item
        return item

    def close(self) -> None:
        """Stop the thread. What it had ready is dropped."""
        self._closing.set()
        while self._thread.is_alive():
            try:  # The thread may be waiting for room.
                self._ready.get(timeout=0.01)
            except queue.Empty:
                continue
        self._thread.join()

    def __enter__(self) -> "Prefetcher":
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def _read(self, sequences: Dealer, position: int, microbatch: int) -> None:
        try:
            while not self._closing.is_set():
                self._ready.put(sequences.take(position, microbatch))
                position += microbatch
        except BaseException as error:
            self._ready.put(error)


def _rows(tokens: NDArray, count: int, length: int, extra: int) -> NDArray:
    """View of a stream as overlapping rows, shape (count, length + extra)."""
    step = tokens.strides[0]
    return as_strided(tokens, (count, length + extra), (length * step, step), writeable=False)


def _store_curriculum(path: Path, tokens: NDArray, length: int, count: int, ends: tuple[int, ...]) -> None:
    """Write the permutation, whole or not at all: several processes may want it at once."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    os.close(handle)
    try:
        order = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.int64, shape=(count,))
        _sort_by_sentence_length(tokens, length, ends, order)
        order.flush()
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _sort_by_sentence_length(tokens: NDArray, length: int, ends: tuple[int, ...], order: NDArray[np.int64]) -> None:
    """Fill `order` with sequence numbers by tokens per sentence, ascending, ties as they stand.

    Tokens per sentence is length / (sentence ends + 1), so more ends come first. A counting sort, chunk by chunk:
    memory does not grow with the file.
    """
    last = int(max(ends, default=0)) + 1
    is_end = np.zeros(last + 1, bool)
    is_end[list(ends)] = True

    def keys_from(start: int) -> NDArray[np.int64]:
        chunk = tokens[start * length : min(start + CHUNK_SEQUENCES, len(order)) * length].reshape(-1, length)
        return length - is_end[np.minimum(chunk, last)].sum(axis=1)

    starts = range(0, len(order), CHUNK_SEQUENCES)
    counts = np.zeros(length + 1, np.int64)
    for start in starts:
        counts += np.bincount(keys_from(start), minlength=length + 1)
    places = np.cumsum(counts) - counts
    for start in starts:
        keys = keys_from(start)
        numbers = np.argsort(keys, kind="stable")
        keys = keys[numbers]
        order[places[keys] + np.arange(len(keys)) - np.searchsorted(keys, keys)] = start + numbers
        places += np.bincount(keys, minlength=length + 1)
