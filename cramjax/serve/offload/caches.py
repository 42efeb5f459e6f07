"""Keys and values of a block of rows, and its activations, each divided over device, host and disk.

Rows of a batch are divided: the first lie on the device, the next in the host's memory, the last on the disk. A cache
is attended to where it lies; what is on the disk is brought to the host for that, a batch ahead of the walk.
"""

import math
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from cramjax.model.cache import Places
from cramjax.serve.offload.programs import Programs, Rows
from cramjax.serve.offload.store import Scratch, ScratchFile, buffer

FILLING = 2
"""Batches whose keys and values are on their way from the device at once."""


def _count(rows: slice) -> int:
    return rows.stop - rows.start


class _Part(NamedTuple):
    """A tree of arrays in a region of a file."""

    shapes: PyTree
    bytes: int


def _part(shapes: PyTree) -> _Part:
    return _Part(shapes, sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(shapes)))


def _empty(shapes: PyTree) -> PyTree:
    """Memory for a tree of arrays. It begins as zeros: places that nobody sees are multiplied with a weight of 0."""

    def one(x: Any) -> np.ndarray:
        return buffer(math.prod(x.shape) * x.dtype.itemsize).view(x.dtype).reshape(x.shape)

    return jax.tree.map(one, shapes)


class Caches:
    """Keys and values of all blocks and batches.

    Args:
        programs: that attend; they say which rows lie where.
        shape: of keys and values of one row, as a function of rows and places.
        blocks: of the model.
        batches: of a block of rows.
        places: most tokens of a row.
        scratch: for the disk's; None: there are none.
        load: reads from the disk, one after the other.
        store: writes to host and disk, one after the other.
        host: the device of the host's memory.
        attend_on_host: whether attention to the host's cache is computed there.
    """

    def __init__(
        self,
        programs: Programs,
        shape: Callable[[int, int], PyTree],
        *,
        blocks: int,
        batches: int,
        places: int,
        scratch: Scratch | None,
        load: Executor,
        store: Executor,
        host: Any,
        attend_on_host: bool,
    ):
        self._programs, self._load, self._store = programs, load, store
        self._host, self._on_host, self._batches = host, attend_on_host, batches
        device, middle, disk = (_count(rows) for rows in programs.cached)
        self._device: dict[tuple[int, int], PyTree] = {}
        self._device_shape = shape(device, places) if device else None
        self._in_host: dict[tuple[int, int], PyTree] = {}
        self._host_shape = shape(middle, places) if middle else None
        self._disk_part = _part(shape(disk, places)) if disk else None
        self._file: ScratchFile | None = None
        self._staging: list[PyTree] = []
        self._row_places = places
        if self._disk_part is not None:
            assert scratch is not None, "there is a place for what lies on the disk"
            self._file = scratch.file("cache", self._disk_part.bytes * blocks * batches)
            self._staging = [_empty(self._disk_part.shapes) for _ in range(2)]
        self._coming: dict[tuple[int, int], tuple[Future[None], PyTree]] = {}
        # What writes a cache to the disk last, and what fills it: each is waited for where that is read.
        self._stored: dict[tuple[int, int], Future[None]] = {}
        self._filled: dict[tuple[int, int], Future[None]] = {}
        self._filling = deque[Future[None]]()
        self._turn = 0

    def fill(self, block: int, batch: int, new: list[PyTree]) -> None:
        """Hold the keys and values of prompts, from a block's program, each tier its own.

        Those of two batches may be on their way from the device: before a third one's, the first is waited for.
        """
        key = block, batch
        if len(self._filling) == FILLING:
            self._filling.popleft().result()
        if self._device_shape is not None:
            if key not in self._device:
                self._device[key] = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self._device_shape)
            self._device[key] = self._programs.call("fill", self._device[key], new[0])
        if self._host_shape is not None and key not in self._in_host:
            self._in_host[key] = _empty(self._host_shape)

        def put() -> None:
            if self._host_shape is not None:
                jax.tree.map(_put_first, self._in_host[key], jax.tree.map(np.asarray, new[1]))
            if self._disk_part is not None:
                self._write(key, jax.tree.map(np.asarray, new[2]), None)

        self._stored[key] = self._filled[key] = self._store.submit(put)
        self._filling.append(self._stored[key])

    def prefetch(self, block: int, batch: int, lengths: np.ndarray) -> None:
        """Begin to read what a step will need of the disk.

        Args:
            block: of the model.
            batch: of the rows.
            lengths: tokens that the batch's rows hold.
        """
        if self._disk_part is None or (block, batch) in self._coming:
            return
        staging = self._staging[self._turn % 2]
        self._turn += 1
        before = self._stored.pop((block, batch), None)
        most = int(lengths[self._programs.cached[2]].max(initial=0))

        def read() -> None:
            if before is not None:
                before.result()
            self._read((block, batch), staging, most)

        self._coming[block, batch] = self._load.submit(read), staging

    def attend(
        self,
        block: int,
        batch: int,
        place: int,
        queries: list[Array],
        new: list[PyTree],
        places: list[Places],
        lengths: np.ndarray,
        real: np.ndarray,
    ) -> list[Array]:
        """Hold a new token of each row, and attend from it to all of its row.

        Args:
            block: of the model.
            batch: of the rows.
            place: of the block in its period.
            queries: of each tier's rows.
            new: keys and values of each tier's rows.
            places: where they stand.
            lengths: tokens that the rows held before.
            real: whether each row has a new token.

        Returns:
            What attention gives each tier's rows, on the device.
        """
        key, mixed = (block, batch), list[Array]()
        _, middle, disk = self._programs.cached
        if self._device_shape is not None:
            out, self._device[key] = self._programs.call(
                "append", self._device[key], queries[0], new[0], places[0], place=place
            )
            mixed.append(out)
        if self._host_shape is not None:
            if (filled := self._filled.pop(key, None)) is not None:
                filled.result()
            held, fresh = self._in_host[key], jax.tree.map(np.asarray, new[1])
            _put_at(held, fresh, lengths[middle], real[middle])
            mixed.append(self._attended(place, held, queries[1], places[1]))
        if self._disk_part is not None:
            self.prefetch(block, batch, lengths)
            future, held = self._coming.pop(key)
            future.result()
            fresh = jax.tree.map(np.asarray, new[2])
            _put_at(held, fresh, lengths[disk], real[disk])
            mixed.append(self._attended(place, held, queries[2], places[2]))
            at, there = lengths[disk].copy(), real[disk].copy()
            self._stored[key] = self._store.submit(self._write, key, fresh, (at, there))
        return mixed

    def _attended(self, place: int, held: PyTree, query: Array, places: Places) -> Array:
        """Attention to a cache in the host's memory: there, or on the device."""
        device = next(iter(query.devices()))
        where = self._host if self._on_host else device
        moved, query, places = jax.device_put((held, query, places), where, may_alias=True)
        # The memory is written again as soon as this returns.
        out = jax.block_until_ready(self._programs.call("attend", moved, query, places, place=place, host=where))
        return out if where == device else jax.device_put(out, device)

    def _region(self, key: tuple[int, int]) -> int:
        assert self._disk_part is not None
        return (key[0] * self._batches + key[1]) * self._disk_part.bytes

    def _write(self, key: tuple[int, int], new: PyTree, at: tuple[np.ndarray, np.ndarray] | None) -> None:
        """Write new keys and values to the disk: from the beginning, or one of each row at its place."""
        assert self._disk_part is not None and self._file is not None
        start = self._region(key)
        for shape, own in zip(jax.tree.leaves(self._disk_part.shapes), jax.tree.leaves(new), strict=True):
            each = math.prod(shape.shape[2:]) * shape.dtype.itemsize
            for row in range(shape.shape[0]):
                if at is None:
                    self._file.write(start, own[row])
                elif at[1][row]:
                    self._file.write(start + int(at[0][row]) * each, own[row])
                start += each * self._row_places

    def _read(self, key: tuple[int, int], into: PyTree, most: int) -> None:
        assert self._file is not None
        start = self._region(key)
        for own in jax.tree.leaves(into):
            each = own[0].nbytes
            for row in own:
                if most:
                    self._file.read(start, row[:most], drop=False)
                start += each


def _put_first(held: np.ndarray, new: np.ndarray) -> None:
    held[:, : new.shape[1]] = new


def _put_at(held: PyTree, new: PyTree, lengths: np.ndarray, real: np.ndarray) -> None:
    rows = np.flatnonzero(real)
    for part, own in zip(jax.tree.leaves(held), jax.tree.leaves(new), strict=True):
        part[rows, lengths[rows]] = own[rows, 0]


@dataclass
class _Kept:
    """A batch's activations between two stages."""

    device: Array | None
    elsewhere: Future[None] | None
    shape: tuple[int, ...]


class Activations:
    """The residual streams of all batches between two stages.

    Args:
        rows: of a batch, on each tier.
        batches: of a block of rows.
        shape: of the largest stream of a batch.
        dtype: of the stream.
        scratch: for the disk's; None: there are none.
        load: reads.
        store: writes.
        device: that computes.
    """

    def __init__(
        self,
        rows: Rows,
        batches: int,
        shape: tuple[int, int, int],
        dtype: Any,
        scratch: Scratch | None,
        load: Executor,
        store: Executor,
        device: Any,
    ):
        self._rows, self._load, self._store, self._device = rows, load, store, device
        self._whole = _count(rows[0]) == shape[0]
        self._dtype = np.dtype(dtype)
        each = shape[1] * shape[2] * self._dtype.itemsize
        middle, disk = _count(rows[1]), _count(rows[2])
        self._host = [buffer(middle * each) for _ in range(batches)] if middle else None
        self._file, self._bytes = None, disk * each
        if disk:
            assert scratch is not None, "there is a place for what lies on the disk"
            self._file = scratch.file("activations", self._bytes * batches)
        self._kept: dict[int, _Kept] = {}
        self._coming: dict[int, Future[Array]] = {}

    def put(self, batch: int, x: Array) -> None:
        """Keep a batch's stream."""
        if self._whole:
            self._kept[batch] = _Kept(x, None, x.shape)
            return
        first, middle, last = self._rows
        kept = x[first] if _count(first) else None

        def store() -> None:
            if self._host is not None:
                own = np.asarray(x[middle])
                self._host[batch][: own.nbytes].view(self._dtype)[:] = own.reshape(-1)
            if self._file is not None:
                self._file.write(self._bytes * batch, np.asarray(x[last]))

        self._kept[batch] = _Kept(kept, self._store.submit(store), x.shape)

    def prefetch(self, batch: int) -> None:
        """Begin to bring a batch's stream to the device."""
        if not self._whole and batch not in self._coming:
            self._coming[batch] = self._load.submit(self._brought, self._kept[batch], batch)

    def get(self, batch: int) -> Array:
        """A batch's stream on the device."""
        if self._whole:
            kept = self._kept[batch].device
            assert kept is not None
            return kept
        self.prefetch(batch)
        return self._coming.pop(batch).result()

    def _brought(self, kept: _Kept, batch: int) -> Array:
        assert kept.elsewhere is not None
        kept.elsewhere.result()
        parts = [] if kept.device is None else [np.asarray(kept.device)]
        rest = kept.shape[1:]
        if self._host is not None:
            shape = (_count(self._rows[1]), *rest)
            parts.append(self._host[batch][: math.prod(shape) * self._dtype.itemsize].view(self._dtype).reshape(shape))
        if self._file is not None:
            read = np.empty((_count(self._rows[2]), *rest), self._dtype)
            self._file.read(self._bytes * batch, read)
            parts.append(read)
        return jax.device_put(np.concatenate(parts), self._device)
